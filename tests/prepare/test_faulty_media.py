"""What files carry beside plain pictures in order: alpha, fields, clocks; and disks that fail."""

import builtins
import errno
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from made_media import cropped, moving, probe

from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig, examine, read_clip
from dit_jax.prepare.media import DecodingLog, Entry, pictures
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import MACHINE_REASONS, REASONS


def write(path, frames, codec="libx264", fps=25, container=None, **options):
    """Writes `av.VideoFrame`s, or uint8 RGB [t, h, w, 3], to a file."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, fps, options=options)
        for i, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p")
            if not i:
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = frame.format.name
            frame.pts, frame.time_base = i, 1 / Fraction(fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


# Transparency.


def disc(i):
    """A red disc before a ground that is transparent, and black beneath: uint8 [64, 96, 4]."""
    y, x = np.mgrid[:64, :96]
    inside = np.hypot(x - 20 - 2 * i, y - 32) < 14
    return np.stack([255 * inside, 0 * inside, 0 * inside, 255 * inside], -1).astype(np.uint8)


@pytest.mark.parametrize("name", ["alpha_vp8.webm", "alpha_vp9.webm"])
def test_transparency_of_webm_stands_before_the_background(shared, name):
    path = shared(f"faults/{name}")
    (clip,) = examine(path).clips
    assert clip.rejection is None and (clip.frames, clip.scores["bars"]) == (49, 0.0)
    video = read_clip(path, clip)
    assert np.abs(video[0, 48, 20] - [255.0, 0, 0]).max() < 40
    assert video[:, :16].min() > 250  # The default background, white.
    green = DecodingConfig(background=(0, 200, 0))
    (clip,) = examine(path, ExamineConfig(decoding=green)).clips
    assert np.abs(read_clip(path, clip, green)[:, :16] - [0.0, 200, 0]).max() < 5


@pytest.mark.parametrize(
    "name, codec, pixel_format",
    [
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "png", "rgba"),
        ("a.mov", "qtrle", "argb"),
        ("a.avi", "utvideo", "gbrap"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.mkv", "ffv1", "gbrap14le"),
        ("a.mov", "cfhd", "gbrap12le"),
    ],
)
def test_transparency_of_other_codecs_stands_before_the_background(
    tmp_path, name, codec, pixel_format
):
    clip = [av.VideoFrame.from_ndarray(disc(i), "rgba") for i in range(3)]
    path = write(tmp_path / name, [f.reformat(format=pixel_format) for f in clip], codec)
    picture = next(pictures(path, DecodingConfig(background=(0, 0, 200))))
    shown, light = picture.pixels(), picture.lightness()
    assert np.abs(shown[2, 2] - [0.0, 0, 200]).max() <= 3
    assert np.abs(shown[32, 20] - [255.0, 0, 0]).max() <= 3
    assert abs(int(light[2, 2]) - 23) <= 3 and abs(int(light[32, 20]) - 76) <= 3


def test_transparency_of_hdr_stands_before_the_background(tmp_path):
    rgba = np.zeros((64, 96, 4), np.uint16)
    rgba[:, 48:] = (37000, 37000, 37000, 65535)  # PQ of about 203 cd/m2: diffuse white.
    frame = av.VideoFrame.from_ndarray(rgba, "rgba64le").reformat(format="yuva444p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace = 16, 9, 9
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", 25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuva444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = 16, 9, 9
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    shown = next(pictures(path, DecodingConfig(background=(0, 200, 0)))).pixels()
    assert np.abs(shown[5, 5] - [0.0, 200, 0]).max() <= 1
    assert np.ptp(shown[5, 80].astype(int)) <= 3 and shown[5, 80, 0] > 180


# Interlaced pictures.


def woven(count, top_first, height=96, width=128):
    """Interlaced frames of a bar that moves 4 pixels a field, with what a camera would have seen at
    the time of each frame's first field: two lists of uint8 [h, w]."""
    seen = np.full((2 * count, height, width), 60, np.uint8)
    for i, frame in enumerate(seen):
        frame[:, 4 * i : 4 * i + 24] = 200
    frames = seen[::2].copy()
    late = slice(1, None, 2) if top_first else slice(0, None, 2)
    frames[:, late] = seen[1::2, late]
    return list(frames), list(seen[::2])


def interlaced(path, count, first="tff"):
    frames, seen = woven(count, first == "tff")
    if first == "prog":
        return write(path, [marked(grey, first) for grey in seen], crf="4"), seen
    made = [marked(grey, first) for grey in frames]
    return write(path, made, crf="4", x264opts=f"{first}=1"), seen


