"""Long clips: windows, storyboards, and what passes from window to window."""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.codec.codec import PixelCodec
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, PatchConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import (
    Generator,
    Request,
    SamplingConfig,
    Space,
    make_clips,
    modes,
    plain,
    to_uint8,
)
from dit_jax.sampling.modes import (
    Storyboard,
    Window,
    make_long,
    plan_windows,
    read_storyboard,
    window_requests,
)
from dit_jax.sampling.sampler import make_latents

pytestmark = pytest.mark.usefixtures("quickly")
PATCH = PatchConfig(t=2, h=2, w=2, channels=3, reference_fps=8.0)
SPACE = Space(PixelCodec(), PATCH)
LIKE = Request("", 5, 4, 4, 8.0, 3)
BOARD = Storyboard((0.0, 1.0), ("a", "b"))


class StandIn:
    """Says that every number is a little more than the mean of what is given, and nothing else; keeps
    the prompts' first letters, levels and times that it was asked with."""

    def __init__(self) -> None:
        text = ByteEncoderConfig(width=4, depth=1, heads=1, max_bytes=7)
        self.config: Any = types.SimpleNamespace(
            patch=PATCH, text=text, conditioners={}, compute_dtype=lambda: jnp.float32
        )
        self.traced = 0
        self.asked: list[Any] = []

    def apply(self, params: Any, inputs: Any, *ids: Any, method: Any = None, **_: Any) -> Any:
        if method == "encode_text":
            return inputs.astype(jnp.float32)[..., None]
        self.traced += 1
        x, places, text = inputs.tokens, inputs.positions, inputs.text
        level = jnp.take_along_axis(inputs.group_t, inputs.group_ids, 1)
        jax.debug.callback(lambda *seen: self.asked.append(seen), text[:, 1, 0], level, places)
        known = (level < 0.5)[..., None]
        mean = (x * known).sum((1, 2)) / jnp.maximum(known.sum((1, 2)) * x.shape[-1], 1)
        # The velocity to x0 = mean + 1.
        return jnp.where(level[..., None] > 0, (x - mean[:, None, None] - 1) / level[..., None], 0)


@functools.cache
def built(steps: int = 2) -> tuple[StandIn, Generator]:
    model, config = StandIn(), SamplingConfig(steps=steps, cfg_scale=1.0, batch=2)
    return model, Generator(model, DiffusionConfig(), config)  # pyright: ignore[reportArgumentType]


MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def long_clip(frames: int = 13, seeds: tuple[int, ...] = (3,), **given: Any) -> Any:
    """Latents, the stand-in, windows and requests."""
    model, generator = built()
    model.asked.clear()
    windows = plan_windows(SPACE, frames, 5, 3)
    likes = [dataclasses.replace(LIKE, seed=seed) for seed in seeds]
    clips = [window_requests(like, windows, BOARD) for like in likes]
    made = make_long(generator, {}, clips, windows, MESH, **given)
    jax.effects_barrier()
    return made, model, windows, clips


# --- windows ---


@pytest.mark.parametrize(("frames", "length", "history"), [(1, 5, 1), (6, 5, 1), (57, 9, 5)])
def test_windows_cover_every_frame_and_overlap_as_asked(frames: int, length: int, history: int):
    windows = plan_windows(SPACE, frames, length, history)
    assert windows[0] == Window(0, length, 0)
    new = [list(range(w.start + w.history, w.start + length)) for w in windows]
    assert sum(new, []) == list(range(windows[-1].start + length))
    assert all(w.length == length for w in windows)
    assert all(
        b.start == a.start + length - history and b.history == history
        for a, b in zip(windows, windows[1:], strict=False)
    )
    assert windows[-1].start + length >= frames
    assert len(windows) == 1 or windows[-2].start + length < frames


def test_a_history_fills_about_a_third_in_whole_tokens():
    for space, length, history in [
        *((SPACE, *pair) for pair in ((3, 1), (5, 3), (7, 3), (9, 3), (21, 7))),
        (Space(PixelCodec(), PatchConfig(t=1)), 21, 8),
    ]:
        assert plan_windows(space, 99, length)[1].history == history


def test_a_windows_prompt_is_that_of_the_middle_of_its_new_frames():
    windows = plan_windows(SPACE, 13, 5, 3)
    # The middles of the new frames: 2, 5.5, 7.5, 9.5 and 11.5 of 8 a second.
    assert [w.middle for w in windows] == [2, 5.5, 7.5, 9.5, 11.5]
    requests = window_requests(LIKE, windows, BOARD)
    assert [r.prompt for r in requests] == ["a", "a", "a", "b", "b"]
    assert requests[0].seed == LIKE.seed and len({r.seed for r in requests}) == 5
    assert {r.size for r in requests} == {(5, 4, 4)}
    # Of a clip that begins with three frames the first window's new ones are two.
    expected = [3.5, 5.5, 7.5, 9.5, 11.5]
    assert [w.middle for w in plan_windows(SPACE, 13, 5, 3, start=3, context=3)] == expected


