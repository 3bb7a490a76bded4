"""Every mode: which pixels its tokens hold, which are free, and what becomes of what is made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.codec.codec import PixelCodec
from dit_jax.diffusion import DiffusionConfig, TimeConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig, patchify
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import (
    Generator,
    Request,
    SamplingConfig,
    Space,
    make_clips,
    make_inputs,
    plain,
    to_float,
)
from dit_jax.sampling.modes import (
    Storyboard,
    blend,
    connect,
    extend,
    image_to_video,
    interpolate,
    loop_clip,
    loop_text,
    make_long,
    plan_windows,
    restyle,
    window_requests,
)
from dit_jax.sampling.request import KnownLatents, check_request
from dit_jax.sampling.sampler import decode_loop, on_two_cuts
from dit_jax.training.video_task import init_params, make_model
from tests.denoiser import struct


@dataclasses.dataclass(frozen=True)
class Causal(PixelCodec):
    """Frames of 4 x 4 pixels are a latent; behind the first, the mean of two frames is one."""

    strides: tuple[int, int, int] = (2, 4, 4)

    def encode(self, video, key=None):
        small = video[:, ::4, ::4]
        assert len(video) % 2
        return np.concatenate([small[:1], (small[1::2] + small[2::2]) / 2])


PIXELS = Space(PixelCodec(), PatchConfig(1, 8, 8, 3, 8.0))
PAIRS = Space(PixelCodec(), PatchConfig(2, 8, 8, 3, 8.0))
CAUSAL = Space(Causal(), PatchConfig(1, 2, 2, 3, 8.0))
SPACES = {"pixels": PIXELS, "pairs": PAIRS, "causal": CAUSAL}


def clip(count, first=0, side=8):
    """Frame i shows the number first + i."""
    return np.broadcast_to(
        np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3)
    ).copy()


def like(space, frames=9, **fields):
    _, h, w = space.codec.strides
    made = Request(
        "a ball", space.grid.latents(frames), 8 // h, 8 // w, 8.0 / space.codec.strides[0], 1
    )
    return dataclasses.replace(made, **fields)


def given(request):
    assert request.known is not None
    return request.known


def free(request):
    """Which latent frames are free, as a word: ``-`` is held, ``+`` free, else the ceiling's tenths."""
    marks = {0: "-", 10: "+"}
    return "".join(marks.get(round(10 * s), str(round(10 * s))) for s in given(request).noise_caps)


