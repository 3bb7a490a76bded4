"""What files carry beside plain pictures in order: alpha, fields, clocks; and disks that fail."""

import builtins
import errno
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from PIL import Image

from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig, examine, read_clip
from dit_jax.prepare.media import DecodingLog, Entry, pictures
from dit_jax.prepare.pixels import DecodingConfig
from tests.prepare.made_media import cropped, moving, probe

# Transparency.


@pytest.mark.parametrize("name", ["alpha_vp8.webm", "alpha_vp9.webm"])
def test_transparency_of_webm_stands_before_the_background(shared, name):
    path = shared(f"faults/{name}")
    for background in (None, (0, 200, 0)):
        decoding = DecodingConfig(**({"background": background} if background else {}))
        (clip,) = examine(path, ExamineConfig(decoding=decoding)).clips
        assert clip.rejection is None and (clip.frames, clip.scores["bars"]) == (49, 0.0)
        video = read_clip(path, clip, decoding)
        assert np.abs(video[0, 48, 20] - [255.0, 0, 0]).max() < 40
        assert np.abs(video[:, :16] - np.array(background or (255.0, 255, 255))).max() < 5


@pytest.mark.parametrize(
    "name, codec, kind",
    [
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.mkv", "ffv1", "gbrap14le"),
    ],
)
def test_transparency_of_other_codecs_stands_before_the_background(written, name, codec, kind):
    # A red disc before a ground that is transparent, and black beneath.
    y, x = np.mgrid[:64, :96]
    rgba = 255 * (np.hypot(x - 20, y - 32) < 14)[..., None] * np.array([1, 0, 0, 1], np.uint8)
    clip = [av.VideoFrame.from_ndarray(rgba.astype(np.uint8), "rgba").reformat(format=kind)] * 3
    path = written(name, clip, codec=codec)
    picture = next(pictures(path, DecodingConfig(background=(0, 0, 200))))
    shown, light = picture.pixels(), picture.lightness()
    assert np.abs(shown[2, 2] - [0.0, 0, 200]).max() <= 3
    assert np.abs(shown[32, 20] - [255.0, 0, 0]).max() <= 3
    assert abs(int(light[2, 2]) - 23) <= 3 and abs(int(light[32, 20]) - 76) <= 3


def test_transparency_of_hdr_stands_before_the_background(written):
    rgba = np.zeros((64, 96, 4), np.uint16)
    rgba[:, 48:] = (37000, 37000, 37000, 65535)  # PQ of about 203 cd/m2: diffuse white.
    frame = av.VideoFrame.from_ndarray(rgba, "rgba64le").reformat(format="yuva444p10le")
    tags = {"color_trc": 16, "color_primaries": 9, "colorspace": 9}
    for name, number in tags.items():
        setattr(frame, name, number)
    path = written("a.mkv", [frame], codec="ffv1", **tags)
    shown = next(pictures(path, DecodingConfig(background=(0, 200, 0)))).pixels()
    assert np.abs(shown[5, 5] - [0.0, 200, 0]).max() <= 1
    assert np.ptp(shown[5, 80].astype(int)) <= 3 and shown[5, 80, 0] > 180


# Interlaced pictures.


