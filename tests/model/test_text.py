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
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, TextStatesConfig
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


def test_every_byte_has_a_token_and_none_is_padding():
    tokens = byte_tokens("".join(map(chr, range(128))), 200)[1:]
    assert len(set(tokens.tolist())) == 128 and PAD not in tokens and BEGIN not in tokens


@pytest.mark.parametrize("caption", ["a red circle", "紅色的圓在動", "🔴 naïve 🟦🟩", "👩‍👩‍👧 ok"])
def test_a_character_is_never_cut_in_two(caption):
    whole = len(caption.encode())
    for limit in range(1, whole + 3):
        kept = caption_of(byte_tokens(caption, limit))
        assert caption.startswith(kept)
        # As many characters as fit, and no fewer.
        longest = max(
            (caption[:i] for i in range(len(caption) + 1) if len(caption[:i].encode()) <= limit),
            key=len,
        )
        assert kept == longest


def test_long_captions_are_cut_to_the_limit():
    assert len(byte_tokens("x" * 100, 63)) == 64 == ByteEncoderConfig().max_tokens
    assert caption_of(byte_tokens("圓" * 30, 8)) == "圓圓"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "text.width is 0"),
        ({"depth": -1}, "text.depth is -1"),
        ({"max_bytes": 0}, "text.max_bytes is 0"),
        ({"width": 10, "heads": 4}, "text.width is 10.*heads 4"),
    ],
)
def test_nonsense_encoders_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(ByteEncoderConfig(**fields), "text")


# --- the encoder ---

LENGTH = 24