def shown(request):
    """The numbers (of uint8) that the clean latents show."""
    return np.rint((given(request).clean[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def blank(edit, space):
    """What the mode makes of clips in which every frame is 200."""
    counts = [
        space.grid.frames(r.frames) if not r.loop else r.frames * space.codec.strides[0]
        for r in edit.requests
    ]
    return edit.finish([np.full((n, 8, 8, 3), 200, np.uint8) for n in counts])[:, 0, 0, 0].tolist()


# --- what each token holds ---


def test_images_hold_their_tokens():
    images = {0: clip(1)[0], -1: clip(1, 50)[0], 4: clip(1, 20)[0]}
    for space, marks in ((PIXELS, "-+++-+++-"), (PAIRS, "-++--++--"), (CAUSAL, "-+-+-")):
        edit = image_to_video(space, like(space), images)
        (request,) = edit.requests
        assert free(request) == marks
        held = [x for x, mark in zip(shown(request), marks, strict=True) if mark == "-"]
        assert sorted(set(held)) == [0, 20, 50]
        assert blank(edit, space) == [0, 200, 200, 200, 20, 200, 200, 200, 50]


@pytest.mark.parametrize("name", SPACES)
def test_extension_forward_encodes_the_tail_as_a_clip_of_its_own(name):
    space = SPACES[name]
    edit = extend(space, like(space), clip(12), forward=4)
    (request,) = edit.requests
    assert space.grid.frames(request.frames) == 9
    # Frames 7 to 11 are given: the first of them alone, as a clip's first always is.
    assert shown(request)[0] == 7
    np.testing.assert_array_equal(
        given(request).clean[given(request).noise_caps == 0], space.encode(clip(5, 7))
    )
    assert blank(edit, space) == [*range(12), 200, 200, 200, 200]


def test_extension_backward_leaves_out_a_causal_codecs_first_latent():
    for space, marks, numbers in (
        (PIXELS, "++++-----", [0, 2, 4, 6, 8]),
        # The last free token holds frame 0 too, which is put back after every step.
        (PAIRS, "++++-----", [0, 2, 4, 6, 8]),
        (CAUSAL, "+++--", [3, 7]),
    ):
        edit = extend(space, like(space), 2 * clip(12), backward=4)
        (request,) = edit.requests
        assert free(request) == marks
        assert shown(request)[-len(numbers) :] == numbers
        assert blank(edit, space) == [200, 200, 200, 200, *range(0, 24, 2)]
    known = make_inputs([extend(PAIRS, like(PAIRS), clip(12), backward=4).requests[0]], MODEL)
    # Token 2 holds frames 3 and 4 of nine: the second is frame 0 of the clip.
    assert known.kept is not None and known.noise_caps.tolist() == [[1, 1, 1, 0, 0]]
    each = known.kept.reshape(5, 2, -1)
    assert each.all(-1).tolist() == [[False] * 2] * 2 + [[False, True]] + [[False] * 2] * 2


@pytest.mark.parametrize("name", SPACES)
def test_both_ways_connections_and_loops_of_clips(name):
    space = SPACES[name]
    both = extend(space, like(space), clip(8), forward=2, backward=4)
    assert blank(both, space) == [200] * 4 + [*range(8)] + [200] * 2
    ends = clip(8), clip(8, 100)
    edit = connect(space, like(space), *ends, gap=3)
    assert blank(edit, space) == [*range(8), 200, 200, 200, *range(100, 108)]
    request = edit.requests[0]
    held = np.array(shown(request))[given(request).noise_caps == 0]
    # Three frames of each: with a causal codec 5 and the mean of 6 and 7; and of the other's 101 and
    # 102, the first being held by none.
    expected = {"pixels": [5, 6, 7, 100, 101, 102], "pairs": [5, 6, 7, 100, 101, 102]}
    assert held.tolist() == expected.get(name, [5, 6, 102])
    closed = loop_clip(space, like(space), clip(8), gap=3)
    assert blank(closed, space) == [*range(8), 200, 200, 200]
    assert free(closed.requests[0]) == free(request)


def test_blends_restyles_and_interpolates():
    edit = blend(PAIRS, like(PAIRS), clip(9), clip(9, 100), overlap=5, strength=0.8)
    (request,) = edit.requests
    assert free(request) == "-88--" and shown(request) == [4, 53, 54, 103, 104]
    assert blank(edit, PAIRS) == [0, 1, 2, 3, 4, 200, 200, 103, 104, 105, 106, 107, 108]

    assert free(restyle(CAUSAL, like(CAUSAL), clip(9), 0.6).requests[0]) == "66666"
    short = restyle(PAIRS, like(PAIRS), clip(4), 0.6)
    assert shown(short.requests[0]) == [0, 1, 2, 3, 3] and blank(short, PAIRS) == [200] * 4

    for space, marks in ((PIXELS, "-+-+-+-"), (PAIRS, "-4-4-4-"), (CAUSAL, "-444")):
        edit = interpolate(space, like(space), 10 * clip(4), 2)
        (request,) = edit.requests
        assert free(request) == marks and request.fps == 16 / space.codec.strides[0]
        assert blank(edit, space) == [0, 200, 10, 200, 20, 200, 30]
    # Three frames of ten do not fill the last token: it is filled up, and cut off again.
    odd = interpolate(PAIRS, like(PAIRS), clip(4), 3)
    assert odd.requests[0].frames == 11 and len(blank(odd, PAIRS)) == 10


def test_single_frames_leave_as_much_to_make_as_was_asked_for():
    """Through a causal codec a picture at the end stands still for a token, behind the new frames."""
    a, b = clip(1), clip(1, 100)
    for space, marks in ((PIXELS, "-+++-"), (PAIRS, "-+++-"), (CAUSAL, "-++-")):
        edit = connect(space, like(space), a, b, gap=3)
        assert free(edit.requests[0]) == marks
        assert blank(edit, space) == [0, 200, 200, 200, 100]
        edit = extend(space, like(space), b, backward=4)
        assert free(edit.requests[0]) == ("+++-" if space is CAUSAL else "++++-")
        assert blank(edit, space) == [200, 200, 200, 200, 100]


def test_noise_on_what_is_given_leaves_none_of_it_out():
    edit = extend(PAIRS, like(PAIRS), clip(3), backward=4, noise=0.25)
    (request,) = edit.requests
    # Latent 4 shares a token with 3, which is free: it is put back, as without noise.
    np.testing.assert_array_equal(given(request).noise_caps, [1, 1, 1, 1, 0, 0.25, 0.25])
    known = make_inputs([request], MODEL)
    assert known.noise_caps.tolist() == [[1, 1, 1, 0.25]]
    assert known.kept is not None and known.kept.any(-1).tolist() == [[False, False, True, False]]


# --- what does not fit together ---

IMAGE = clip(1)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: image_to_video(PAIRS, like(PAIRS), {3: IMAGE, 4: IMAGE}),
            "frames 3, 4 are known of a clip of 9",
        ),
        (
            lambda: image_to_video(PAIRS, like(PAIRS, frames=3), {0: IMAGE, 1: IMAGE}),
            "frames 0, 1 are known of a clip of 3",
        ),
        (lambda: extend(PAIRS, like(PAIRS), clip(3), 2, context=5), "context is 5 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 7), "overlap of 7 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 3), "has no middle"),
        (lambda: interpolate(PAIRS, like(PAIRS), clip(5), 1), "give at least 2"),
        (lambda: KnownLatents(np.zeros((2, 1, 1, 3)), np.array([0, 1.5])), "1.5"),
        (lambda: KnownLatents(np.zeros((2, 1, 1, 3)), np.zeros(3)), r"\(3,\)"),
        (lambda: check_request(like(PAIRS, loop=True), MODEL), "a loop of 9 frames"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- made by a model ---

MODEL = ModelConfig(
    dit=DiTConfig(width=24, depth=1, heads=2),
    patch=PAIRS.patch,
    text=ByteEncoderConfig(width=8, depth=1, heads=2, max_bytes=15),
)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
NOISY = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)


def every_mode():
    """One edit of each, of all ceilings, lengths and forms that there are."""
    base = like(PAIRS, negative="blue")
    return [
        plain(base),
        plain(dataclasses.replace(base, frames=1)),
        image_to_video(PAIRS, base, {0: NOISY[0], -1: NOISY[1]}, noise=0.05),
        restyle(PAIRS, base, NOISY, 0.6),
        extend(PAIRS, base, NOISY, forward=4, backward=4),
        connect(PAIRS, base, NOISY, NOISY[::-1], gap=3),
        blend(PAIRS, base, NOISY, NOISY[::-1], overlap=9),
        loop_clip(PAIRS, base, NOISY, gap=3),
        loop_text(PAIRS, base),
        interpolate(PAIRS, base, NOISY[:5], 2),
    ]


FLOW = DiffusionConfig()


class Maker:
    """Makes clips on some devices, of random parameters that leave nothing at zero."""

    def __init__(self, mesh, diffusion=FLOW, steps=2, **fields):
        self.mesh, model = mesh, make_model(MODEL, mesh)
        config = SamplingConfig(steps=steps, cfg_scale=2.0, batch=12, **fields)
        self.generator = Generator(model, diffusion, config)
        shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        draw = functools.partial(np.random.default_rng(1).normal, 0.0, 0.2)
        self.params = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), jnp.float32), shapes)

    def clips(self, generations):
        decode = PixelCodec().decode
        return make_clips(self.generator, self.params, generations, self.mesh, decode=decode)

    def tokens(self, condition):
        return np.asarray(self.generator(self.params, jax.tree.map(jnp.asarray, condition)))


