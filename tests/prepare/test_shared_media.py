"""Every file of the shared media against the table: frames, shape, rate, length, pixels, or why not."""

import itertools
import json

import av.logging
import numpy as np
import pytest
from made_media import probe
from media_table import DECODED, REFUSED

from dit_jax.prepare.examining import examine
from dit_jax.prepare.media import DecodingLog, pictures
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.timeline import on_grid

LONG = 300
"""Of longer files only so many frames are decoded here."""


@pytest.fixture(autouse=True)
def quiet():
    av.logging.set_level(av.logging.PANIC)


def nine_parts(pixels):
    """Mean R, G, B of three rows of three parts: [3, 3, 3]."""
    if min(pixels.shape[:2]) < 3:
        pixels = pixels.repeat(3, 0).repeat(3, 1)
    h, w = pixels.shape[:2]
    ys, xs = ([round(side * i / 3) for i in range(4)] for side in (h, w))
    parts = [pixels[a:b, c:d] for a, b in itertools.pairwise(ys) for c, d in itertools.pairwise(xs)]
    return np.reshape([part.mean((0, 1)) for part in parts], (3, 3, 3))


@pytest.mark.parametrize("expected", DECODED, ids=lambda expected: expected.file)
def test_a_file_is_decoded_as_expected(shared, expected):
    path = shared(expected.file)
    found = probe(path)
    assert (found.kind, found.width, found.height) == expected[1:4]
    assert found.fps == pytest.approx(expected.fps, abs=1e-3)
    assert found.duration == pytest.approx(expected.duration, abs=2e-3)
    pixels = next(pictures(path)).pixels()
    bare = (picture._replace(frame=None) for picture in pictures(path))
    decoded = list(itertools.islice(bare, LONG))
    indices = [k for k, _ in on_grid(decoded, found.fps, decoded[0].time)]
    assert len(decoded) == min(expected.decoded, LONG)
    assert indices == list(range(min(expected.sampled, LONG)))
    # Turned, mirrored and coloured as another decoder shows it: three levels for its rounding.
    assert pixels.shape == (found.height, found.width, 3) and pixels.dtype == np.uint8
    reference = np.frombuffer(bytes.fromhex(expected.colours), np.uint8).reshape(3, 3, 3)
    measured = nine_parts(pixels)
    if found.hdr:
        assert np.corrcoef(measured.mean(-1).ravel(), reference.mean(-1).ravel())[0, 1] > 0.9
    else:
        assert np.abs(measured - reference).max() <= 3.5


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_name(shared, name):
    with pytest.raises(Refused) as refused:
        probe(shared(name))
    assert refused.value.reason == REFUSED[name]
    report = examine(shared(name))
    assert report.refusal is not None and report.refusal[0] == REFUSED[name]
    assert report.clips == ()


@pytest.mark.parametrize("folder", ["clips", "odd_media"])
def test_every_file_is_in_the_table(shared, folder):
    manifest = {
        f"{folder}/{m['file']}" for m in json.loads(shared(f"{folder}/MANIFEST.json").read_text())
    }
    table = {e.file for e in DECODED} | set(REFUSED)
    assert manifest == {name for name in table if name.startswith(folder)}


def test_what_damaged_files_lost_is_said(shared):
    lost = {}
    for name in (
        "SYNTH_truncated_faststart",
        "androidx__sample_with_invalid_nalu",
        "decord__corrupted",
    ):
        log = DecodingLog()
        count = sum(1 for _ in pictures(shared(f"odd_media/{name}.mp4"), log=log))
        lost[name] = (count, log.errors, log.dropped)
    assert lost == {
        "SYNTH_truncated_faststart": (146, 1, 2),
        "androidx__sample_with_invalid_nalu": (26, 1, 3),
        "decord__corrupted": (28, 2, 21),
    }
    report = examine(shared("odd_media/decord__corrupted.mp4"))
    assert report.refusal is None and report.frames == 28
    assert "truncated: 2.80 s of 5.00 s" in report.notes
