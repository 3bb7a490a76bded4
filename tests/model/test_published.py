"""DiT as published: sizes and flops of the paper's table, positions, clocks and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import check_types
from dit_jax.model import (
    ByteEncoderConfig,
    ClassLabels,
    DiTConfig,
    ModelConfig,
    NoTextConfig,
    PatchConfig,
    TextToVideo,
    check_fields,
    forward_flops,
    published,
)
from dit_jax.model.dit import time_features
from dit_jax.model.patches import absolute_features
from dit_jax.parallel import xla_attention
from dit_jax.types import Runtime
from tests.denoiser import struct

# Peebles & Xie 2022, table 4: GMACs at patches of 8, 4 and 2 of a 32 x 32 latent, and parameters.
TABLE = {
    "S": ((0.36, 1.41, 6.06), 33),
    "B": ((1.42, 5.56, 23.01), 130),
    "L": ((5.01, 19.70, 80.71), 458),
    "XL": ((7.39, 29.05, 118.64), 675),
}


def model_config(preset, patch):
    return ModelConfig(
        published(preset),
        PatchConfig(1, patch, patch, 4),
        NoTextConfig(),
        learned_variance=True,
        conditioners={"label": ClassLabels()},
    )


def build(config, platform="cpu"):
    return TextToVideo(config.on(platform), Runtime(xla_attention))


def count_parameters(config):
    # Layers are scanned, as on accelerators: traced once.
    init = build(config, "tpu").init
    shapes = jax.eval_shape(init, jax.random.key(0), inputs(config, [1]))
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))


def inputs(config, labels, l=4, t=0.5):
    """One row for each label, each one segment of a column of tokens; None is a dropped label."""
    b = len(labels)
    ids = jnp.ones((b, l), jnp.int32)
    text = jnp.asarray([config.text.tokens("")] * b)
    return struct(
        tokens=jnp.ones((b, l, config.patch.dim)),
        positions=jnp.zeros((b, l, 3)).at[..., 1].set(jnp.arange(l)),
        segment_ids=ids,
        group_ids=ids * 0,
        group_t=jnp.full((b, 1), t),
        text=text,
        text_segment_ids=text,
        dropped=jnp.array([[float(label is None)] for label in labels]),
        segment_fields={"label": jnp.array([[label or 0] for label in labels], jnp.int32)},
    )


@pytest.mark.parametrize(
    ("preset", "patch"), [("S", 8), ("S", 4), ("S", 2), ("B", 2), ("L", 2), ("XL", 2)]
)
def test_the_papers_table(preset, patch):
    config = model_config(preset, patch)
    gmacs = forward_flops(config, np.array([(32 // patch) ** 2]), np.array([1]))[0] / 2e9
    # The paper's counter adds operations of the norms, up to 0.1 %; its figures have two decimals.
    assert gmacs == pytest.approx(TABLE[preset][0][(8, 4, 2).index(patch)], rel=1e-3, abs=0.005)
    assert count_parameters(config) / 1e6 == pytest.approx(TABLE[preset][1], rel=0.01)


def test_the_parameters_of_xl_2_to_the_last():
    d, layers, p, classes = 1152, 28, 16, 1000
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d)
    block += d * 6 * d + 6 * d
    ends = (p * d + d) + (d * 2 * d + 2 * d) + (d * 2 * p + 2 * p)
    embeddings = (256 * d + d) + (d * d + d) + (classes + 1) * d
    count = count_parameters(model_config("XL", 2))
    assert count == layers * block + ends + embeddings == 674_834_720


def test_positions_are_of_columns_and_then_of_rows():
    d, places = 16, np.array([[[5.0, 2.0, 3.0]]], np.float32)
    rates = 1 / 1e4 ** (np.arange(4) / 4)
    expected = np.concatenate([f(x * rates) for x in (3.0, 2.0) for f in (np.sin, np.cos)])
    found = absolute_features("wh", jnp.asarray(places), d, 1e4)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "offset", "told"), [(1000.0, -1.0, 499.0), (-1.0, 1.0, 0.5), (1000.0, 0.0, 500.0)]
)
def test_clocks(scale, offset, told):
    rates = np.exp(-np.log(1e4) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(told * rates), np.sin(told * rates)])
    found = time_features(jnp.array([[0.5]]), scale, offset)
    # Float32 angles of some hundred radians.
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)


SMALL = ModelConfig(
    DiTConfig(
        width=24,
        depth=2,
        heads=2,
        rotary=False,
        qk_norm=False,
        absolute_positions="wh",
        cross_attention=False,
        time_std=0.02,
    ),
    PatchConfig(1, 1, 1, 4),
    NoTextConfig(),
    "float32",
    learned_variance=True,
    conditioners={"label": ClassLabels(5)},
)


@pytest.fixture(scope="module")
def small(jit):
    """The small model with parameters of which none is zero, and a compiled forward pass."""
    model = build(SMALL)
    params = nn.unbox(jit(model.init)(jax.random.key(0), inputs(SMALL, [0, 1, 2])))
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape)), params)
    return drawn, jit(model.apply)


def test_a_fresh_model_gives_zeros_twice_a_patch(jit):
    model = build(SMALL)
    given = inputs(SMALL, [0, 3, 1])
    params = jit(model.init)(jax.random.key(0), given)
    assert np.array_equal(jit(model.apply)(params, given), np.zeros((3, 4, 8)))
    std = np.std(nn.unbox(params)["params"]["dit"]["time"]["up"]["kernel"])
    assert std == pytest.approx(0.02, rel=0.05)
    assert "q_norm" not in nn.unbox(params)["params"]["dit"]["blocks"]["self_attention"]


def test_a_class_is_a_row_of_the_table(small):
    params, apply = small
    out = apply(params, inputs(SMALL, [0, 1, None]))
    assert len({x.tobytes() for x in np.asarray(out)}) == 3
    # Classes whose rows are exchanged are exchanged; a hidden label is the table's last row.
    name = "conditioners_label"
    table = params["params"][name]["embedding"][jnp.array([5, 0, 2, 3, 4, 1])]
    exchanged = {"params": {**params["params"], name: {"embedding": table}}}
    again = apply(exchanged, inputs(SMALL, [1, None, 0]))
    np.testing.assert_allclose(again, out, atol=1e-6)


def test_packed_classes_are_those_of_their_segments(small):
    params, apply = small
    alone = apply(params, inputs(SMALL, [0, 4, 2]))[:2]
    given = inputs(SMALL, [0, 4])
    row = lambda x: x.reshape(1, -1, *x.shape[2:])  # noqa: E731
    segments = jnp.array([[1] * 4 + [2] * 4])
    packed = apply(
        params,
        struct(
            tokens=row(given.tokens),
            positions=row(given.positions),
            segment_ids=segments,
            group_ids=segments - 1,
            group_t=jnp.full((1, 2), 0.5),
            text=row(given.text),
            text_segment_ids=jnp.array([[1, 2]]),
            segment_fields={"label": jnp.array([[0, 4]])},
        ),
    )
    # Sums of other lengths round otherwise.
    np.testing.assert_allclose(packed[0].reshape(alone.shape), alone, atol=2e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="label 5, .* 0 to 4"):
        check_fields(SMALL, {}, {"label": np.int32(5)}, "the sample")
    with pytest.raises(ValueError, match="has no segment field 'label'"):
        check_fields(SMALL, {}, {"fps": np.float32(8)}, "the sample")
    with pytest.raises(ValueError, match="nothing to read"):
        ModelConfig(DiTConfig(), text=NoTextConfig())
    with pytest.raises(ValueError, match="label.classes is 0"):
        check_types(ClassLabels(0), "label")
    with pytest.raises(ValueError, match="width is 18.*multiple of 4"):
        DiTConfig(width=18, heads=3, absolute_positions="wh")
    with pytest.raises(ValueError, match="time_scale"):
        DiTConfig(time_scale=0)
    assert ByteEncoderConfig().max_tokens == 64
