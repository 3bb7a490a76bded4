"""Pictures turned, stretched and coloured as their files say; transfer functions by their standards."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from dit_jax.prepare import pixels as p
from dit_jax.prepare.media import pictures
from tests.prepare.made_media import probe

# Four quadrants: red, green / blue, white.
QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:] = (200, 30, 30), (30, 200, 30)
QUADRANTS[24:, :32], QUADRANTS[24:, 32:] = (30, 30, 200), (220, 220, 220)
EIGHT = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
EIGHT += [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", EIGHT)
def test_all_eight_display_matrices_are_applied(written, matrix):
    a, b, c, d = matrix
    path, one = written("turned.mp4", [QUADRANTS] * 3), 1 << 16
    data = bytearray(path.read_bytes())
    old = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.index(old, data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    # The quadrants' colours as displayed, by ISO 14496-12: x' = ax + cy, y' = bx + dy.
    expected = np.zeros((2, 2, 3), int)
    for y, x in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        colour = QUADRANTS[24 + 12 * y, 32 + 16 * x]
        expected[(b * x + d * y + 1) // 2, (a * x + c * y + 1) // 2] = colour
    picture = next(pictures(path))
    shown = picture.pixels()
    assert shown.shape == ((64, 48, 3) if a == 0 else (48, 64, 3))
    h, w = shown.shape[0] // 2, shown.shape[1] // 2
    means = [[shown[y : y + h, x : x + w].mean((0, 1)) for x in (0, w)] for y in (0, h)]
    assert np.abs(np.array(means) - expected).max() < 8
    found = probe(path)
    assert (found.height, found.width) == shown.shape[:2]
    assert np.abs(picture.lightness().astype(int) - shown @ [0.299, 0.587, 0.114]).mean() < 3


def test_pixels_that_are_not_square_are_stretched(written):
    path = written("wide.mp4", [QUADRANTS] * 2, sample_aspect_ratio=Fraction(4, 3))
    found = probe(path)
    assert (found.height, found.width) == (48, 85)
    assert found.sample_aspect_ratio == pytest.approx(4 / 3)
    shown = next(pictures(path)).pixels()
    assert shown.shape == (48, 85, 3)
    # Red ends in the middle of the wider picture.
    assert shown[12, 40, 0] > 150 and shown[12, 45, 0] < 100


def raw(y, u, v, height=32, width=48, kind="yuv420p", **tags):
    """A flat frame with these sample values."""
    frame = av.VideoFrame(width, height, kind)
    for plane, value in zip(frame.planes, (y, u, v), strict=True):
        numbers = np.full(plane.buffer_size // (1 if kind[-1] == "p" else 2), value)
        plane.update(numbers.astype(np.uint8 if kind[-1] == "p" else "<u2").tobytes())
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


def closed_form(y, u, v, kr, kb, full):
    """R'G'B' by the definition of Y'CbCr, 8 bits."""
    y, u, v = (y, u - 128, v - 128) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    y, u, v = (x / 255 for x in (y, u, v)) if full else (y, u, v)
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return 255 * np.array([r, (y - kr * r - kb * b) / (1 - kr - kb), b])


@pytest.mark.parametrize(
    "matrix, size, kr, kb, bits",
    [
        (1, (32, 48), 0.2126, 0.0722, 8),
        (6, (32, 48), 0.299, 0.114, 8),
        (9, (32, 48), 0.2627, 0.0593, 8),
        (2, (32, 48), 0.299, 0.114, 8),  # Small and unknown: BT.601.
        (2, (720, 48), 0.2126, 0.0722, 8),  # Large and unknown: BT.709.
        (1, (32, 48), 0.2126, 0.0722, 10),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_the_files_own(written, matrix, size, kr, kb, bits, full):
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    kind, by = ("yuv420p", 1) if bits == 8 else ("yuv420p10le", 4)
    frame = raw(120 * by, 100 * by, 160 * by, *size, kind=kind, **tags)
    picture = next(pictures(written("flat.mkv", [frame] * 2, codec="ffv1", **tags)))
    expected = closed_form(120, 100, 160, kr, kb, full)
    assert np.abs(picture.pixels()[5, 5] - expected).max() <= 1.2
    light = picture.lightness()[5, 5]
    assert light == pytest.approx(120 if full else (120 - 16) / 219 * 255, abs=1)


def test_hdr_is_tone_mapped(written):
    tags = {"colorspace": 9, "color_range": 1, "color_trc": 16, "color_primaries": 9}
    # Diffuse white, 203 cd/m2: PQ 0.5807, in ten bits of limited range.
    white = raw(round(64 + 876 * 0.5807), 512, 512, kind="yuv420p10le", **tags)
    path = written("hdr.mkv", [white] * 2, codec="ffv1", **tags)
    assert probe(path).hdr == "pq"
    shown = next(pictures(path)).pixels()[5, 5].astype(int)
    assert np.ptp(shown) <= 1 and 200 <= shown[0] <= 245  # Below white: room for highlights.


def test_transfer_functions_are_st_2084_and_bt_2100():
    # The codes of PQ are those of BT.2408, table 1, and BT.2390.
    codes = {0.0: 0.0, 0.5081: 100.0, 0.5807: 203.0, 0.7518: 1000.0, 1.0: 10000.0}
    for signal, light in codes.items():
        assert p.pq_to_light(signal) == pytest.approx(light, rel=2e-3, abs=1e-6)
        assert p.light_to_pq(light) == pytest.approx(signal, abs=2e-4)
    # Half of HLG is a twelfth of the light; diffuse white, 203 cd/m2 of 1,000, is at 0.75.
    assert p.hlg_to_scene(0.5) == pytest.approx(1 / 12, rel=1e-4)
    assert p.hlg_to_scene(1.0) == pytest.approx(1.0, rel=1e-4)
    assert 1000 * p.hlg_to_scene(0.75) ** 1.2 == pytest.approx(203, rel=2e-3)


def test_primaries_become_bt709s():
    # From the chromaticities x, y of red, green and blue, and of white, D65.
    chromaticities = {
        1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
        9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
        12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    }
    xyz = {}
    for number, corners in chromaticities.items():
        columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in corners]).T
        white = [0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290]
        xyz[number] = columns * np.linalg.solve(columns, white)
    for number in (9, 12):
        assert np.abs(np.linalg.inv(xyz[1]) @ xyz[number] - p.TO_BT709[number]).max() < 1e-7
    red = np.array([[[65535, 0, 0]]], np.uint16)
    assert p.to_sdr(red, 1, 9)[0, 0].tolist() == [255, 0, 0]
    assert p.needs_mapping(1, 9) and p.needs_mapping(16, 2)
    assert not p.needs_mapping(1, 1) and not p.needs_mapping(2, 2)


def test_highlights_are_rolled_off_and_the_dark_is_kept():
    light = np.linspace(0, 1000, 2001)
    out = p.rolled_off(light, 1000.0)
    assert (np.diff(out) > 0).all() and out[-1] == pytest.approx(203, rel=1e-6)
    scale = float(p.light_to_pq(1000.0))
    knee = p.pq_to_light((1.5 * float(p.light_to_pq(203.0)) / scale - 0.5) * scale)
    assert np.abs(out - light)[light <= knee].max() < 1e-6
    assert p.rolled_off(np.array([50.0, 900.0]), 150.0).tolist() == [50.0, 203.0]


@pytest.mark.parametrize("transfer", [p.PQ, p.HLG])
def test_greys_stay_grey_and_in_order(transfer):
    grey = np.linspace(0, 65535, 256).astype(np.uint16)[:, None, None].repeat(3, 2)
    out = p.to_sdr(grey, transfer, 9)[:, 0].astype(int)
    assert np.ptp(out, axis=1).max() <= 1
    assert (np.diff(out[:, 0]) >= -1).all() and out[0, 0] == 0 and out[-1].min() >= 254


def test_the_tables_are_as_good_as_the_functions():
    signal = np.linspace(0.2, 0.75, 50)
    light = p.rolled_off(p.pq_to_light(signal), 1000.0) / p.WHITE
    grey = np.rint(signal * 65535).astype(np.uint16)[:, None, None].repeat(3, 2)
    error = p.to_sdr(grey, p.PQ, 9)[:, 0, 0] - 255 * light ** (1 / p.DISPLAY_GAMMA)
    assert np.abs(error).max() <= 1.5
    with pytest.raises(ValueError, match="256"):
        p.DecodingConfig(background=(0, 0, 256))