def marked(grey, first):
    """Luma uint8 [h, w] as a frame whose first field is marked: `tff`, `bff` or `prog`."""
    graph = Graph()
    size = {"width": grey.shape[1], "height": grey.shape[0]}
    source = graph.add_buffer(**size, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", first), graph.add("buffersink")).configure()
    graph.vpush(av.VideoFrame.from_ndarray(grey, "gray").reformat(format="yuv420p"))
    return graph.vpull()


def error(path, seen):
    """Mean difference of luma from what the camera saw, by frame."""
    shown = [p.pixels()[..., 1].astype(float) for p in pictures(path)]
    assert len(shown) == len(seen)
    return [np.abs(a[4:-4] - b[4:-4]).mean() for a, b in zip(shown, seen, strict=True)]


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_frames_are_deinterlaced_and_counted(tmp_path, first):
    path, seen = interlaced(tmp_path / "a.mp4", 12, first)
    assert max(error(path, seen)) < 1.5  # Combed it is over 4.
    report = examine(path)
    assert "12 frames deinterlaced" in report.notes
    assert (report.probe.fps, report.frames) == (25.0, 12)


def test_a_shared_interlaced_file_has_no_combs(shared):
    path = shared("faults/interlaced.mp4")
    combs = []
    for picture in pictures(path):
        grey = picture.lightness().astype(int)
        between = (grey[1:-1] - grey[:-2]) * (grey[1:-1] - grey[2:])
        combs.append((between > 400).mean())
    assert len(combs) == 50 and np.mean(combs) < 0.03  # Stored it is 0.1.
    assert "50 frames deinterlaced" in examine(path).notes


def test_progressive_frames_stay_as_they_are(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", moving(9))
    before = [p.pixels() for p in pictures(path)]
    monkeypatch.setattr("dit_jax.prepare.media._deinterlacer", None)  # And is not asked.
    with av.open(str(path)) as container:
        stored = [f.to_ndarray() for f in container.decode(video=0)]
    decoded = [p.frame.to_ndarray() for p in pictures(path)]
    assert all(map(np.array_equal, stored, decoded)) and len(before) == len(stored) == 9


def test_marks_that_change_in_the_middle_change_what_is_done(tmp_path):
    parts = [interlaced(tmp_path / f"{first}.ts", 20, first) for first in ("tff", "prog", "bff")]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part, _ in parts))
    log = DecodingLog()
    shown = [p.pixels()[..., 1].astype(float) for p in pictures(path, log=log)]
    assert log.deinterlaced == 40 and len(shown) == 60
    seen = parts[0][1] * 3
    assert max(np.abs(a[4:-4] - b[4:-4]).mean() for a, b in zip(shown, seen, strict=True)) < 1.5


def test_clips_of_interlaced_files_are_read_as_they_were_examined(tmp_path):
    frames = [av.VideoFrame.from_ndarray(f, "rgb24") for f in moving(80, speed=1)]
    made = [f.reformat(format="yuv420p") for f in frames]
    path = write(tmp_path / "a.mp4", made, x264opts="tff=1", g="12", crf="10")
    config = ExamineConfig(clips=ClipConfig(max_seconds=1.5))
    clip = examine(path, config).clips[-1]
    whole = [p.pixels() for p in pictures(path)]
    assert clip.start > 30
    expected = whole[clip.start : clip.start + clip.frames]
    assert np.array_equal(read_clip(path, clip), np.stack(expected))


# Time stamps that begin anew.


@pytest.mark.parametrize("fps", [None, 7.0])
def test_stamps_that_begin_anew_begin_a_run(shared, fps):
    path = shared("faults/two_parts.ts")
    found = probe(path)
    assert (found.frames, found.fps) == (100, 25.0)
    report = examine(path, ExamineConfig(clips=ClipConfig(fps=fps)))
    one, two = report.shots
    assert one[1] < two[0] and sum(stop - start for start, stop in report.shots) == report.frames
    assert fps or (report.frames, one, two) == (100, (0, 50), (51, 101))
    assert "time stamps begin anew: 2 parts" in report.notes
    decoded = [(p.time, p.pixels()) for p in pictures(path)]
    assert len(decoded) == 100
    for clip in report.clips:
        times = clip.begin + np.arange(clip.frames) / clip.fps
        nearest = [min(decoded, key=lambda one: abs(one[0] - t))[1] for t in times]
        assert np.array_equal(read_clip(path, clip), cropped(nearest, clip.geometry.crop))


@pytest.mark.parametrize("name, codec", [("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_clips_far_in_joined_files_are_entered_near_them(tmp_path, name, codec):
    parts = []
    for seed in (1, 2, 3):
        clip = moving(100, 64, 96, seed, speed=1)
        options = {"b": "2000000", "g": "10"}
        parts.append(write(tmp_path / f"{seed}{name}", clip, codec, **options).read_bytes())
    path = tmp_path / name
    path.write_bytes(b"".join(parts))
    config = ExamineConfig(clips=ClipConfig(max_seconds=2.0, area=None))
    report = examine(path, config)
    assert report.frames == 300 and len(report.shots) == 3
    assert [clip.shot for clip in report.clips] == [0, 0, 1, 1, 2, 2]
    whole = [p.pixels() for p in pictures(path)]
    after = []
    for clip in report.clips:
        first = clip.start - clip.shot  # One index is left out at a join.
        expected = cropped(whole[first : first + clip.frames], clip.geometry.crop)
        assert np.array_equal(read_clip(path, clip), expected)
        after.append(sum(1 for _ in pictures(path, start=Entry(*clip.entry))))
    assert after[4] == 100 and after[5] < 75


# Machines.


def test_reasons_of_the_machine_are_reasons():
    assert MACHINE_REASONS < set(REASONS) and "cannot be decoded" not in MACHINE_REASONS


class Failing:
    """A file whose disk does not answer after so many bytes."""

    def __init__(self, file, limit):
        self._file, self._left = file, limit

    def read(self, size=-1):
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.png"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_disk_that_fails_is_not_damage(tmp_path, monkeypatch, name, part):
    path = tmp_path / name
    if name == "a.png":
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(noise).save(path)
    else:
        write(path, moving(100, 144, 192), crf="1")
    assert examine(path).refusal is None
    limit, whole = part * path.stat().st_size, builtins.open

    def failing(file, *args, **kwargs):
        opened = whole(file, *args, **kwargs)
        return Failing(opened, limit) if str(file) == str(path) else opened

    monkeypatch.setattr(builtins, "open", failing)
    refusal = examine(path).refusal
    assert refusal is not None and refusal[0] == "cannot be read"


def test_a_decoder_without_memory_is_not_damage(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", moving(30))

    class Poor:
        name = "h264"

        def decode(self, packet):
            raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("dit_jax.prepare.media._decoder", lambda stream: Poor())
    assert examine(path).refusal == ("out of memory", "while it was decoded")