def rows_of(*rows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Captions packed side by side: tokens and segment ids ``[b, s]``."""
    text, ids = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(2))
    for r, row in enumerate(rows):
        start = 0
        for j, caption in enumerate(row):
            tokens = byte_tokens(caption, 15)
            text[r, start : start + len(tokens)] = tokens
            ids[r, start : start + len(tokens)] = j + 1
            start += len(tokens)
    return text, ids


@pytest.fixture(scope="module")
def encode(model, params, jit):
    """``encode(text, ids)`` of two rows, compiled once."""
    encode_text = jit(functools.partial(model.apply, method="encode_text"))
    return lambda text, ids: np.asarray(encode_text(params, text, ids))


@pytest.fixture(scope="module")
def drop(jit):
    """``drop(ids, dropped)``: the segment ids of the text that is left."""
    compiled = jit(drop_captions)
    return lambda ids, dropped: np.asarray(compiled(ids, np.array(dropped, np.float32)))


def test_packed_captions_equal_each_alone(encode):
    captions = ["red", "blue sky", ""]
    text, ids = rows_of(captions, [])
    packed = encode(text, ids)[0]
    for j, caption in enumerate(captions):
        alone = encode(*rows_of([caption], []))[0][: len(byte_tokens(caption, 15))]
        # float32; sums of the same terms at another place of the row.
        np.testing.assert_allclose(packed[ids[0] == j + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_caption_is_read_in_order(encode):
    out = encode(*rows_of(["ab"], ["ba"]))
    assert np.abs(out[0, 0] - out[1, 0]).max() > 0.01


def test_the_model_sees_a_dropped_caption_as_the_empty_prompt(
    forward, drop, params, segment, packed
):
    def rows(first):
        return packed(
            [
                [segment(1, (2, 4, 4), caption=first), segment(2, (1, 4, 4), caption="sky")],
                [segment(3, (1, 4, 4), caption="sea")],
            ]
        )

    captioned, empty = rows("red circle"), rows("")
    left = drop(captioned["text_segment_ids"], [[1, 0, 0], [0, 0, 0]])
    out = forward(params, **{**captioned, "text_segment_ids": left})
    expected = forward(params, **empty)
    first, real = captioned["segment_ids"] == 1, captioned["segment_ids"] != PAD
    # Bit for bit where the text lies in the same place of the row; float32 where it is moved.
    assert np.array_equal(out[first], expected[first])
    np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=1e-5)
    assert np.abs(out - forward(params, **captioned))[first].max() > 0.01


def test_the_longest_caption_has_a_place_for_every_byte(encode):
    text, ids = rows_of(["x" * 40], [])
    assert ids[0].sum() == 16
    out = encode(text, ids)[0, 1:16]
    # Equal bytes, told apart by their places.
    apart = np.abs(out[:, None] - out[None]).max(-1) + np.eye(15)
    assert apart.min() > 0.01


# --- states that an encoder made beforehand ---

STATES = TextStatesConfig(encoder="other", dim=6, max_tokens=5)


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (1, 1), (4, 4), (5, 4), (9, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_states_follow_a_zero_state_and_are_cut(length, kept, dtype):
    states = np.random.default_rng(0).normal(size=(length, 6)).astype(dtype)
    read = STATES.tokens("a red circle", states)
    assert read.dtype == np.float32 and read.shape == (1 + kept, 6)
    assert not read[0].any()
    assert np.array_equal(read[1:], states[:4].astype(np.float32))


def test_the_model_reads_states_or_bytes():
    config = ModelConfig(DiTConfig(width=32, depth=1, heads=2), text=STATES)
    states = np.arange(12, dtype=np.float16).reshape(2, 6)
    assert np.array_equal(config.text.tokens("not read", states)[1:], states)
    assert config.text_width == 32
    of_bytes = dataclasses.replace(config, text=ByteEncoderConfig(width=16, max_bytes=2))
    assert of_bytes.text.tokens("abc", states).tolist() == [BEGIN, 2 + 0x61, 2 + 0x62]
    assert of_bytes.text_width == 16


@pytest.mark.parametrize(
    ("states", "found"),
    [
        (None, "none"),
        (np.zeros((3, 7)), r"an array of shape \(3, 7\)"),
        (np.zeros(6), r"an array of shape \(6,\)"),
    ],
)
def test_captions_without_fitting_states_are_refused(states, found):
    config = ModelConfig(text=STATES)
    message = (
        rf"reads captions as states \[s, 6\] of the text encoder 'other', and {found} came with "
        r"'a red circle': give records that have them \(data.source.text_states_key\), the encoder"
    )
    with pytest.raises(ValueError, match=message):
        config.text.tokens("a red circle", states)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"dim": 0}, "text.dim is 0"), ({"max_tokens": 1}, "text.max_tokens is 1")],
)
def test_nonsense_states_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(TextStatesConfig(**fields), "text")


@pytest.fixture(scope="module")
def of_states(tiny):
    """A model that reads states, and random parameters of it."""
    config = dataclasses.replace(tiny(pooled_text=True, modulation="shared").config, text=STATES)
    model = tiny().clone(config=config)
    ids = jnp.zeros((1, 1), jnp.int32)

    def shapes(key, x):
        fields = {"tokens": x, "positions": x[..., :3], "group_t": x[..., 0], "text": x[..., :6]}
        more = dict.fromkeys(("segment_ids", "group_ids", "text_segment_ids"), ids)
        return model.init(key, struct(fields, **more))

    shaped = jax.eval_shape(
        shapes, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, 12), jnp.float32)
    )
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return model, jax.tree.map(draw, nn.unbox(shaped))


def test_states_are_projected_token_by_token(of_states, jit):
    """Two linear layers and a GELU between, computed here in float64."""
    model, params = of_states
    states = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    states[:, 0] = 0
    encode = jit(functools.partial(model.apply, method="encode_text"))
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


def test_a_dropped_caption_leaves_the_beginning(of_states, drop, inputs, jit):
    """To the model, what is dropped is a caption of no states, whatever it was."""
    model, params = of_states
    rng = np.random.default_rng(2)
    ids = np.zeros((2, LENGTH), np.int32)
    ids[0, :5], ids[0, 5:9], ids[0, 9:11], ids[1, :3] = 1, 2, 3, 1
    text = np.where(ids[..., None] > 0, rng.normal(size=(2, LENGTH, 6)), 0).astype(np.float32)
    text[0, [0, 5, 9]], text[1, 0] = 0, 0
    left = drop(ids, [[1, 0, 0], [1, 0, 0]])
    assert left[0].tolist() == [1, 0, 0, 0, 0, 2, 2, 2, 2, 3, 3] + [0] * (LENGTH - 11)
    assert left[1].tolist() == [1] + [0] * (LENGTH - 1)
    apply = jit(model.apply)

    def forward(text, ids):
        return np.asarray(apply(params, struct(inputs, text=text, text_segment_ids=ids)))

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
    reads, tiny, params, of_states, inputs, jit
):
    model, params = (tiny(), params) if reads == "bytes" else of_states
    given = dict(inputs)
    if reads == "states":
        text = np.random.default_rng(3).normal(size=(*inputs["text"].shape, 6))
        given["text"] = text.astype(np.float32)
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

    apply = jit(model.apply)
    out = np.asarray(apply(params, struct(given)))
    # Bit for bit: converted once or at every step, the numbers are the same ...
    assert np.array_equal(np.asarray(apply(ready, struct(given))), out)
    # ... and those of the other layers would not be.
    lower = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
    assert not np.array_equal(np.asarray(apply(lower, struct(given))), out)


def test_float32_parameters_stay_for_float32(params):
    ready = prepared(params, jnp.float32)
    for ours, theirs in zip(jax.tree.leaves(ready), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
