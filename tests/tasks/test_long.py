"""Options of long clips: what contradicts, and which windows they mean."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from dit_jax.models import PatchConfig, PixelCodec
from dit_jax.sampling import Request, SamplingConfig, Space, Storyboard
from dit_jax.tasks import LongArguments, ModeArguments, make_long_plan


def plan(frames: int = 9, fps: float = 8.0, stride: int = 1, **given: Any) -> Any:
    codec = dataclasses.replace(PixelCodec(), strides=(stride, 1, 1))
    config: Any = types.SimpleNamespace(sampling=SamplingConfig(frames=frames, fps=fps))
    patch = PatchConfig(t=2 if stride == 1 else 1, h=2, w=2, channels=3)
    return make_long_plan(LongArguments(**given), config, Space(codec, patch))


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
    kept = found.requests(likes, None)
    assert [{r.prompt for r in clip} for clip in kept] == [{"one"}, {"two"}]
    told = found.requests(likes, Storyboard((0.0, 1.0), ("a", "b")))
    assert [[r.prompt for r in clip] for clip in told] == [["a", "b", "b"]] * 2
    assert len({r.seed for clip in told for r in clip}) == 6
    # Middles of new frames: at 0.5, 1.44 and 2.19 s.
    for times, unused in (((0.0, 0.2), "0 s"), ((0.0, 1.0, 1.2), "1 s"), ((0.0, 9.0), "9 s")):
        with pytest.raises(ValueError, match=f"prompt at {unused} is in force in no window"):
            found.requests(likes, Storyboard(times, tuple("abc"[: len(times)])))


@pytest.mark.parametrize(
    ("given", "mode", "message"),
    [
        ({"storyboard": "a.txt"}, {}, "--storyboard says something of --long"),
        ({"history": "1s"}, {}, "--history says something of --long"),
        ({"history_noise": 0.1}, {}, "--history-noise says something of --long"),
        ({"long": "soon"}, {}, "--long soon: give seconds"),
        ({"long": "9s", "history": "x"}, {}, "--history x: give seconds"),
        ({"long": "9s"}, {"loop": True}, "--long and --loop"),
        ({"long": "9s"}, {"extend": "a.mp4"}, "--long and --extend"),
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
