"""What preparation did: ``report.json``, ``files.jsonl``, and ``report.html`` with thumbnails.

``files.jsonl`` has a line for every file. ``report.json`` has the counts, and names the first files;
``report.html``, a page of its own, shows some files of every reason.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dit_jax.files import atomic_path, json_bytes, write_json, write_whole
from dit_jax.prepare.examining import FileReport
from dit_jax.prepare.listing import Item
from dit_jax.prepare.stages import Examined, Kept, video_seconds
from dit_jax.prepare.tables import encodable
from dit_jax.prepare.work import Progress

PICTURES = 400
"""Thumbnails in the page, at most."""
LISTED = 1000
"""Names in ``report.json``, at most, of files and of each kind of problem."""
SAMPLE = 200
"""Files of each reason in the page, at most."""
CLIPS = 100
"""Clips of each file in the page and in ``report.json``, at most."""
TEMPLATE = Path(__file__).with_suffix(".html")
HINTS = {
    "examine": "decoding and measuring on the host: more processes (--workers.count) or machines "
    "(--shard)",
    "captions": "the captioning server: more requests at once there, or a smaller model",
    "states": "the text encoder: an accelerator",
    "latents": "the codec, and decoding for it: an accelerator, or larger batches (--batch)",
    "records": "decoding for, and writing of the records: a faster disk, or --codec",
}
"""What helps where a stage takes the most time."""


def write_reports(
    output: Path,
    items: Sequence[Item],
    examined: Examined,
    why: Callable[[str], str],
    texts: Callable[[Kept], Mapping[str, str]],
    problems: Mapping[str, str],
    about: Mapping[str, Any],
    notes: Counter[str],
    progress: Progress,
) -> dict[str, Any]:
    """Writes ``files.jsonl``, ``report.json`` and ``report.html``; returns what ``report.json`` says.

    ``why`` says of a clip's name why it is left out though no filter rejected it, and ``texts`` which
    captions are in its record; ``problems`` are other things that went wrong, by file or clip;
    ``about`` and ``notes`` go into ``report.json``; the notes of the files are added to ``notes``.
    """
    reasons, left_out = Counter[str](), Counter[str]()
    seconds, pictures, captioned, tries = 0.0, 0, 0, 0
    listed, rows, thumbnails = [], [], PICTURES
    with atomic_path(output / "files.jsonl") as path, path.open("wb") as lines:
        for item in items:
            report = examined.report(item)
            video = report.probe is not None and report.probe.kind != "image"
            clips = []
            for index, clip in enumerate(report.clips):
                out = str(clip.rejection) if clip.rejection else why(f"{item.name}#{index}")
                left_out[out.partition(":")[0] or "kept"] += 1
                captions = {}
                if not out:
                    assert report.probe is not None
                    captions = dict(texts(Kept(item, index, clip, report.probe, report.caption)))
                    seconds += video_seconds(report.probe, (clip,))
                    pictures += not video
                    captioned += bool(captions["caption"])
                span = {"begin": clip.begin, "seconds": clip.seconds if video else 0.0}
                clips.append({**span, "left_out": out, "scores": clip.scores, "captions": captions})
            again = examined.tries_left(item, report)
            tries += again
            reason = report.refusal[0] if report.refusal else _state(clips)
            reasons[reason] += 1
            notes.update(_kind(note) for note in report.notes)
            file = _file(report, clips, problems.get(item.name, ""), again)
            lines.write(json_bytes(file) + b"\n")
            if len(listed) < LISTED:
                listed.append({**file, "clips": clips[:CLIPS]})
            if reasons[reason] <= SAMPLE:
                clips = report.clips[: min(thumbnails, CLIPS)]
                thumbnails -= len(clips)
                shown = [base64.b64encode(clip.thumbnail).decode() for clip in clips]
                rows.append((file, shown))
    longest = progress.bottleneck
    summary = {
        "files": reasons.total(),
        "files_by_reason": dict(reasons.most_common()),
        "files_tried_again": tries,
        "clips": left_out.total(),
        "clips_by_reason": dict(left_out.most_common()),
        "hours_kept": seconds / 3600,
        "pictures_kept": pictures,
        "captioned": captioned,
        "notes": {note: count for note, count in notes.most_common() if count},
        **about,
        "problems": dict(itertools.islice(problems.items(), LISTED)),
        "stages": {
            name: {"seconds": taken, "clips": progress.clips[name]}
            for name, taken in progress.seconds.items()
        },
        "bottleneck": longest and {"stage": longest[0], "part": longest[1]},
        "by_file": listed,
    }
    write_json(output / "report.json", summary)
    stages = {name: f"{one['seconds']:.1f} s" for name, one in summary["stages"].items()}
    tables = {"Files": summary["files_by_reason"], "Clips": summary["clips_by_reason"]}
    tables |= {"Notes": summary["notes"], "Seconds of this run": stages}
    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True)
    bounds = {"sample": SAMPLE, "listed": LISTED, "clips": CLIPS}
    values = {"text": render(summary), "tables": tables, "rows": rows, **bounds}
    write_whole(
        output / "report.html", encodable(page.render(problems=summary["problems"], **values))
    )
    return summary


def _kind(note: str) -> str:
    """What a note is counted as: without its numbers and details."""
    return re.sub(r"^\d+ |[:,].*", "", note)


def _state(clips: Sequence[Mapping[str, Any]]) -> str:
    if not clips:
        return "no clips"
    return "all clips left out" if all(clip["left_out"] for clip in clips) else "used"


def _file(
    report: FileReport, clips: list[dict[str, Any]], problem: str, again: bool
) -> dict[str, Any]:
    probe = report.probe
    found: dict[str, Any] = {"path": report.path, "refusal": None, "notes": list(report.notes)}
    if report.refusal:
        reason, detail = report.refusal
        found["refusal"] = {"reason": reason, "detail": detail, "tried_again": again}
    if probe is not None:
        names = ("kind", "container", "codec", "width", "height", "fps", "duration", "rotation")
        found |= {name: getattr(probe, name) for name in names}
    return found | {"problem": problem, "seconds_of_work": report.cost, "clips": clips}


def render(summary: Mapping[str, Any]) -> str:
    """The summary in some lines for a terminal."""
    kept = summary["clips_by_reason"].get("kept", 0)
    pictures, hours = summary["pictures_kept"], summary["hours_kept"]
    parts = [f"{kept - pictures} videos of {hours * 60:.2f} minutes"] if kept > pictures else []
    parts += [f"{pictures} pictures"] if pictures else []
    lines = [
        f"{summary['files']} files: " + _counts(summary["files_by_reason"]),
        f"{summary['clips']} clips: " + _counts(summary["clips_by_reason"]),
        f"kept: {' and '.join(parts) or 'nothing'}, {summary['captioned']} with a caption",
    ]
    if summary["notes"]:
        lines.append("noted: " + _counts(summary["notes"]))
    if longest := summary["bottleneck"]:
        lines.append(
            f"bottleneck: {longest['stage']}, {longest['part']:.0%} of the time "
            f"({HINTS[longest['stage']]})"
        )
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
