"""Made videos: turned, stretched, coloured, timed and damaged, against what their headers mean."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from made_media import displayed, moving

from dit_jax.prepare.decoding import DecodingConfig, Losses, pictures, probe, sampled
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.rendering import Orientation, orientation

# Four quadrants: red, green / blue, white.
QUADRANTS = np.zeros((48, 64, 3), np.uint8)
QUADRANTS[:24, :32], QUADRANTS[:24, 32:] = (200, 30, 30), (30, 200, 30)
QUADRANTS[24:, :32], QUADRANTS[24:, 32:] = (30, 30, 200), (220, 220, 220)


def with_matrix(path, a, b, c, d):
    """Writes a display matrix [[a, b], [c, d]] into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    one = 1 << 16
    old = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    new = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    at = data.index(old, data.index(b"tkhd"))
    data[at : at + 36] = new
    path.write_bytes(data)
    return path


def placed(a, b, c, d):
    """The quadrants' colours as displayed, [2, 2, 3], by ISO 14496-12: x' = ax + cy, y' = bx + dy."""
    shown = np.zeros((2, 2, 3), int)
    for y in (-1, 1):
        for x in (-1, 1):
            colour = QUADRANTS[24 + 12 * y, 32 + 16 * x]
            shown[(b * x + d * y + 1) // 2, (a * x + c * y + 1) // 2] = colour
    return shown


EIGHT = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("matrix", EIGHT)
def test_all_eight_display_matrices_are_applied(written, matrix):
    path = with_matrix(written("turned.mp4", [QUADRANTS] * 3), *matrix)
    shown = next(pictures(path)).pixels()
    turned = matrix[0] == 0
    assert shown.shape == ((64, 48, 3) if turned else (48, 64, 3))
    h, w = shown.shape[0] // 2, shown.shape[1] // 2
    means = [[shown[y : y + h, x : x + w].mean((0, 1)) for x in (0, w)] for y in (0, h)]
    assert np.abs(np.array(means) - placed(*matrix)).max() < 8
    found = probe(path)
    assert (found.height, found.width) == shown.shape[:2]
    light = next(pictures(path)).lightness()
    assert np.abs(light.astype(int) - shown @ [0.299, 0.587, 0.114]).mean() < 3


def test_a_matrix_that_is_damaged_is_taken_for_none():
    assert orientation(struct.pack("=9i", *[0] * 9)) == Orientation()
    assert orientation(struct.pack("=9i", *[-(1 << 31)] * 9)) == Orientation()


def test_pixels_that_are_not_square_are_stretched(written):
    path = written("wide.mp4", [QUADRANTS] * 2, aspect=Fraction(4, 3))
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
    "matrix, size, kr, kb",
    [
        (1, (32, 48), 0.2126, 0.0722),
        (6, (32, 48), 0.299, 0.114),
        (9, (32, 48), 0.2627, 0.0593),
        (2, (32, 48), 0.299, 0.114),  # Small and unknown: BT.601.
        (2, (720, 48), 0.2126, 0.0722),  # Large and unknown: BT.709.
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_the_files_own(written, matrix, size, kr, kb, full):
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    frame = raw(120, 100, 160, *size, **tags)
    path = written("flat.mkv", [frame] * 2, codec="ffv1", **tags)
    shown = next(pictures(path)).pixels()[5, 5]
    assert np.abs(shown - closed_form(120, 100, 160, kr, kb, full)).max() <= 1.2
    light = next(pictures(path)).lightness()[5, 5]
    assert light == pytest.approx(120 if full else (120 - 16) / 219 * 255, abs=1)


def test_ten_bits_are_reduced_and_not_cut(written):
    frame = raw(480, 400, 640, kind="yuv420p10le", colorspace=1, color_range=1)
    path = written("ten.mkv", [frame] * 2, codec="ffv1", colorspace=1, color_range=1)
    shown = next(pictures(path)).pixels()[5, 5]
    assert np.abs(shown - closed_form(120, 100, 160, 0.2126, 0.0722, False)).max() <= 1.2


def test_hdr_is_tone_mapped_or_refused(written):
    tags = {"colorspace": 9, "color_range": 1, "color_trc": 16, "color_primaries": 9}
    # Diffuse white, 203 cd/m2: PQ 0.5807, in ten bits of limited range.
    white = raw(round(64 + 876 * 0.5807), 512, 512, kind="yuv420p10le", **tags)
    path = written("hdr.mkv", [white] * 2, codec="ffv1", **tags)
    assert probe(path).hdr == "pq"
    shown = next(pictures(path)).pixels()[5, 5].astype(int)
    assert np.ptp(shown) <= 1 and 200 <= shown[0] <= 245  # Below white: room for highlights.
    with pytest.raises(Refused, match="refuses HDR") as refused:
        next(pictures(path, DecodingConfig(hdr="refuse")))
    assert refused.value.reason == "hdr"


def bright(count):
    """Frames whose level tells which they are."""
    return [np.full((32, 32, 3), 20 + 8 * i, np.uint8) for i in range(count)]


def numbers(path, fps=None):
    return [round((int(p.pixels()[5, 5, 0]) - 20) / 8) for _, p in sampled(path, fps)]


def test_a_variable_rate_is_sampled_by_time_stamps(written):
    times = [0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.85, 0.9, 1.0]
    path = written("vfr.mkv", bright(9), 10, times=times)
    found = probe(path)
    assert found.fps == pytest.approx(10, abs=0.01) and not found.constant_rate
    # Between 0.3 and 0.7 the nearer one; of 0.85 and 0.8, 0.9 those on the grid.
    assert numbers(path) == [0, 1, 2, 3, 3, 4, 4, 4, 5, 7, 8]
    assert [round(t, 2) for t, _ in displayed(path)][:5] == [0, 0.1, 0.2, 0.3, 0.3]


def test_a_constant_rate_rounded_to_milliseconds_keeps_every_frame(written):
    path = written("ms.mkv", bright(24), 30, times=[round(i / 30, 3) for i in range(24)])
    found = probe(path)
    assert found.fps == 30 and found.constant_rate and found.frames == 24
    assert numbers(path) == list(range(24))


def test_another_rate_takes_the_nearest_frames(written):
    path = written("rate.mp4", bright(24), 24)
    assert numbers(path, 12) == list(range(0, 24, 2))
    assert numbers(path, 48) == [(i + 1) // 2 for i in range(47)]


@pytest.mark.parametrize(
    "name, codec",
    [("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mov", "libx264"), ("a.mkv", "ffv1")],
)
def test_containers_give_all_frames(written, name, codec):
    clip = [f for f in moving(9, 48, 64)]
    made = [av.VideoFrame.from_ndarray(f, "rgb24").reformat(format="yuv420p") for f in clip]
    path = written(name, made, 25, codec=codec)
    found = displayed(path)
    assert len(found) == 9 and probe(path).fps == 25
    for shown, frame in zip(found, clip, strict=True):
        assert np.abs(shown[1].astype(int) - frame).mean() < 20


def test_names_are_not_protocols_or_patterns(written):
    path = written("%03d:concat|a.mp4", [QUADRANTS] * 2)
    assert probe(path).frames == 2


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"hello, world\n" * 100, "not media"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
            "not media",
        ),
        (b"\xff\xd8\xff\xe0" + b"\0" * 200, "cannot be decoded"),
    ],
)
def test_what_is_not_media_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(Refused) as refused:
        probe(path)
    assert refused.value.reason == reason


