"""What every shared media file is expected to give (`media_table.csv`); `colours` by another decoder.

`colours` are the mean R, G, B of the nine parts (three rows of three) of the first displayed frame, in
hexadecimal, as FFmpeg 9.0.2 (another build and version than PyAV's) shows it, turned by its own
reading of the metadata. HDR files are not tone-mapped in them. What differs from the manifest was
looked into: there the rates and lengths of some files are what their headers say and not what their
frames have (`bt601`, `sample.flv`, `empty_track`, `last_cluster`, `sef_slow_motion`), or stored sizes
of pixels that are not square.
"""

import csv
from pathlib import Path
from typing import NamedTuple


class Expected(NamedTuple):
    file: str
    kind: str
    width: int
    height: int
    fps: float
    decoded: int
    """Frames that decode cleanly."""
    sampled: int
    """Frames at the constant rate."""
    duration: float
    colours: str


with Path(__file__).with_suffix(".csv").open(newline="") as _file:
    _rows = list(csv.DictReader(_file))
REFUSED = {row["file"]: row["refused"] for row in _rows if row["refused"]}
DECODED = [
    Expected(**{name: kind(row[name]) for name, kind in Expected.__annotations__.items()})
    for row in _rows
    if not row["refused"]
]
