"""Bytes as text: whole characters, captions that do not see each other, and the empty prompt."""

import functools

import numpy as np
import pytest

from dit_jax.diffusion import drop_captions
from dit_jax.models import ByteEncoderConfig, byte_tokens
from dit_jax.models.text import BEGIN, FIRST_BYTE, VOCABULARY
from dit_jax.types import PAD


def caption_of(tokens: np.ndarray) -> str:
    """The inverse of ``byte_tokens``; raises where a character was cut."""
    assert tokens[0] == BEGIN and (tokens[1:] >= FIRST_BYTE).all() and (tokens < VOCABULARY).all()
    return bytes((tokens[1:] - FIRST_BYTE).astype(np.uint8).tolist()).decode("utf-8")


# --- tokens ---


def test_bytes_follow_the_beginning():
    tokens = byte_tokens("aé", 63)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [1, 2 + 0x61, 2 + 0xC3, 2 + 0xA9]


def test_an_empty_caption_is_the_beginning_alone():
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
        ({"width": 0}, "width 0"),
        ({"depth": -1}, "depth -1"),
        ({"max_bytes": 0}, "max_bytes 0"),
        ({"width": 10, "heads": 4}, "10 does not divide into 4 heads"),
    ],
)
def test_nonsense_encoders_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ByteEncoderConfig(**fields)


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


def test_a_dropped_caption_is_the_empty_prompt(encode, drop):
    text, ids = rows_of(["red circle", "sky"], ["sea"])
    left = drop(ids, [[1, 0, 0], [0, 0, 0]])
    assert left[0].tolist() == [1] + [0] * 10 + [2] * 4 + [0] * 9
    assert np.array_equal(left[1], ids[1])
    out, kept = encode(text, left), encode(text, ids)
    empty = encode(*rows_of(["", "sky"], [""]))
    # Bit for bit: what is hidden has a weight of exactly zero.
    assert np.array_equal(out[0, 0], empty[0, 0]) and np.array_equal(out[0, 0], empty[1, 0])
    assert not np.array_equal(out[0, 0], kept[0, 0])
    assert np.array_equal(out[left == 2], kept[ids == 2])
    assert np.array_equal(out[1], kept[1])


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
