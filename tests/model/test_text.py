"""Bytes and states as text: whole characters, captions that do not see each other, the empty prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import check_types
from dit_jax.diffusion.objective import drop_captions
from dit_jax.model import ByteEncoderConfig, ModelConfig, TextStatesConfig
from dit_jax.model.layers import as_computed
from dit_jax.model.text import BEGIN, FIRST_BYTE, VOCABULARY
from dit_jax.types import PAD
from tests.denoiser import byte_tokens, struct


def caption_of(tokens: np.ndarray) -> str:
    """The inverse of ``byte_tokens``; raises where a character was cut."""
    assert tokens[0] == BEGIN and (tokens[1:] >= FIRST_BYTE).all() and (tokens < VOCABULARY).all()
    return bytes((tokens[1:] - FIRST_BYTE).astype(np.uint8).tolist()).decode("utf-8")


# --- tokens ---


def test_bytes_follow_the_beginning():
    tokens = byte_tokens("aé", 63)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [1, 2 + 0x61, 2 + 0xC3, 2 + 0xA9]
    assert byte_tokens("", 63).tolist() == [BEGIN]
    assert len(byte_tokens("x" * 100, 63)) == 64 == ByteEncoderConfig().max_tokens


def test_every_byte_has_a_token_and_none_is_padding():
    tokens = byte_tokens("".join(map(chr, range(128))), 200)[1:]
    assert len(set(tokens.tolist())) == 128 and PAD not in tokens and BEGIN not in tokens


@pytest.mark.parametrize("caption", ["a red circle", "🔴 naïve 🟦🟩", "👩‍👩‍👧 ok"])
def test_a_character_is_never_cut_in_two(caption):
    for limit in range(1, len(caption.encode()) + 3):
        kept = caption_of(byte_tokens(caption, limit))
        # As many characters as fit, and no fewer.
        starts = (caption[:i] for i in range(len(caption) + 1))
        assert kept == max((start for start in starts if len(start.encode()) <= limit), key=len)


def test_nonsense_encoders_are_refused():
    with pytest.raises(ValueError, match="text.width is 10.*heads 4"):
        ByteEncoderConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="text.max_tokens is 1"):
        check_types(TextStatesConfig(max_tokens=1), "text")


# --- the encoder ---

LENGTH = 24


def drop(ids, dropped):
    """The segment ids of the text that is left."""
    return np.asarray(drop_captions(jnp.asarray(ids), jnp.array(dropped, jnp.float32)))


def test_the_model_sees_a_dropped_caption_as_the_empty_prompt(forward, params, segment, packed):
    def rows(first):
        sky, sea = (segment(i, (1, 4, 4), caption=name) for i, name in ((2, "sky"), (3, "sea")))
        return packed([[segment(1, (2, 4, 4), caption=first), sky], [sea]])

    captioned, empty = rows("red circle"), rows("")
    left = drop(captioned["text_segment_ids"], [[1, 0, 0], [0, 0, 0]])
    out = forward(params, **{**captioned, "text_segment_ids": left})
    expected = forward(params, **empty)
    first, real = captioned["segment_ids"] == 1, captioned["segment_ids"] != PAD
    # Bit for bit where the text lies in the same place of the row; float32 where it is moved.
    assert np.array_equal(out[first], expected[first])
    np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=1e-5)
    assert np.abs(out - forward(params, **captioned))[first].max() > 0.01


def test_the_longest_caption_has_a_place_for_every_byte(model, params):
    text = byte_tokens("x" * 40, 15)[None]
    assert text.shape == (1, 16)
    encode = jax.jit(functools.partial(model.apply, method="encode_text"))
    out = np.asarray(encode(params, text, np.ones_like(text)))[0, 1:]
    # Equal bytes, told apart by their places.
    apart = np.abs(out[:, None] - out[None]).max(-1) + np.eye(15)
    assert apart.min() > 0.01


# --- states that an encoder made beforehand ---

STATES = TextStatesConfig(encoder="other", dim=6, max_tokens=5)


@pytest.mark.parametrize(
    ("length", "kept", "dtype"),
    [(0, 0, np.float32), (4, 4, np.float16), (5, 4, np.float64), (9, 4, np.float32)],
)
def test_states_follow_a_zero_state_and_are_cut(length, kept, dtype):
    states = np.random.default_rng(0).normal(size=(length, 6)).astype(dtype)
    read = STATES.tokens("a red circle", states)
    assert read.dtype == np.float32 and read.shape == (1 + kept, 6)
    assert not read[0].any()
    assert np.array_equal(read[1:], states[:4].astype(np.float32))


@pytest.mark.parametrize("length", [0, 3, 5, 9])
def test_padded_states_are_as_many_as_there_can_be(length):
    padded = dataclasses.replace(STATES, padded=True)
    states = np.random.default_rng(0).normal(size=(length, 6)).astype(np.float16)
    # The empty caption has states as others have, of the token that ends it.
    read = padded.tokens("", states)
    assert read.dtype == np.float32 and read.shape == (5, 6)
    assert np.array_equal(read[:length], states[:5]) and not read[length:].any()
    assert padded.length("", states) == length and not padded.tokens("").any()


@pytest.mark.parametrize(
    ("states", "found"),
    [(None, "none"), (np.zeros((3, 7)), r"\(3, 7\)"), (np.zeros(6), r"\(6,\)")],
)
def test_captions_without_fitting_states_are_refused(states, found):
    with pytest.raises(ValueError, match=rf"states \[s, 6\] .*'other', and .*{found} came"):
        STATES.tokens("a red circle", states)


@pytest.fixture(scope="module")
def of_states(tiny, inputs):
    """A model that reads states, random parameters of it, and its inputs."""
    config = dataclasses.replace(tiny(pooled_text=True, modulation="shared").config, text=STATES)
    model, rng = tiny().clone(config=config), np.random.default_rng(0)
    given = {**inputs, "text": np.float32(rng.normal(size=(*inputs["text"].shape, 6)))}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), struct(given)))
    draw = lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape))  # noqa: E731
    return model, jax.tree.map(draw, shapes), given


def test_states_are_projected_token_by_token(of_states):
    """Two linear layers and a GELU between, computed here in float64."""
    model, params, _ = of_states
    states = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    states[:, 0] = 0
    encode = jax.jit(functools.partial(model.apply, method="encode_text"))
    out = np.asarray(encode(params, states, np.ones((2, 4), np.int32)))
    assert out.shape == (2, 4, 32) and out.dtype == np.float32
    up, last = (params["params"]["text"][name] for name in ("up", "out"))
    assert set(params["params"]["text"]) == {"up", "out"}
    x = states.astype(np.float64) @ up["kernel"] + up["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    # float32 sums of 32 terms of about 1.
    np.testing.assert_allclose(out, x @ last["kernel"] + last["bias"], rtol=1e-5, atol=1e-5)
    # The beginning is the same in every caption, and is what the biases say.
    assert np.array_equal(out[0, 0], out[1, 0]) and np.abs(out[0, 0]).max() > 0.1


def test_a_dropped_caption_leaves_the_beginning(of_states, apply, inputs):
    """To the model, what is dropped is a caption of no states, whatever it was."""
    model, params, _ = of_states
    rng = np.random.default_rng(2)
    ids = np.zeros((2, LENGTH), np.int32)
    ids[0, :5], ids[0, 5:9], ids[0, 9:11], ids[1, :3] = 1, 2, 3, 1
    text = np.where(ids[..., None] > 0, rng.normal(size=(2, LENGTH, 6)), 0).astype(np.float32)
    text[0, [0, 5, 9]], text[1, 0] = 0, 0
    left = drop(ids, [[1, 0, 0], [1, 0, 0]])

    def forward(text, ids):
        return apply(model, params, **{**inputs, "text": text, "text_segment_ids": ids})

    dropped, kept = forward(text, left), forward(text, ids)
    other = text.copy()
    other[0, 1:5], other[1, 1:] = rng.normal(size=(4, 6)), rng.normal(size=(LENGTH - 1, 6))
    # Bit for bit: what is hidden has a weight of exactly zero.
    real = inputs["segment_ids"] > 0
    assert np.array_equal(forward(other, left)[real], dropped[real])
    changed = inputs["segment_ids"] == 1
    assert np.abs(dropped - kept)[changed].max() > 0.01
    assert np.array_equal(dropped[real & ~changed], kept[real & ~changed])


# --- parameters as the layers compute with them ---


def prepared(params, dtype=jnp.bfloat16):
    def cast(path, leaf):
        return as_computed([entry.key for entry in path], jnp.asarray(leaf), dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def linear_layers(model, params, given):
    """The path of every linear layer that runs, and the dtype it computes in."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            found["/".join(context.module.path)] = jnp.dtype(context.module.dtype)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, params, struct(given))
    return found


