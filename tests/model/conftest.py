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

ROW_TOKENS, ROW_TEXT, ROW_SEGMENTS = 32, 24, 3

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Makes XLA compile for CPUs some seven times as fast; the models here are too small to mind."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """One clip or image to pack."""

    tokens: np.ndarray
    positions: np.ndarray
    held: np.ndarray
    """1 where a token belongs to the second conditioning group of its segment."""
    levels: tuple[float, float]
    """Noise levels of the two groups."""
    caption: str


def make_segment(
    config: ModelConfig,
    seed: int,
    size: tuple[int, int, int],
    levels: tuple[float, float] = (0.7, 0.1),
    caption: str = "a red circle",
) -> Segment:
    rng = np.random.default_rng(seed)
    places, frames = positions(config.patch, *size, fps=24.0)
    tokens = rng.normal(size=(len(places), config.patch.dim)).astype(np.float32)
    return Segment(tokens, places, (frames == 0).astype(np.int32), levels, caption)


def pack(rows: Sequence[Sequence[Segment]], max_bytes: int = 15) -> dict[str, np.ndarray]:
    """The model's arguments: segments side by side, the rest of every row padding."""
    dim, shape = rows[0][0].tokens.shape[-1], (len(rows), ROW_TOKENS)
    ids = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "group_ids")}
    tokens, places = np.zeros((*shape, dim), np.float32), np.zeros((*shape, 3), np.float32)
    levels = np.zeros((len(rows), 2 * ROW_SEGMENTS), np.float32)
    text, text_ids = (np.zeros((len(rows), ROW_TEXT), np.int32) for _ in range(2))
    for r, row in enumerate(rows):
        start = text_start = 0
        for j, segment in enumerate(row):
            letters = byte_tokens(segment.caption, max_bytes)
            span = slice(start, start + len(segment.tokens))
            text_span = slice(text_start, text_start + len(letters))
            tokens[r, span], places[r, span] = segment.tokens, segment.positions
            ids["segment_ids"][r, span] = j + 1
            ids["group_ids"][r, span] = 2 * j + segment.held
            levels[r, 2 * j : 2 * j + 2] = segment.levels
            text[r, text_span], text_ids[r, text_span] = letters, j + 1
            start, text_start = span.stop, text_span.stop
    return {
        "tokens": tokens,
        "positions": places,
        **ids,
        "group_t": levels,
        "text": text,
        "text_segment_ids": text_ids,
    }


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


def abstract_params(model: TextToVideo) -> Any:
    """Shapes of the parameters, boxed with their logical axes; nothing is computed."""
    inputs = pack([[make_segment(model.config, 0, (1, 4, 4))]])
    return jax.eval_shape(lambda key, x: model.init(key, struct(x)), jax.random.key(0), inputs)


@pytest.fixture(scope="session")
def jit() -> Callable[..., Any]:
    """``jax.jit`` that compiles quickly."""
    return functools.partial(jax.jit, compiler_options=QUICK)


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
def segment(model) -> Callable[..., Segment]:
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
def fresh(model, inputs, jit) -> Any:
    """Parameters as the model initialises them."""
    return nn.unbox(jit(lambda key, x: model.init(key, struct(x)))(jax.random.key(0), inputs))


@pytest.fixture(scope="session")
def forward(model, jit) -> Callable[..., np.ndarray]:
    """``forward(params, **inputs)``: the compiled model, unrolled, in float32."""
    apply = jit(model.apply)
    return lambda params, **inputs: np.asarray(apply(params, struct(inputs)))


@pytest.fixture(scope="session")
def loss_and_gradients(inputs, jit):
    """``loss_and_gradients(model, params)`` of a loss that every output counts in."""
    weights = np.random.default_rng(5).normal(size=inputs["tokens"].shape).astype(np.float32)

    def compute(model, params):
        def loss(params, inputs):
            return (model.apply(params, struct(inputs)) * weights).mean()

        return jax.tree.map(np.asarray, jit(jax.value_and_grad(loss))(params, inputs))

    return compute
