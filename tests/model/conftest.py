"""A tiny text-to-video model with random parameters, packed rows for it, and its compiled forward.

Everything here is made once for all tests of the models, compiled functions above all.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.data import PackingConfig, Tokenized
from dit_jax.model import (
    ByteEncoderConfig,
    DiTConfig,
    ModelConfig,
    PatchConfig,
    TextToVideo,
    positions,
)
from dit_jax.parallel import xla_attention
from dit_jax.types import Attention, DotGeneral, Runtime
from tests.denoiser import byte_tokens, struct
from tests.packed import pack_rows

ROWS = PackingConfig(row_tokens=32, row_text=24, row_segments=3)


def make_segment(
    config: ModelConfig,
    seed: int,
    size: tuple[int, int, int],
    levels: tuple[float, float] = (0.7, 0.1),
    caption: str = "a red circle",
) -> Tokenized:
    """One clip or image to pack. Its first frame is its second group; groups have noise ``levels``."""
    places, frames = positions(config.patch, *size, fps=24.0)
    tokens = np.random.default_rng(seed).normal(size=(len(places), config.patch.dim))
    return {
        "tokens": tokens.astype(np.float32),
        "positions": places,
        "frame_ids": frames,
        "text": byte_tokens(caption, 15),
        "token_fields": {"group": (frames == 0).astype(np.int32)},
        "segment_fields": {"levels": np.float32(levels)},
    }


def pack(rows: Sequence[Sequence[Tokenized]]) -> dict[str, np.ndarray]:
    """The model's arguments: segments side by side, the rest of every row padding."""
    batch = pack_rows(rows, ROWS)
    names = ("tokens", "positions", "segment_ids", "text", "text_segment_ids")
    groups = 2 * np.maximum(batch.segment_ids - 1, 0) + batch.token_fields["group"]
    levels = batch.segment_fields["levels"].reshape(len(rows), -1)
    return {**{n: getattr(batch, n) for n in names}, "group_ids": groups, "group_t": levels}


def make_model(
    attention: Attention = xla_attention,
    dot_general: DotGeneral = jax.lax.dot_general,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **changes: Any,
) -> TextToVideo:
    """The tiny model; ``changes`` are fields of ``DiTConfig``."""
    dit = dataclasses.replace(DiTConfig(width=32, depth=2, heads=2, scan=False), **changes)
    text = ByteEncoderConfig(width=16, depth=1, heads=2, max_bytes=15)
    config = ModelConfig(dit, PatchConfig(1, 2, 2, channels=3), text, dtype)
    return TextToVideo(
        config, Runtime(attention, dot_general=dot_general, block_dot_general=dot_general)
    )


@functools.cache
def abstract_params(model: TextToVideo) -> Any:
    """Shapes of the parameters, boxed with their logical axes; nothing is computed."""
    inputs = pack([[make_segment(model.config, 0, (1, 4, 4))]])
    return jax.eval_shape(lambda key, x: model.init(key, struct(x)), jax.random.key(0), inputs)


@functools.cache
def compiled(
    model: TextToVideo, loss: Callable[..., jax.Array] | None = None
) -> Callable[..., Any]:
    """The compiled model of ``(params, inputs)``, or the gradient of a ``loss`` of its outputs."""
    if loss is None:
        return jax.jit(model.apply)
    return jax.jit(jax.value_and_grad(lambda params, x: loss(model.apply(params, x))))


@pytest.fixture(scope="session")
def other_ways() -> dict[str, bool]:
    """Fields of ``DiTConfig`` by which the model is told of places and text in its other ways."""
    return {"absolute_positions": "thw", "pooled_text": True, "cross_attention": False}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TextToVideo]:
    return make_model


@pytest.fixture(scope="session")
def model() -> TextToVideo:
    return make_model()


@pytest.fixture(scope="session")
def segment(model) -> Callable[..., Tokenized]:
    """``segment(seed, (frames, height, width), levels=, caption=)``"""
    return lambda seed, size, **more: make_segment(model.config, seed, size, **more)


@pytest.fixture(scope="session")
def packed() -> Callable[..., dict[str, np.ndarray]]:
    return pack


@pytest.fixture(scope="session")
def inputs(segment) -> dict[str, np.ndarray]:
    """Two rows: three segments of several sizes and texts; one segment without a caption."""
    return pack(
        [
            [
                segment(1, (2, 4, 6)),
                segment(2, (1, 4, 4), levels=(0.9, 0.9), caption="sky"),
                segment(3, (3, 2, 4), levels=(0.4, 0.0), caption="é"),
            ],
            [segment(4, (4, 4, 6), levels=(0.2, 0.05), caption="")],
        ]
    )


def random_params(model: TextToVideo) -> Any:
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":  # of norms
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        size = 0.2 if path[-1].key == "kernel" else 0.5
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_params(model)))


@pytest.fixture(scope="session")
def params_of() -> Callable[[TextToVideo], Any]:
    """Random parameters of a model, none of them zero, so that every branch counts."""
    return random_params


@pytest.fixture(scope="session")
def params(model) -> Any:
    return random_params(model)


@pytest.fixture(scope="session")
def boxed() -> Callable[[TextToVideo], Any]:
    return abstract_params


@pytest.fixture(scope="session")
def fresh(model, inputs) -> Any:
    """Parameters as the model initialises them."""
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), struct(inputs)))


@pytest.fixture(scope="session")
def apply() -> Callable[..., np.ndarray]:
    """``apply(model, params, **inputs)``, compiled once for each model."""
    return lambda model, params, **inputs: np.asarray(compiled(model)(params, struct(inputs)))


@pytest.fixture(scope="session")
def forward(model, apply) -> Callable[..., np.ndarray]:
    """``forward(params, **inputs)``: the compiled model, unrolled, in float32."""
    return functools.partial(apply, model)


@pytest.fixture(scope="session")
def loss_and_gradients(inputs):
    """``loss_and_gradients(model, params)`` of a loss that every output counts in."""
    weights = np.random.default_rng(5).normal(size=inputs["tokens"].shape).astype(np.float32)

    def loss(outputs):
        return (outputs * weights).mean()

    def compute(model, params):
        return jax.tree.map(np.asarray, compiled(model, loss)(params, struct(inputs)))

    return compute
