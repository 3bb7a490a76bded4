"""Lengths and sizes of clips by hand, and what must hold for all of them."""

import itertools

import pytest

from dit_jax.prepare.clips import ClipConfig, Geometry, Rect, bounds, fit, spans


def whole(height, width):
    return Rect(0, 0, height, width)


def test_a_shot_is_one_clip_or_split_evenly():
    config = ClipConfig(min_seconds=1, max_seconds=4, stride=4)
    assert bounds(25.0, config) == (25, 97)
    assert spans(24, 25.0, config) == []
    assert spans(25, 25.0, config) == [(0, 25)]
    assert spans(31, 25.0, config) == [(1, 29)]
    assert spans(100, 25.0, config) == [(1, 97)]
    assert spans(110, 25.0, config) == [(1, 53), (56, 53)]
    assert spans(30, 30.0, ClipConfig()) == [(0, 29)]  # A second, less what a stride leaves.


@pytest.mark.parametrize("stride, fps", [(1, 24.0), (8, 60.0)])
def test_clips_of_any_shot_keep_the_rules(stride, fps):
    config = ClipConfig(min_seconds=0.5, max_seconds=2, stride=stride)
    shortest, longest = bounds(fps, config)
    for count in range(1, 400):
        found = spans(count, fps, config)
        assert bool(found) == (count >= shortest)
        assert len({length for _, length in found}) <= 1
        for (start, length), after in itertools.pairwise([*found, (count, 0)]):
            assert shortest <= length <= longest and (length - 1) % stride == 0
            assert 0 <= start and start + length <= after[0]
        # Nothing is lost but what a stride leaves of each clip.
        assert not found or count - sum(n for _, n in found) < stride * len(found)


def test_pictures_are_kept_shrunk_or_cropped():
    config = ClipConfig(area=256 * 256, multiple=16)
    assert fit(240, 250, whole(240, 250), config) == Geometry(
        240, 250, Rect(0, 5, 240, 240), Rect(0, 5, 240, 240)
    )
    found = fit(720, 1280, whole(720, 1280), config)
    assert found == Geometry(192, 341, Rect(0, 2, 192, 336), Rect(0, 8, 720, 1261))
    # 4:3 shrinks to a multiple of itself, and nothing is cropped.
    assert fit(480, 640, whole(480, 640), ClipConfig(area=512 * 512)) == Geometry(
        432, 576, Rect(0, 0, 432, 576), whole(480, 640)
    )
    assert fit(1080, 1920, whole(1080, 1920), ClipConfig(area=None)) == Geometry(
        1080, 1920, Rect(4, 0, 1072, 1920), Rect(4, 0, 1072, 1920)
    )
    assert fit(15, 400, whole(15, 400), config) is None


def test_bars_are_outside_of_what_is_kept():
    bars = Rect(45, 0, 270, 640)
    found = fit(360, 640, bars, ClipConfig(area=None, multiple=8))
    assert found.crop == Rect(48, 0, 264, 640)
    shrunk = fit(360, 640, bars, ClipConfig(area=100_000, multiple=8))
    top, bottom = (x * shrunk.scaled_height / 360 for x in (45, 315))
    assert top - 0.5 <= shrunk.crop.top and shrunk.crop.top + shrunk.crop.height <= bottom + 0.5


@pytest.mark.parametrize("multiple", [1, 16])
def test_sizes_keep_the_rules(multiple):
    config = ClipConfig(area=100_000, multiple=multiple)
    for height, width in itertools.product((97, 180, 333, 720, 1081), (101, 320, 641, 1920)):
        found = fit(height, width, whole(height, width), config)
        crop = found.crop
        assert crop.height * crop.width <= 100_000
        assert crop.height % multiple == crop.width % multiple == 0
        assert 0 <= crop.top and crop.top + crop.height <= found.scaled_height <= height
        assert 0 <= crop.left and crop.left + crop.width <= found.scaled_width <= width
        # The shape of pixels is kept, to the rounding of a pixel.
        assert abs(found.scaled_height * width - found.scaled_width * height) <= max(height, width)


@pytest.mark.parametrize(
    "wrong",
    [{"min_seconds": 0}, {"min_seconds": 3, "max_seconds": 2}, {"stride": 0}, {"area": 255}],
)
def test_configs_check_themselves(wrong):
    with pytest.raises(ValueError):
        ClipConfig(**wrong)
