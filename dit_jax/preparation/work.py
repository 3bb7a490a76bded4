"""The work folder: what every stage leaves behind for a file, so that nothing is done twice.

A result is a file of its own, written beside its place and then moved there: it is whole or absent,
whenever a run is killed. Its name holds a digest of all that it depends on, so that a changed file or
setting is worked on anew and the old result is left alone.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from dit_jax.preparation.clips import Geometry, Rect
from dit_jax.preparation.examining import Clip, FileReport
from dit_jax.preparation.filters import Rejection
from dit_jax.preparation.media import Probe


def digest(*values: Any) -> str:
    """Sixteen hex digits of JSON values and dataclasses of them."""
    plain = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in values]  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def file_name(name: str, key: str, suffix: str) -> str:
    """What a result of a file is called: readable, and told apart by ``key``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
    return f"{plain}-{key}{suffix}"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also for other processes that look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def write_json(path: Path, value: Any) -> None:
    """``write_whole`` of JSON, indented for readers."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_report(path: str | os.PathLike, report: FileReport) -> None:
    """Stores what ``examine`` found."""
    values = dataclasses.asdict(report)
    for clip in values["clips"]:
        clip["thumbnail"] = base64.b64encode(clip["thumbnail"]).decode()
    write_json(Path(path), values)


def read_report(path: Path, thumbnails: bool = False) -> FileReport:
    """What ``write_report`` stored; thumbnails are left empty unless they are asked for."""
    values = json.loads(path.read_bytes())
    clips = tuple(_clip(clip, thumbnails) for clip in values["clips"])
    probe, refusal = values["probe"], values["refusal"]
    return FileReport(
        **{
            **values,
            "probe": Probe(**probe) if probe else None,
            "refusal": tuple(refusal) if refusal else None,
            "clips": clips,
            "shots": tuple((first, last) for first, last in values["shots"]),
            "notes": tuple(values["notes"]),
        }
    )


def _clip(values: dict[str, Any], thumbnails: bool) -> Clip:
    geometry, rejection = values["geometry"], values["rejection"]
    if geometry is not None:
        rects = {name: Rect(**geometry[name]) for name in ("crop", "source")}
        geometry = Geometry(**{**geometry, **rects})
    return Clip(
        **{
            **values,
            "geometry": geometry,
            "rejection": Rejection(**rejection) if rejection else None,
            "hashes": tuple(values["hashes"]),
            "thumbnail": base64.b64decode(values["thumbnail"]) if thumbnails else b"",
        }
    )