@pytest.fixture(scope="module")
def one():
    return Maker(MESH)


@pytest.fixture(scope="module")
def eight():
    return Maker(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2)))


@pytest.fixture(scope="module")
def on_one(one):
    return one.clips(every_mode())


def test_every_mode_is_the_same_on_eight_devices(eight, on_one):
    for alone, other in zip(on_one, eight.clips(every_mode()), strict=True):
        # Grey levels: the same sums in another order.
        assert alone.shape == other.shape and np.abs(alone.astype(int) - other).max() <= 1
    assert eight.generator.step._cache_size() == 1


def test_windows_are_the_same_on_eight_devices(one, eight):
    """Two clips that begin with something, in windows that are given the end of those before."""
    windows = plan_windows(PAIRS, 13, 9, 3, start=3, context=3)
    board = Storyboard((0.0, 1.0), ("a", "b"))
    clips = [window_requests(like(PAIRS, seed=i), windows, board) for i in (3, 4)]
    heads = [PAIRS.encode(NOISY[i : i + 3]) for i in (0, 4)]
    few, many = (
        make_long(by.generator, by.params, clips, windows, by.mesh, heads=heads)
        for by in (one, eight)
    )
    for a, b in zip(few, many, strict=True):
        assert a.shape == (15, 8, 8, 3)
        np.testing.assert_allclose(a, b, atol=1 / 127)  # a grey level
    assert np.abs(few[0] - few[1]).max() > 0.1