def test_missing_files_and_directories_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(Refused) as refused:
            probe(path)
        assert refused.value.reason == "cannot be read"


def test_an_mp4_without_its_index_is_truncated(written):
    path = written("cut.mp4", moving(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"moov") - 40])
    with pytest.raises(Refused) as refused:
        probe(path)
    assert refused.value.reason == "truncated"


def test_damage_ends_at_the_next_key_frame(written):
    path = written(
        "hole.mkv", moving(36, seed=3), times=[i / 25 for i in range(36)], codec="libx264"
    )
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    at, size, _ = spans[15]  # In the second of three groups of twelve.
    data[at + 8 : at + size] = bytes((b * 7 + 1) % 256 for b in range(size - 8))
    path.write_bytes(data)
    losses = Losses()
    found = list(pictures(path, losses=losses))
    times = [round(p.time * 25) for p in found]
    assert losses.errors and losses.notes()
    assert set(range(8)) | set(range(24, 36)) <= set(times) and 17 not in times
    assert [i for i, p in zip(times, found, strict=True) if p.after_gap] == [24]
    # The grid has no indices where frames are lost.
    kept = [k for k, _ in sampled(path)]
    assert kept == times


def test_configs_check_themselves():
    with pytest.raises(ValueError, match="'tone map' or 'refuse'"):
        DecodingConfig(hdr="maybe")
    with pytest.raises(ValueError, match="three numbers"):
        DecodingConfig(background=(0, 0, 256))