def marked(grey, first):
    """Luma uint8 [h, w] as a frame whose first field is marked: `tff`, `bff` or `prog`."""
    graph = Graph()
    size = {"width": grey.shape[1], "height": grey.shape[0]}
    source = graph.add_buffer(**size, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", first), graph.add("buffersink")).configure()
    graph.vpush(av.VideoFrame.from_ndarray(grey, "gray").reformat(format="yuv420p"))
    return graph.vpull()


def interlaced(written, name, count, first):
    """A file of a bar that moves 4 pixels a field, and what a camera would have seen at the time of
    each frame's first field: uint8 [t, h, w]."""
    seen = np.full((2 * count, 96, 128), 60, np.uint8)
    for i, frame in enumerate(seen):
        frame[:, 4 * i : 4 * i + 24] = 200
    frames = seen[::2].copy()
    if first != "prog":
        late = slice(1, None, 2) if first == "tff" else slice(0, None, 2)
        frames[:, late] = seen[1::2, late]
    options = {"crf": "4"} | ({} if first == "prog" else {"x264opts": f"{first}=1"})
    return written(name, [marked(grey, first) for grey in frames], options=options), seen[::2]


def errors(shown, seen):
    """Mean difference of luma from what the camera saw, by frame; combed it is over 4."""
    greens = [picture.pixels()[4:-4, :, 1].astype(float) for picture in shown]
    return [np.abs(a - b[4:-4]).mean() for a, b in zip(greens, seen, strict=True)]


def test_progressive_frames_stay_as_they_are(written, monkeypatch):
    path = written("a.mp4", moving(9), kind="yuv420p")
    monkeypatch.setattr("dit_jax.prepare.media._deinterlacer", None)  # And is not asked.
    with av.open(str(path)) as container:
        stored = [f.to_ndarray() for f in container.decode(video=0)]
    decoded = [p.frame.to_ndarray() for p in pictures(path)]
    assert all(map(np.array_equal, stored, decoded)) and len(decoded) == len(stored) == 9


def test_marks_that_change_in_the_middle_change_what_is_done(written, tmp_path):
    kinds = ("tff", "prog", "bff")
    parts = [interlaced(written, f"{first}.ts", 20, first) for first in kinds]
    path, log = tmp_path / "joined.ts", DecodingLog()
    path.write_bytes(b"".join(part.read_bytes() for part, _ in parts))
    assert max(errors(pictures(path, log=log), np.concatenate([parts[0][1]] * 3))) < 1.5
    assert log.deinterlaced == 40


def test_clips_of_interlaced_files_are_read_as_they_were_examined(written):
    options = {"x264opts": "tff=1", "g": "12", "crf": "10"}
    path = written("a.mp4", moving(80, speed=1), kind="yuv420p", options=options)
    report = examine(path, ExamineConfig(clips=ClipConfig(max_seconds=1.5)))
    whole = [p.pixels() for p in pictures(path)]
    assert "80 frames deinterlaced" in report.notes and len(report.clips) == 2
    assert (report.probe.fps, report.frames) == (25.0, 80)
    for clip in report.clips:
        expected = cropped(whole[clip.start : clip.start + clip.frames], clip.geometry.crop)
        assert np.array_equal(read_clip(path, clip), expected)


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
def test_clips_far_in_joined_files_are_entered_near_them(written, tmp_path, name, codec):
    parts, how = [], {"codec": codec, "kind": "yuv420p", "options": {"b": "2000000", "g": "10"}}
    for seed in (1, 2):
        clip = moving(100, 64, 96, seed, speed=1)
        parts.append(written(f"{seed}{name}", clip, **how).read_bytes())
    path = tmp_path / name
    path.write_bytes(b"".join(parts))
    report = examine(path, ExamineConfig(clips=ClipConfig(max_seconds=2.0, area=None)))
    assert report.frames == 200 and [clip.shot for clip in report.clips] == [0, 0, 1, 1]
    whole = [p.pixels() for p in pictures(path)]
    for clip in report.clips[1:]:
        first = clip.start - clip.shot  # One index is left out at a join.
        expected = cropped(whole[first : first + clip.frames], clip.geometry.crop)
        assert np.array_equal(read_clip(path, clip), expected)
    after = [sum(1 for _ in pictures(path, start=Entry(*c.entry))) for c in report.clips[2:]]
    assert after[0] == 100 and after[1] < 75


# Machines.


class Failing(io.FileIO):
    """A file whose disk does not answer after so many bytes."""

    left = 0.0

    def read(self, size=-1):
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return data


@pytest.mark.parametrize(
    "name, part", [("a.mp4", 0.0), ("a.mp4", 0.5), ("a.ts", 0.5), ("a.png", 0.5)]
)
def test_a_disk_that_fails_is_not_damage(written, tmp_path, monkeypatch, name, part):
    path = tmp_path / name
    if name == "a.png":
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(noise).save(path)
    else:
        written(name, moving(40, 144, 192), kind="yuv420p", options={"crf": "1"})
    assert examine(path).refusal is None
    limit, whole = part * path.stat().st_size, builtins.open

    def failing(file, *args, **kwargs):
        if str(file) != str(path):
            return whole(file, *args, **kwargs)
        opened = Failing(file)
        opened.left = limit
        return opened

    monkeypatch.setattr(builtins, "open", failing)
    refusal = examine(path).refusal
    assert refusal is not None and refusal[0] == "cannot be read"


def test_a_decoder_without_memory_is_not_damage(written, monkeypatch):
    class Poor:
        name = "h264"

        def decode(self, packet):
            raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    path = written("a.mp4", moving(30))
    monkeypatch.setattr("dit_jax.prepare.media._decoder", lambda stream: Poor())
    assert examine(path).refusal == ("out of memory", "while it was decoded")