def test_steps_are_those_of_the_request_alone(one):
    """Where the schedule follows the number of tokens, or steps are skipped by level."""
    diffusion = DiffusionConfig(time=TimeConfig(reference_tokens=4))
    other = Maker(MESH, diffusion, steps=4, cache_threshold=0.2)
    edits = [every_mode()[i] for i in (0, 1, 3, 8)]
    assert len({other.generator.batch_key(edit.requests[0]) for edit in edits}) == 4
    assert len({one.generator.batch_key(edit.requests[0]) for edit in edits}) == 1
    edits = edits[1:3]  # an image, a restyle
    for edit, beside in zip(edits, other.clips(edits), strict=True):
        (alone,) = other.clips([edit])
        assert np.abs(alone.astype(int) - beside).max() <= 1


def test_held_frames_come_out_as_they_were_given(on_one):
    assert [len(x) for x in on_one] == [9, 1, 9, 9, 17, 21, 9, 12, 8, 9]
    assert all(x.std() > 0 for x in on_one)
    images, _, extended, connected, blended, closed = on_one[2:8]
    assert (images[0] == NOISY[0]).all() and (images[-1] == NOISY[1]).all()
    assert (extended[4:13] == NOISY).all()
    assert (connected[:9] == NOISY).all() and (connected[12:] == NOISY[::-1]).all()
    assert (blended[0] == NOISY[0]).all() and (blended[-2:] == NOISY[::-1][-2:]).all()
    assert (closed[:9] == NOISY).all() and (on_one[9][::2] == NOISY[:5]).all()


def test_given_tokens_are_exact_in_the_latents_too(one):
    """What the model makes, before anything is pasted."""
    requests = [edit.requests[0] for edit in every_mode()][4:6]
    condition = make_inputs(requests, MODEL, 40, [r for e in every_mode() for r in e.requests])
    made = one.tokens(condition)
    held = condition.noise_caps == 0
    assert held.any() and (made[held] == condition.tokens[held]).all()
    known = condition.kept
    assert known is not None and known.any() and not known[held].any()
    np.testing.assert_allclose(made[known], condition.tokens[known], atol=1e-6)
    assert (made[~known & ~held[..., None]] != 0).all()