# --- storyboards ---


def test_a_storyboard_is_read(tmp_path: Path):
    path = tmp_path / "board.txt"
    path.write_text(
        "# a day\n0s: a red: ball\n\n3.5s: it stops\n 10 : on\n1:05: night\n2:00.5:x\n"
        "0:03:00: 1 star\n1:2:3:y\n"
    )
    board = read_storyboard(path)
    assert board.times == (0, 3.5, 10, 65, 120.5, 180, 3723)
    assert board.prompts == ("a red: ball", "it stops", "on", "night", "x", "1 star", "y")
    found = [board.at(t) for t in (0, 3.4, 3.5, 64.9, 65, 1e9)]
    assert found == ["a red: ball", "a red: ball", "it stops", "on", "night", "y"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0s a ball", 1),
        ("0s: a\nsoon: b", 2),
        ("0s:", 1),
        ("1s: a", 1),
        ("0s: a\n5s: b\n5s: c", 3),
        ("0s: a\n1:75: b", 2),
        ("0s: a\n1:60:00: b", 2),
    ],
)
def test_lines_that_are_no_storyboard_are_refused_by_number(tmp_path: Path, text: str, line: int):
    (tmp_path / "board.txt").write_text(text)
    with pytest.raises(ValueError, match=f"board.txt:{line}:"):
        read_storyboard(tmp_path / "board.txt")
    for name, empty in (("none.txt", None), ("empty.txt", "# nothing")):
        if empty:
            (tmp_path / name).write_text(empty)
        with pytest.raises(ValueError, match=name):
            read_storyboard(tmp_path / name)


# --- what is made ---


def test_each_window_goes_on_from_the_last_and_one_step_is_compiled():
    built.cache_clear()
    (clip,), model, windows, clips = long_clip()
    generator = built()[1]
    assert clip.shape == (13, 4, 4, 3) and len(windows) == 5
    # The first knows nothing: 0 + 1. The others see the history, which is softly noised.
    np.testing.assert_allclose(clip[:5], 1, atol=1e-5)
    assert np.ptp(clip, (1, 2, 3)).max() < 0.2
    steps = clip.mean((1, 2, 3))
    assert (np.diff(steps[[4, 5, 7, 9, 11]]) > 0.2).all()
    assert generator.step._cache_size() == 1 and model.traced == 1
    # The first window is the plain clip, and what is given is not replaced.
    (alone,) = make_clips(generator, {}, [plain(clips[0][0])], MESH)
    np.testing.assert_array_equal(to_uint8(clip[:5]), alone)
    np.testing.assert_array_equal(long_clip(frames=7)[0][0], clip[:7])


def test_history_is_at_its_ceiling_and_prompts_and_positions_are_the_windows_own():
    _, model, windows, _ = long_clip(noise=0.05)
    first = [int(model.config.text.tokens(prompt)[1]) for prompt in BOARD.prompts]
    asked = [first.index(text[0]) for text, _, _ in model.asked]
    assert asked == [0] * 6 + [1] * 4  # two steps a window
    for number in range(len(windows)):
        _, level, places = model.asked[2 * number]
        history = 8 if number else 0  # two tokens in time, of 2 x 2
        np.testing.assert_allclose(level[0, :history], 0.05)
        np.testing.assert_allclose(level[0, history:], 1)
        np.testing.assert_array_equal(places[0], model.asked[0][2][0])


def test_every_window_is_given_what_the_clip_keeps(monkeypatch: pytest.MonkeyPatch):
    """Three latents of five: two of them the window before was given itself."""
    asked: list[Request] = []

    def watched(generator: Any, params: Any, requests: Any, *rest: Any) -> list[np.ndarray]:
        asked.extend(requests)
        return make_latents(generator, params, requests, *rest)

    monkeypatch.setattr(modes, "make_latents", watched)
    (clip,), _, windows, _ = long_clip()
    for request, window in zip(asked[1:], windows[1:], strict=True):
        assert request.known is not None
        np.testing.assert_array_equal(
            request.known.clean[:3], clip[window.start : window.start + 3]
        )


def test_clips_share_batches_and_do_not_depend_on_them():
    together = long_clip(seeds=(3, 4, 5))[0]
    for seed, clip in ((3, together[0]), (5, together[2])):
        np.testing.assert_allclose(long_clip(seeds=(seed,))[0][0], clip, atol=1e-6)


def test_a_head_begins_the_clip_and_is_kept():
    head = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32) + 7
    (clip,), model, *_ = long_clip(heads=[head], noise=0.02)
    np.testing.assert_array_equal(clip[:3], head)
    assert abs(clip[3:5].mean() - head.mean() - 1) < 0.2
    np.testing.assert_allclose(model.asked[0][1][0, :8], 0.02)


def test_a_head_that_ends_within_a_token_is_refused():
    with pytest.raises(ValueError, match="2 frames"):
        long_clip(heads=[np.zeros((2, 4, 4, 3), np.float32)])
