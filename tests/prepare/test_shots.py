"""Cuts where clips were joined and nowhere else, in made clips and in real ones."""

import cv2
import numpy as np
import pytest

from dit_jax.prepare.measuring import small_frame
from dit_jax.prepare.media import sampled
from dit_jax.prepare.shots import ShotConfig, shot_cuts
from tests.prepare.made_media import moving
from tests.scripts import load_script

SHAKEN = np.random.default_rng(0).integers(0, 40, (40, 2))
PANNED = [(0, x) for x in [0] * 15 + [9 * i for i in range(15)] + [126] * 15]


def light(*clips):
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for clip in clips for frame in clip]


def shots(*lengths, speed=1):
    return [moving(n, seed=n, speed=speed) for n in lengths]


def views(scene, places):
    return [[scene[0, y : y + 96, x : x + 128] for y, x in places]]


@pytest.mark.parametrize(
    "clips, cuts",
    [
        (shots(20, 7, 33, 12), [20, 27, 60]),
        (shots(20), []),
        ([], []),
        *((shots(first, 21 - first), [first]) for first in (1, 2, 3, 17, 18, 19)),  # Near the ends.
        *((shots(20, count, 25, speed=3), [20, 20 + count]) for count in (3, 4, 6)),
        ([moving(40, seed=5, speed=9)], []),
        (views(moving(1, 140, 180, seed=6), SHAKEN), []),
        (views(moving(1, 96, 400, seed=8), PANNED), []),  # A camera that stands, then pans.
        # From fast motion to rest.
        ([moving(20, seed=5, speed=9), moving(20, seed=6, speed=1)], [20]),
        ([moving(20, seed=6, speed=1), moving(20, seed=5, speed=9)], [20]),
        ([moving(20, seed=5, speed=9), moving(20, seed=7, speed=7)], [20]),
    ],
)
def test_cuts_are_at_the_joints_of_made_clips(clips, cuts):
    assert shot_cuts(light(*clips)) == cuts


@pytest.mark.parametrize("count", [1, 2])
def test_flashes_are_no_cuts_and_hide_none(count):
    parts = moving(30, seed=1, speed=1), moving(30, seed=2, speed=1)
    for first in (10, 30 - 4 - count, 34):
        frames = np.concatenate(parts)
        frames[first : first + count] = np.minimum(frames[first : first + count] + 110.0, 255)
        assert shot_cuts(light(frames)) == [30], first


# A fade from flat black; a camera that shakes; drawings that dance. Looked at frame by frame: a cut at
# 202 in the one, to black at 180 in the other; the dissolve around 140 and the drawings of the
# countdown are none.
CUTS = {
    "odd_media/androidx__h265_bframes.mp4": [],
    "odd_media/androidx__sample-with-large-length.avi": [],
    "odd_media/moviepy__pigs_in_a_polka.gif": [],
    "clips/torchcodec__nasa_13013.mp4": [202],
    "clips/ffmpeg-python__in.mp4": [180],
}


@pytest.mark.parametrize("name", CUTS)
def test_none_is_invented_in_real_media(shared, name):
    assert shot_cuts([small_frame(p) for _, p in sampled(shared(name))]) == CUTS[name]


def test_joins_of_real_clips_are_found_and_nothing_else(shared):
    script = load_script("benchmarks", "cuts")
    names = ["again.mkv", "eat.mkv", "mediapy__video.mp4", "moviepy__chaplin.mp4"]
    names += ["ffmpeg-python__in.mp4", "torchcodec__nasa_13013.mp4"]
    clips = {name: script.read_shots(shared(f"clips/{name}")) for name in names}
    ways, totals = ("anywhere", "motion", "short", "flash"), np.zeros(3, int)
    for _, _, frames, cuts in script.joins(clips, 0, ways):
        totals += (len(cuts), *script.matched(cuts, shot_cuts(frames)))
    cuts, found, invented = totals
    assert cuts == 150 and found >= 0.98 * cuts and invented <= 1


def test_held_drawings_that_move_are_no_cuts_but_slides_are():
    page = np.full((72, 96), 200, np.uint8)
    cv2.circle(page, (48, 36), 28, 20, 2)
    cv2.line(page, (0, 36), (95, 36), 20, 2)
    drawings = []
    for i in range(8):
        drawing = page.copy()
        drawing[:, : 12 * i] = (drawing[:, : 12 * i] * 0.6).astype(np.uint8)
        drawings += [drawing] * 6
    assert shot_cuts(drawings) == []
    slides = [np.roll(light(moving(1, seed=s))[0], 5 * s, (0, 1)) for s in range(4)]
    assert shot_cuts([slide for slide in slides for _ in range(9)]) == [9, 18, 27]


def test_black_is_cut_off_on_both_sides():
    clip, after = moving(30, seed=8, speed=1), moving(20, seed=9, speed=1)
    down = np.concatenate([np.ones(10), np.linspace(1, 0, 20)])[:, None, None, None]
    frames = light((clip * down).astype(np.uint8), np.zeros((8, 96, 128, 3), np.uint8), after)
    begins, ends = shot_cuts(frames)
    assert 26 <= begins <= 30 and ends == 38
    assert shot_cuts(frames, config=ShotConfig(black=None)) == [38]


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"ratio": np.nan}, {"change": np.nan}])
def test_configs_check_themselves(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        ShotConfig(**wrong)
