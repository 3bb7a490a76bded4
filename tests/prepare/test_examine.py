"""A file examined, and its clips read again: the same frames, in the shape that was promised."""

import itertools
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig, examine, read_clip
from dit_jax.prepare.measuring import FilterConfig
from dit_jax.prepare.media import sampled
from dit_jax.prepare.refusals import REASONS
from tests.prepare.made_media import cropped, moving


def expected_frames(path, clip):
    """The clip by decoding the whole file and cutting afterwards."""
    span = range(clip.start, clip.start + clip.frames)
    size = clip.geometry.scaled_height, clip.geometry.scaled_width
    frames = (p.pixels(*size) for k, p in sampled(path, clip.fps) if k in span)
    return cropped(frames, clip.geometry.crop)


def test_a_file_of_three_shots(written):
    parts = [moving(n, seed=n, speed=1) for n in (30, 5, 40)]
    path = written("three.mp4", [frame for part in parts for frame in part], 25)
    clips = ClipConfig(min_seconds=0.4, max_seconds=1.0, stride=4, multiple=8)
    report = examine(path, ExamineConfig(clips=clips))
    assert pickle.loads(pickle.dumps(report)) == report
    assert report.refusal is None and report.frames == 75 and report.notes == ()
    assert report.shots == ((0, 30), (30, 35), (35, 75))
    assert report.probe is not None and report.probe.fps == 25
    kept = [clip for clip in report.clips if clip.rejection is None]
    assert [(c.shot, c.start, c.frames) for c in kept] == [
        (0, 1, 13),
        (0, 16, 13),
        (2, 36, 17),
        (2, 56, 17),
    ]
    (short,) = [clip for clip in report.clips if clip.rejection]
    assert short.shot == 1 and str(short.rejection) == "duration: 0.2, bound 0.4"
    for clip in kept:
        assert clip.begin == pytest.approx(clip.start / 25) and clip.seconds == clip.frames / 25
        assert set(clip.scores) == set("black sharpness change motion side aspect bars".split())
        thumbnail = cv2.imdecode(np.frombuffer(clip.thumbnail, np.uint8), cv2.IMREAD_COLOR)
        assert thumbnail.shape == (96, 128, 3)
        pixels = read_clip(path, clip)
        assert pixels.shape == (clip.frames, 96, 128, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, expected_frames(path, clip))


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.gif", {"codec": "gif", "kind": "rgb8"}),
        ("vfr.mkv", {"times": np.cumsum(np.random.default_rng(0).uniform(0.02, 0.06, 60))}),
    ],
)
def test_clips_are_read_as_they_were_examined(written, name, options):
    path = written(name, moving(60, seed=4), **{"kind": "yuv420p", **options})
    config = ExamineConfig(clips=ClipConfig(0.4, 0.6, area=80 * 80, multiple=8))
    report = examine(path, config)
    assert len(report.clips) >= 3
    for clip in report.clips[:2] + report.clips[-1:]:
        assert clip.geometry is not None and clip.geometry.crop.height == 64
        assert np.array_equal(read_clip(path, clip), expected_frames(path, clip))


def test_a_lower_rate_takes_every_second_frame(written):
    path = written("a.mp4", moving(50, seed=2), 50)
    report = examine(path, ExamineConfig(clips=ClipConfig(0.4, 5, fps=25.0, multiple=8)))
    (clip,) = report.clips
    assert report.frames == 25 and clip.fps == 25 and clip.frames == 25
    whole = [p.pixels() for _, p in sampled(path)]
    assert np.array_equal(read_clip(path, clip), np.stack(whole[::2]))
    # A lower rate than that is kept.
    slow = examine(path, ExamineConfig(clips=ClipConfig(0.4, 5, fps=60.0)))
    assert slow.clips[0].fps == 50


@pytest.mark.parametrize(
    "frames, reason",
    [
        (np.zeros((30, 96, 128, 3), np.uint8), "black"),
        (moving(1, seed=3).repeat(30, 0), "static"),
        (np.stack([cv2.GaussianBlur(f, (0, 0), 9) for f in moving(30)]), "blur"),
        (moving(30, 40, 56), "resolution"),
        (moving(30, 64, 400), "aspect ratio"),
    ],
)
def test_bad_clips_are_rejected_with_their_reason(written, frames, reason):
    path = written("a.mp4", frames, 25)
    (clip,) = examine(path).clips
    assert clip.rejection is not None and clip.rejection.reason == reason
    loose = ExamineConfig(filters=FilterConfig(*[None] * 7), clips=ClipConfig(multiple=8))
    assert examine(path, loose).clips[0].rejection is None


def test_bars_are_cropped(written):
    clip = np.pad(moving(30, seed=5), ((0, 0), (32, 32), (0, 0), (0, 0)))
    path = written("bars.mp4", clip, 25)
    (clip,) = examine(path).clips
    assert clip.rejection is None and clip.scores["bars"] == pytest.approx(0.4, abs=0.02)
    assert clip.geometry is not None and clip.geometry.source.height == 96
    assert read_clip(path, clip).min(axis=(0, 2, 3)).mean() > 20
    (whole,) = examine(path, ExamineConfig(filters=FilterConfig(crop_bars=False))).clips
    assert whole.geometry is not None and whole.geometry.crop.height == 160


def test_another_file_in_its_place_is_not_read(written):
    (clip,) = examine(written("a.mp4", moving(30, seed=1))).clips
    with pytest.raises(Exception, match="not as examined"):
        read_clip(written("a.mp4", moving(30, seed=2)), clip)


def test_random_damage_is_never_a_fault_of_ours(written, tmp_path):
    rng, clip = np.random.default_rng(0), moving(12, 48, 64)
    whole = [written("a.mp4", clip), written("a.webm", clip, codec="libvpx-vp9")]
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.tif"):
        whole.append(tmp_path / name)
        first, *others = [Image.fromarray(frame) for frame in clip]
        moves = {"append_images": others, "save_all": True} if name in ("a.gif", "a.webp") else {}
        first.save(whole[-1], **moves)
    damaged = []
    for path, n in itertools.product(whole, range(6)):
        data = bytearray(path.read_bytes())
        data = data[: rng.integers(1, len(data) + 1)] if n % 2 else data
        for _ in range(rng.integers(1, 30)):
            data[rng.integers(len(data))] = rng.integers(256)
        damaged.append(tmp_path / f"{n}{path.name}")
        damaged[-1].write_bytes(data)
    for path in damaged:
        report = examine(path)
        assert bool(report.refusal) != bool(report.clips), path
        assert not report.refusal or report.refusal[0] in {*REASONS} - {"failed"}, path