def test_a_loop_is_the_same_wherever_it_begins(one):
    """Its noise and times rolled, all that is made is rolled."""
    (request,) = loop_text(PAIRS, like(PAIRS)).requests
    condition = make_inputs([request], MODEL)
    assert condition.segment_ids.sum() == 4
    assert condition.positions[0, :, 0].tolist() == [0.75, 1.75, 2.75, 3.75]
    fields = ("token_ids", "positions")
    turned = {name: np.roll(getattr(condition, name), 1, 1) for name in fields}
    made = one.tokens(condition)
    moved = one.tokens(dataclasses.replace(condition, **turned))
    np.testing.assert_allclose(np.roll(made, 1, 1), moved, atol=1e-4)  # float32
    # Without its cycle the same tokens come out otherwise.
    plainly = dataclasses.replace(condition, cycles=np.zeros((1, 3), np.float32))
    assert np.abs(one.tokens(plainly) - made).max() > 1e-3


def test_a_loop_is_decoded_after_its_own_end():
    seen = []

    def decode(latents):
        """Two frames a latent, each the sum of it and the one before: a decoder that looks back."""
        seen.append(latents[:, 0, 0, 0].tolist())
        sums = latents[1:] + latents[:-1]
        return np.concatenate([latents[:1], np.repeat(sums, 2, 0)])

    made = decode_loop(decode, np.arange(3.0)[:, None, None, None])
    assert made[:, 0, 0, 0].tolist() == [2, 2, 1, 1, 3, 3] and seen[0][-4:] == [2, 0, 1, 2]


def test_times_of_a_request_are_its_tokens():
    (loop,) = loop_text(PIXELS, like(PIXELS, 3)).requests
    model = dataclasses.replace(MODEL, patch=PIXELS.patch)
    condition = make_inputs([loop, like(PIXELS, 2)], model)
    assert condition.positions[0, :, 0].tolist() == [0, 1, 2]
    assert condition.cycles is not None and condition.cycles.tolist() == [[3, 0, 1], [0, 0, 0]]
    request = like(PAIRS, 5, times=np.array([0.0, 4, 6, 7, 8]))
    condition = make_inputs([request], MODEL)
    assert condition.positions[0, :, 0].tolist() == [0.0, 2.5, 3.75]
    tokens = patchify(PAIRS.patch, to_float(NOISY[:5]))
    clip_of = KnownLatents(to_float(NOISY[:5]), np.array([0, 1, 1, 0.25, 0]))
    condition = make_inputs([dataclasses.replace(request, known=clip_of)], MODEL)
    np.testing.assert_array_equal(condition.tokens[0], tokens)
    assert condition.noise_caps.tolist() == [[0, 1, 0.25]]
    assert condition.group_t[0][condition.group_ids[0]].tolist() == [0, 1, 0.25]


def test_the_two_cuts_of_a_loop_are_half_a_turn_apart():
    where = np.zeros((2, 6, 3), np.float32)
    where[:, :, 0] = 2 + 0.5 * np.arange(6)
    cycles = np.array([[6, 2, 0.5], [0, 0, 0]], np.float32)
    asked = []

    def evaluate(inputs):
        asked.append((inputs.positions[..., 0], inputs.group_t[:, 0]))
        return inputs.tokens * inputs.positions[..., :1]

    x = np.ones((4, 6, 2), np.float32)  # with guidance: prompts, and then empty ones
    rows = struct(
        tokens=x,
        positions=jnp.tile(where, (2, 1, 1)),
        segment_ids=np.ones((4, 6)),
        group_ids=np.zeros((4, 6)),
        group_t=np.arange(4)[:, None],
    )
    made = on_two_cuts(evaluate, jnp.asarray(cycles), jnp.int32(0), rows)
    ((clock, level),) = asked
    assert level.tolist() == [0, 1, 2, 3] * 2 and clock.shape == (8, 6)
    number = (np.asarray(clock) - 2) / 0.5
    assert number[0].tolist() == [0, 1, 2, 3, 4, 5] == number[1].tolist() == number[5].tolist()
    assert number[4].tolist() == [3, 4, 5, 0, 1, 2] == number[6].tolist()
    # Equal shares half way between the cuts, and the least next to one.
    share = np.sin(np.pi * (np.arange(6) + 0.5) / 6) ** 2
    expected = share * clock[0] + (1 - share) * clock[4]
    np.testing.assert_allclose(made[0, :, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(made[2], made[0])
    np.testing.assert_allclose(made[1, :, 0], where[1, :, 0], rtol=1e-6)
