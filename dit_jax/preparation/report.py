"""What preparation did: ``report.json``, and ``report.html`` with thumbnails, a page of its own."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.preparation.assembling import Failed
from dit_jax.preparation.examining import FileReport
from dit_jax.preparation.listing import Listed
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.stages import Examined
from dit_jax.preparation.work import write_json, write_whole

PICTURES = 400
"""Thumbnails in the page, at most."""
HINTS = {
    "examine": "decoding and measuring on the host: more processes (--workers.count) or machines "
    "(--shard)",
    "captions": "the captioning server: more requests at once there, or a smaller model",
    "states": "the text encoder: an accelerator",
    "latents": "the codec, and decoding for it: an accelerator, or larger batches (--batch)",
    "records": "decoding for, and writing of the records: a faster disk, or --codec",
}
"""What helps where a stage takes the most time."""


def summarize(
    listed: Listed,
    examined: Examined,
    duplicates: Mapping[str, str],
    failed: Failed,
    texts: Mapping[str, Mapping[str, str]],
    problems: Mapping[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """Everything that became of every file, as JSON values.

    ``duplicates`` and ``failed`` are by clip, ``texts`` those of the clips that are in the records, and
    ``problems`` are other things that went wrong, by file or clip.
    """
    files, reasons, rejections = [], Counter[str](), Counter[str]()
    seconds = 0.0
    for item in listed.items:
        report = examined.report(item)
        clips = []
        for index, clip in enumerate(report.clips):
            name = f"{item.name}#{index}"
            why = _why(name, clip.rejection, duplicates, failed)
            rejections[why.partition(":")[0] or "kept"] += 1
            seconds += 0.0 if why else clip.seconds
            clips.append(
                {
                    "begin": clip.begin,
                    "seconds": clip.seconds,
                    "left_out": why,
                    "scores": clip.scores,
                    "captions": dict(texts.get(name, {})),
                }
            )
        reasons[report.refusal[0] if report.refusal else _state(clips)] += 1
        files.append(_file(report, clips, problems.get(item.name, "")))
    longest = progress.bottleneck
    return {
        "files": len(files),
        "files_by_reason": dict(reasons.most_common()),
        "clips": rejections.total(),
        "clips_by_reason": dict(rejections.most_common()),
        "hours_kept": seconds / 3600,
        "captioned": sum(bool(text["caption"]) for text in texts.values()),
        "sidecars": len(listed.sidecars),
        "problems": dict(problems),
        "stages": {
            name: {"seconds": taken, "clips": progress.clips[name]}
            for name, taken in progress.seconds.items()
        },
        "bottleneck": longest and {"stage": longest[0], "part": longest[1]},
        "by_file": files,
    }


def _state(clips: Sequence[Mapping[str, Any]]) -> str:
    if not clips:
        return "no clips"
    return "all clips left out" if all(clip["left_out"] for clip in clips) else "used"


def _why(name: str, rejection: Any, duplicates: Mapping[str, str], failed: Failed) -> str:
    """Why a clip is left out; empty where it is not."""
    if rejection is not None:
        return str(rejection)
    if name in duplicates:
        return f"near-duplicate: of {duplicates[name]}"
    return ": ".join(failed[name]) if name in failed else ""


def _file(report: FileReport, clips: list[dict[str, Any]], problem: str) -> dict[str, Any]:
    probe = report.probe
    found: dict[str, Any] = {"path": report.path, "refusal": None, "notes": list(report.notes)}
    if report.refusal:
        found["refusal"] = {"reason": report.refusal[0], "detail": report.refusal[1]}
    if probe is not None:
        names = ("kind", "container", "codec", "width", "height", "fps", "duration", "rotation")
        found |= {name: getattr(probe, name) for name in names}
    return found | {"problem": problem, "seconds_of_work": report.cost, "clips": clips}


def render(summary: Mapping[str, Any]) -> str:
    """The summary in some lines for a terminal."""
    kept = summary["clips_by_reason"].get("kept", 0)
    lines = [
        f"{summary['files']} files: " + _counts(summary["files_by_reason"]),
        f"{summary['clips']} clips: " + _counts(summary["clips_by_reason"]),
        f"kept: {kept} clips, {summary['hours_kept'] * 60:.2f} minutes, "
        f"{summary['captioned']} with a caption",
    ]
    if longest := summary["bottleneck"]:
        lines.append(
            f"bottleneck: {longest['stage']}, {longest['part']:.0%} of the time "
            f"({HINTS[longest['stage']]})"
        )
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def write_reports(
    output: Path, summary: Mapping[str, Any], listed: Listed, examined: Examined
) -> None:
    """Writes ``report.json`` and ``report.html``."""
    write_json(output / "report.json", summary)
    rows, left = [], PICTURES
    for item, file in zip(listed.items, summary["by_file"], strict=True):
        thumbnails = []
        if left > 0:
            thumbnails = [clip.thumbnail for clip in examined.report(item, True).clips][:left]
            left -= len(thumbnails)
        rows.append(_row(file, thumbnails))
    write_whole(output / "report.html", _page(summary, rows).encode())


def _row(file: Mapping[str, Any], thumbnails: Sequence[bytes]) -> str:
    about = ""
    if "codec" in file:
        about = f"{file['codec']} {file['width']}x{file['height']}, {file['fps']:.3g} fps"
        about += f", {file['duration']:.2f} s" if file["duration"] else ""
    refusal = file["refusal"]
    told = [f"{refusal['reason']}: {refusal['detail']}"] if refusal else []
    told += [*file["notes"], *filter(None, [file["problem"]])]
    figures = []
    for i, clip in enumerate(file["clips"]):
        picture = ""
        if i < len(thumbnails):
            data = base64.b64encode(thumbnails[i]).decode()
            picture = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{data}">'
        caption = html.escape(clip["captions"].get("caption", ""))
        state = html.escape(clip["left_out"] or f"kept. {caption}")
        kind = "out" if clip["left_out"] else "kept"
        span = f"{clip['begin']:.2f} s + {clip['seconds']:.2f} s"
        figures.append(
            f'<figure class="{kind}">{picture}<figcaption>{span}<br>{state}</figcaption></figure>'
        )
    told_html = "<br>".join(html.escape(line) for line in told)
    name = html.escape(file["path"])
    return (
        f"<tr><td>{name}<br><small>{html.escape(about)}</small><br><b>{told_html}</b></td>"
        f"<td>{''.join(figures)}</td></tr>"
    )


def _page(summary: Mapping[str, Any], rows: Iterable[str]) -> str:
    def table(title: str, counts: Mapping[str, Any]) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
            for k, v in counts.items()
        )
        return f"<h2>{title}</h2><table>{cells}</table>"

    stages = {name: f"{one['seconds']:.1f} s" for name, one in summary["stages"].items()}
    return f"""<!doctype html><meta charset="utf-8"><title>Prepared clips</title><style>
body {{ font: 14px sans-serif; margin: 2em }} td {{ border-top: 1px solid #ccc; vertical-align: top;
padding: .4em }} figure {{ display: inline-block; margin: .3em; width: 200px; vertical-align: top }}
img {{ max-width: 100% }} .out {{ opacity: .5 }} .kept {{ border-bottom: 3px solid #3a3 }}
</style><h1>Prepared clips</h1><pre>{html.escape(render(summary))}</pre>
{table("Files", summary["files_by_reason"])}{table("Clips", summary["clips_by_reason"])}
{table("Seconds of this run", stages)}<h2>Every file</h2><table>{"".join(rows)}</table>
<details><summary>Problems</summary><pre>{html.escape(json.dumps(summary["problems"], indent=1))}
</pre></details>"""
