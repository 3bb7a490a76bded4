"""DiT as published: sizes and flops of the paper's table, positions, clocks and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import check_types
from dit_jax.model import (
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
from dit_jax.parallel import xla_attention
from dit_jax.types import Runtime
from tests.denoiser import struct

# Peebles & Xie 2022, table 4: preset, patch of a 32 x 32 latent, GMACs.
TABLE = [("S", 8, 0.36), ("S", 4, 1.41), ("S", 2, 6.06), ("B", 2, 23.01), ("L", 2, 80.71)]
TABLE += [("XL", 2, 118.64)]


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


@pytest.mark.parametrize(("preset", "patch", "gmacs"), TABLE)
def test_the_papers_table(preset, patch, gmacs):
    tokens = np.array([(32 // patch) ** 2])
    count = forward_flops(model_config(preset, patch), tokens, np.array([1]))[0] / 2e9
    # The paper's counter adds operations of the norms, up to 0.1 %; its figures have two decimals.
    assert count == pytest.approx(gmacs, rel=1e-3, abs=0.005)


def test_the_parameters_of_xl_2_to_the_last():
    d, layers, p, classes = 1152, 28, 16, 1000
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d)
    block += d * 6 * d + 6 * d
    ends = (p * d + d) + (d * 2 * d + 2 * d) + (d * 2 * p + 2 * p)
    embeddings = (256 * d + d) + (d * d + d) + (classes + 1) * d
    config = model_config("XL", 2)
    # Layers are scanned, as on accelerators: traced once.
    init = build(config, "tpu").init
    shapes = jax.eval_shape(init, jax.random.key(0), inputs(config, [1]))
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))
    assert count == layers * block + ends + embeddings == 674_834_720


@pytest.mark.parametrize(
    ("scale", "offset", "told"), [(1000.0, -1.0, 499.0), (-1.0, 1.0, 0.5), (1000.0, 0.0, 500.0)]
)
def test_clocks(scale, offset, told):
    rates = np.exp(-np.log(1e4) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(told * rates), np.sin(told * rates)])
    found = time_features(jnp.array([[0.5]]), scale, offset)
    # Float32 angles of some hundred radians.
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)


DIT = {"width": 24, "depth": 2, "heads": 2, "rotary": False, "qk_norm": False, "time_std": 0.02}
SMALL = ModelConfig(
    DiTConfig(**DIT, absolute_positions="wh", cross_attention=False),
    PatchConfig(1, 1, 1, 4),
    NoTextConfig(),
    "float32",
    learned_variance=True,
    conditioners={"label": ClassLabels(5)},
)


@pytest.fixture(scope="module")
def fresh():
    """A compiled forward pass of the small model, and its parameters as it initialises them."""
    model = build(SMALL)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs(SMALL, [0, 1, 2])))
    return jax.jit(model.apply), params


@pytest.fixture(scope="module")
def small(fresh):
    """The same with parameters of which none is zero."""
    apply, params = fresh
    rng = np.random.default_rng(1)
    return apply, jax.tree.map(lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape)), params)


def test_a_fresh_model_gives_zeros_twice_a_patch(fresh):
    apply, params = fresh
    assert np.array_equal(apply(params, inputs(SMALL, [0, 3, 1])), np.zeros((3, 4, 8)))
    dit = params["params"]["dit"]
    assert np.std(dit["time"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert "q_norm" not in dit["blocks"]["self_attention"]


def test_a_class_is_a_row_of_the_table(small):
    apply, params = small
    out = apply(params, inputs(SMALL, [0, 1, None]))
    assert len({x.tobytes() for x in np.asarray(out)}) == 3
    # Classes whose rows are exchanged are exchanged; a hidden label is the table's last row.
    name = "conditioners_label"
    table = params["params"][name]["embedding"][np.array([5, 0, 2, 3, 4, 1])]
    exchanged = {"params": {**params["params"], name: {"embedding": table}}}
    np.testing.assert_allclose(apply(exchanged, inputs(SMALL, [1, None, 0])), out, atol=1e-6)


def test_packed_classes_are_those_of_their_segments(small):
    apply, params = small
    alone = apply(params, inputs(SMALL, [0, 4, 2]))[:2]
    given = inputs(SMALL, [0, 4])
    row = {n: getattr(given, n) for n in ("tokens", "positions", "text")}
    row = {name: x.reshape(1, -1, *x.shape[2:]) for name, x in row.items()}
    groups = jnp.array([[0] * 4 + [1] * 4])
    row |= {"segment_ids": groups + 1, "group_ids": groups, "group_t": jnp.full((1, 2), 0.5)}
    of_segments = {"segment_fields": {"label": jnp.array([[0, 4]])}}
    packed = apply(params, struct(row, text_segment_ids=jnp.array([[1, 2]]), **of_segments))
    # Sums of other lengths round otherwise.
    np.testing.assert_allclose(packed[0].reshape(alone.shape), alone, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_fields(SMALL, {}, {"label": np.int32(5)}, "x"), "label 5, .* 0 to 4"),
        (lambda: check_fields(SMALL, {}, {"fps": np.float32(8)}, "x"), "no segment field 'label'"),
        (lambda: ModelConfig(DiTConfig(), text=NoTextConfig()), "nothing to read"),
        (lambda: check_types(ClassLabels(0), "label"), "label.classes is 0"),
        (lambda: DiTConfig(width=18, heads=3, absolute_positions="wh"), "is 18.*multiple of 4"),
        (lambda: DiTConfig(time_scale=0), "time_scale"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
