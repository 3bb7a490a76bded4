"""Shared media against a table: frames, shape, rate, length, pixels, or why not.

`colours` are the mean R, G, B of the nine parts (three rows of three) of the first displayed frame, in
hexadecimal, as FFmpeg 9.0.2 (another build and version than PyAV's) shows it, turned by its own reading
of the metadata. HDR files are not tone-mapped in them. Rates, lengths and sizes are not the
manifest's where headers say what frames have not, or pixels are not square.
"""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from dit_jax.prepare.examining import examine
from dit_jax.prepare.media import DecodingLog, pictures
from dit_jax.prepare.timeline import on_grid

LONG = 300  # Of longer files only so many frames are decoded here.
ROWS = list(csv.DictReader(Path(__file__).with_name("media_table.csv").read_text().splitlines()))
REFUSED = {row["file"]: row["refused"] for row in ROWS if row["refused"]}
DECODED = {row["file"]: row for row in ROWS if not row["refused"]}


def nine_parts(pixels):
    """Mean R, G, B of three rows of three parts: [3, 3, 3]."""
    if min(pixels.shape[:2]) < 3:
        pixels = pixels.repeat(3, 0).repeat(3, 1)
    h, w = pixels.shape[:2]
    ys, xs = ([round(side * i / 3) for i in range(4)] for side in (h, w))
    parts = [pixels[a:b, c:d] for a, b in itertools.pairwise(ys) for c, d in itertools.pairwise(xs)]
    return np.reshape([part.mean((0, 1)) for part in parts], (3, 3, 3))


@pytest.mark.parametrize("name", DECODED)
def test_a_file_is_decoded_as_expected(shared, name):
    path, log, row = shared(name), DecodingLog(), DECODED[name]
    shown = pictures(path, log=log)
    first = next(shown)
    pixels, found = first.pixels(), log.probe
    assert [found.kind, str(found.width), str(found.height)] == list(row.values())[1:4]
    assert found.fps == pytest.approx(float(row["fps"]), abs=1e-3)
    assert found.duration == pytest.approx(float(row["duration"]), abs=2e-3)
    bare = (picture._replace(frame=None) for picture in itertools.chain([first], shown))
    decoded = list(itertools.islice(bare, LONG))
    indices = [k for k, _ in on_grid(decoded, found.fps, decoded[0].time)]
    assert len(decoded) == min(int(row["decoded"]), LONG)
    assert indices == list(range(min(int(row["sampled"]), LONG)))
    # Turned, mirrored and coloured as another decoder shows it: three levels for its rounding.
    assert pixels.shape == (found.height, found.width, 3) and pixels.dtype == np.uint8
    reference = np.frombuffer(bytes.fromhex(row["colours"]), np.uint8).reshape(3, 3, 3)
    measured = nine_parts(pixels)
    if found.hdr:
        assert np.corrcoef(measured.mean(-1).ravel(), reference.mean(-1).ravel())[0, 1] > 0.9
    else:
        assert np.abs(measured - reference).max() <= 3.5


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_name(shared, name):
    report = examine(shared(name))
    assert report.refusal is not None and report.refusal[0] == REFUSED[name]
    assert report.clips == ()


def test_what_damaged_files_lost_is_said(shared):
    lost = {
        "SYNTH_truncated_faststart": (146, 1, 2),
        "androidx__sample_with_invalid_nalu": (26, 1, 3),
        "decord__corrupted": (28, 2, 21),
    }
    for name, expected in lost.items():
        log = DecodingLog()
        count = sum(1 for _ in pictures(shared(f"odd_media/{name}.mp4"), log=log))
        assert (count, log.errors, log.dropped) == expected, name
    report = examine(shared("odd_media/decord__corrupted.mp4"))
    assert report.refusal is None and report.frames == 28
    assert "truncated: 2.80 s of 5.00 s" in report.notes
