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
from dit_jax.prepare.listing import Item
from dit_jax.prepare.stages import Examined, Kept, clips_of
from dit_jax.prepare.tables import encodable
from dit_jax.prepare.work import Progress

PICTURES = 400  # Thumbnails in the page, at most.
LISTED = 1000  # Names in ``report.json``, at most, of files and of each kind of problem.
SAMPLE = 200  # Files of each reason in the page, at most.
CLIPS = 100  # Clips of each file in the page and in ``report.json``, at most.
PROBED = ("kind", "container", "codec", "width", "height", "fps", "duration", "rotation")
HINTS = {
    "examine": "decoding on the host: more processes (--workers.count) or machines (--shard)",
    "captions": "the captioning server: more requests at once there, or a smaller model",
    "states": "the text encoder: an accelerator",
    "latents": "the codec, and decoding for it: an accelerator, or larger batches (--batch)",
    "records": "decoding for, and writing of the records: a faster disk, or --codec",
}
"""What helps if a stage takes the most time."""


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
    reasons, left_out, counts = Counter[str](), Counter[str](), Counter[str]()
    seconds, listed, rows, thumbnails = 0.0, [], [], PICTURES
    with atomic_path(output / "files.jsonl") as path, path.open("wb") as lines:
        for item in items:
            report, clips = examined.report(item), []
            for one in clips_of(item, report):
                out = str(one.clip.rejection or "") or why(one.name)
                captions = {} if out else dict(texts(one))
                left_out[out.partition(":")[0] or "kept"] += 1
                if not out:
                    seconds += one.video_seconds
                    counts["pictures_kept"] += one.probe.kind == "image"
                    counts["captioned"] += bool(captions["caption"])
                clip = {"begin": one.clip.begin, "seconds": one.video_seconds, "left_out": out}
                clips.append(clip | {"scores": one.clip.scores, "captions": captions})
            used = not all(clip["left_out"] for clip in clips)
            reason = "used" if used else "all clips left out" if clips else "no clips"
            file: dict[str, Any] = {"path": report.path, "refusal": None, "notes": [*report.notes]}
            again = examined.tries_left(item, report)
            if report.refusal:
                reason, detail = report.refusal
                file["refusal"] = {"reason": reason, "detail": detail, "tried_again": again}
            if report.probe is not None:
                file |= {name: getattr(report.probe, name) for name in PROBED}
            file |= {"problem": problems.get(item.name, ""), "seconds_of_work": report.cost}
            file["clips"] = clips
            lines.write(json_bytes(file) + b"\n")
            reasons[reason] += 1
            counts["files_tried_again"] += again
            # A note is counted without its numbers and details.
            notes.update(re.sub(r"^\d+ |[:,].*", "", note) for note in report.notes)
            if len(listed) < LISTED:
                listed.append({**file, "clips": clips[:CLIPS]})
            if reasons[reason] <= SAMPLE:
                shown = report.clips[: min(thumbnails, CLIPS)]
                thumbnails -= len(shown)
                rows.append((file, [base64.b64encode(x.thumbnail).decode() for x in shown]))
    stages = {k: {"seconds": v, "clips": progress.clips[k]} for k, v in progress.seconds.items()}
    longest = progress.bottleneck
    summary = {
        "files": reasons.total(),
        "files_by_reason": dict(reasons.most_common()),
        "clips": left_out.total(),
        "clips_by_reason": dict(left_out.most_common()),
        "hours_kept": seconds / 3600,
        **{name: counts[name] for name in ("files_tried_again", "pictures_kept", "captioned")},
        "notes": {note: count for note, count in notes.most_common() if count},
        **about,
        "problems": dict(itertools.islice(problems.items(), LISTED)),
        "stages": stages,
        "bottleneck": longest and dict(zip(("stage", "part"), longest, strict=True)),
        "by_file": listed,
    }
    write_json(output / "report.json", summary)
    template = jinja2.Template(Path(__file__).with_suffix(".html").read_text(), autoescape=True)
    bounds = {"sample": SAMPLE, "listed": LISTED, "max_clips": CLIPS}
    page = template.render(summary, text=render(summary), rows=rows, **bounds)
    write_whole(output / "report.html", encodable(page))
    return summary


def render(summary: Mapping[str, Any]) -> str:
    """The summary in some lines for a terminal."""

    def counts(name: str) -> str:
        return ", ".join(f"{count} {what}" for what, count in summary[name].items()) or "none"

    pictures = summary["pictures_kept"]
    videos = summary["clips_by_reason"].get("kept", 0) - pictures
    parts = [f"{videos} videos of {summary['hours_kept'] * 60:.2f} minutes"] if videos else []
    parts += [f"{pictures} pictures"] if pictures else []
    lines = [
        f"{summary['files']} files: {counts('files_by_reason')}",
        f"{summary['clips']} clips: {counts('clips_by_reason')}",
        f"kept: {' and '.join(parts) or 'nothing'}, {summary['captioned']} with a caption",
        *([f"noted: {counts('notes')}"] if summary["notes"] else []),
    ]
    if longest := summary["bottleneck"]:
        stage, part = longest["stage"], longest["part"]
        lines.append(f"bottleneck: {stage}, {part:.0%} of the time ({HINTS[stage]})")
    return "\n".join(lines)