@pytest.mark.parametrize("reads", ["bytes", "states"])
def test_what_computes_in_bfloat16_is_cast_and_nothing_else(
    reads, tiny, params, of_states, inputs, apply
):
    model, params, given = (tiny(), params, inputs) if reads == "bytes" else of_states
    model = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    layers = linear_layers(model, params, given)
    low = {path for path, dtype in layers.items() if dtype == jnp.bfloat16}
    assert low and set(layers) - low
    ready = prepared(params)
    cast = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(ready["params"])[0]:
        layer, kind = "/".join(entry.key for entry in path[:-1]), path[-1].key
        if leaf.dtype == jnp.bfloat16:
            assert kind in ("kernel", "bias")
            cast.add(layer)
        else:
            assert leaf.dtype == jnp.float32
    assert cast == low
    if reads == "states":
        return
    out = apply(model, params, **given)
    # Bit for bit: converted once or at every step, the numbers are the same ...
    assert np.array_equal(apply(model, ready, **given), out)
    # ... and those of the other layers would not be.
    lower = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
    assert not np.array_equal(apply(model, lower, **given), out)


def test_float32_parameters_stay_for_float32(params):
    ready = prepared(params, jnp.float32)
    for ours, theirs in zip(jax.tree.leaves(ready), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


# --- the joined model ---


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_activations_are_of_low_precision_on_accelerators(dtype, platform, expected):
    assert ModelConfig(dtype=dtype).on(platform).dtype == expected
    assert ModelConfig().compute_dtype() == jnp.float32  # The tests run on CPUs.


def test_text_may_be_encoded_once_and_apart(model, forward, params, inputs):
    given = dict(inputs)
    encode = jax.jit(functools.partial(model.apply, method="encode_text"))
    states = encode(params, given.pop("text"), given["text_segment_ids"])
    out = jax.jit(functools.partial(model.apply, encoded=True))(params, struct(given, text=states))
    # The same operations, compiled in two parts.
    np.testing.assert_allclose(out, forward(params, **inputs), rtol=1e-5, atol=1e-5)
