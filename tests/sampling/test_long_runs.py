"""Options of long clips: what contradicts, and which windows they mean."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_jax.codec.codec import PixelCodec
from dit_jax.model import PatchConfig
from dit_jax.sampling import Request, SamplingConfig, Space, Storyboard
from dit_jax.sampling.long_plan import LongArguments, make_long_plan
from dit_jax.sampling.requested import ModeArguments


def plan(frames: int = 9, fps: float = 8.0, stride: int = 1, **given: Any) -> Any:
    codec = dataclasses.replace(PixelCodec(), strides=(stride, 1, 1))
    config: Any = types.SimpleNamespace(sampling=SamplingConfig(frames=frames, fps=fps))
    patch = PatchConfig(t=2 if stride == 1 else 1, h=2, w=2, channels=3)
    begun = given.pop("begun", None)
    more = {} if begun is None else {"begun": begun, "context": given.pop("context", None)}
    return make_long_plan(LongArguments(**given), config, Space(codec, patch), fps, **more)


def test_lengths_become_windows_of_the_frames_that_are_set():
    found = plan(long="4s")
    assert found.frames == 32
    assert [(w.start, w.length, w.history) for w in found.windows] == [
        (0, 9, 0), (6, 9, 3), (12, 9, 3), (18, 9, 3), (24, 9, 3),
    ]  # fmt: skip
    assert plan(long="33").frames == 33 and len(plan(long="33").windows) == 5
    assert {w.history for w in plan(long="4s", history="0.6s").windows[1:]} == {5}
    assert len(plan(long="5").windows) == 1


def test_a_codec_of_video_has_latents_for_the_last_frame():
    found = plan(frames=17, stride=4, long="34")
    # 17 frames are 5 latents; 34 frames need 1 + 9 of them.
    assert found.windows[0].length == 5 and found.windows[-1].stop >= 10
    assert found.windows[-2].stop < 10 and found.windows[1].history == 2


def test_each_clip_has_the_storyboards_prompts_or_keeps_its_own():
    likes = [Request("one", 9, 4, 4, 8.0, 0), Request("two", 9, 4, 4, 8.0, 1)]
    found = plan(long="2s")
    kept = found.requests(likes, None, 8.0)
    assert [{r.prompt for r in clip} for clip in kept] == [{"one"}, {"two"}]
    told = found.requests(likes, Storyboard((0.0, 1.0), ("a", "b")), 8.0)
    assert [[r.prompt for r in clip] for clip in told] == [["a", "b", "b"]] * 2
    assert len({r.seed for clip in told for r in clip}) == 6
    # Middles of new frames: at 0.5, 1.44 and 2.19 s.
    for times, unused in (((0.0, 0.2), "0 s"), ((0.0, 1.0, 1.2), "1 s"), ((0.0, 9.0), "9 s")):
        with pytest.raises(ValueError, match=f"prompt at {unused} is in force in no window"):
            found.requests(likes, Storyboard(times, tuple("abc"[: len(times)])), 8.0)


@pytest.mark.parametrize(
    ("given", "mode", "message"),
    [
        ({"storyboard": "a.txt"}, {}, "--storyboard says something of --long"),
        ({"history": "1s"}, {}, "--history says something of --long"),
        ({"history_noise": 0.1}, {}, "--history-noise says something of --long"),
        ({"long": "soon"}, {}, "--long soon: give seconds"),
        ({"long": "9s", "history": "x"}, {}, "--history x: give seconds"),
        ({"long": "9s"}, {"loop": True}, "--long and --loop"),
        ({"long": "9s"}, {"video": "a.mp4"}, "--long and --video"),
        ({"long": "9s"}, {"connect": ("a", "b")}, "--long and --connect"),
        ({"long": "9s"}, {"image": "a", "last_image": "b"}, "pictures that are not the first"),
        ({"long": "9s"}, {"keyframe": ("1s=b",)}, "pictures that are not the first"),
        ({"long": "9s"}, {"extend": "a", "forward": "1s"}, "--long and --forward"),
        ({"long": "9s"}, {"extend": "a", "backward": "1s"}, "--long and --backward"),
        ({"long": "9s"}, {"image": "a", "given_noise": 0.1}, "--history-noise is that"),
        ({"long": "9s"}, {"duration": "2s"}, "--long 9s and --duration 2s both say how long"),
        ({"long": "9s", "history_noise": 2.0}, {}, "--history-noise 2.0"),
        ({"long": "9s", "storyboard": "a.txt"}, {}, "--storyboard has the prompts"),
    ],
)
def test_options_that_contradict_are_refused(
    given: dict[str, Any], mode: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        LongArguments(**given).check(ModeArguments(**mode), 1, False)


def test_what_goes_together_is_taken(tmp_path: Path):
    (tmp_path / "a.txt").write_text("0s: a\n")
    given = LongArguments(long="9s", storyboard=str(tmp_path / "a.txt"))
    given.check(ModeArguments(negative_prompt="blurred"), 0, False)
    assert given.board() == Storyboard((0.0,), ("a",))
    LongArguments().check(ModeArguments(loop=True), 3, True)
    assert LongArguments(long="9s").board() is None


def test_a_history_that_fills_the_window_is_refused():
    with pytest.raises(ValueError, match="--history 2s is 17 frames of windows of 9"):
        plan(long="9s", history="2s")


def numbered(first: int, count: int) -> np.ndarray:
    """Frames that show their number."""
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)


@pytest.mark.parametrize(
    ("count", "context", "used"), [(1, None, 1), (2, None, 1), (12, None, 3), (12, 5, 5)]
)
def test_a_long_clip_goes_on_from_what_it_begins_with(count: int, context: Any, used: int):
    """Of 30 frames, the first of which are given: all are there once, and the given ones untouched."""
    found = plan(long="30", begun=numbered(0, count), context=context)
    assert (found.context, found.before, found.decoded) == (used, count - used, 30 - count + used)
    assert found.windows[-2].stop < found.decoded <= found.windows[-1].stop
    space = Space(PixelCodec(), PatchConfig(t=2, h=1, w=1, channels=3))
    heads = found.heads(space, 2)
    assert heads is not None and len(heads) == 2 and len(heads[0]) == used
    np.testing.assert_array_equal(heads[0], space.encode(numbered(count - used, used)))
    # Decoded in parts, of which the first may lie within what was given.
    made = 100 + numbered(0, found.decoded)
    parts = list(found.whole(iter([made[:1], made[1:4], made[4:]])))
    shown = np.concatenate(parts)[:, 0, 0, 0].tolist()
    assert shown == [*range(count), *range(100 + used, 100 + found.decoded)] and len(shown) == 30
    assert all(len(part) for part in parts)


def test_a_storyboard_begins_with_the_clip_that_is_gone_on_with():
    likes = [Request("", 9, 4, 4, 8.0, 0)]
    board = Storyboard((0.0, 2.0), ("a", "b"))
    prompts = [
        [r.prompt for r in found.requests(likes, board, 8.0)[0]]
        for found in (plan(long="4s"), plan(long="4s", begun=numbered(0, 9)))
    ]
    # Frames 0 to 5 come before the windows: their middles lie 0.75 s later.
    assert prompts == [["a", "a", "b", "b", "b"], ["a", "b", "b", "b"]]


def test_a_first_windows_prompt_is_that_of_its_new_frames():
    """Of a clip of nine frames, seven of which it is given: new ones from 1.1 s on."""
    found = plan(long="4s", begun=numbered(0, 9), context=7)
    likes, board = [Request("", 9, 4, 4, 8.0, 0)], Storyboard((0.0, 1.0), ("a", "b"))
    assert {r.prompt for r in found.requests(likes, board, 8.0)[0]} == {"b"}
    # What is said of frames that are given is not asked for again, and of others still is.
    with pytest.raises(ValueError, match="prompt at 1.125 s is in force in no window"):
        found.requests(likes, Storyboard((0.0, 1.125, 1.15), ("a", "b", "c")), 8.0)


def test_windows_of_one_token_are_refused_in_frames():
    with pytest.raises(ValueError, match="windows of 1 frames have no room.*at least 5"):
        plan(frames=1, stride=4, long="9s")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"long": "1s"}, "--long 1s is 8 frames, and the clip that it begins with has 8"),
        ({"long": "9s", "context": 9}, "--context is 9 frames, and the clip has 8"),
        ({"long": "9s", "context": 5, "frames": 5}, "--context is 5 frames of windows of 5"),
    ],
)
def test_beginnings_that_leave_nothing_to_make_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(begun=numbered(0, 8), **given)
