"""A tiny model, a packed batch of it, and its train step on any mesh, each compiled once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dit_jax.data import PackingConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, global_batch, make_mesh
from dit_jax.training import OptimizerConfig, abstract_state, make_optimizer, make_step
from dit_jax.training.video_task import batch_loss, init_params, make_model, tokenize
from tests.packed import pack_rows

# Eight heads, so that every axis of the mesh can have all eight devices; layers are scanned, as on
# accelerators, so that their parameters are stacked.
MODEL = ModelConfig(
    dit=DiTConfig(64, 2, 8, mlp_dim=64, scan=True, absolute_positions="thw", pooled_text=True),
    patch=PatchConfig(t=1, h=2, w=2, channels=3, reference_fps=8.0),
    text=ByteEncoderConfig(width=16, depth=1, heads=8, max_bytes=7),
)
PACKING = PackingConfig(rows=8, row_tokens=16, row_text=24, row_segments=3)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=0.1, weight_decay=0.1)
STEPS = 20
SEED = 3


def random_params(shapes: Any) -> Any:
    """Parameters none of which is zero, so that every path has a gradient."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind, normal = path[-1].key, rng.normal(size=leaf.shape)
        if kind == "kernel":
            value = normal / np.sqrt(leaf.shape[-2])
        else:
            value = {"scale": 1 + 0.2 * normal, "bias": 0.2 * normal, "embedding": normal}[kind]
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Rig(NamedTuple):
    """The tiny model on one mesh: as the training loop puts it together."""

    mesh: Any
    init: Callable[[jax.Array], Any]
    shapes: Any
    shardings: Any
    loss: Callable[..., Any]
    step: Any
    start: Callable[[], Any]

    def state(self) -> Any:
        """The state that every rig starts from, laid out over this mesh."""
        return jax.device_put(self.start(), self.shardings)

    def put(self, batch: Any) -> Any:
        """A NumPy batch on this mesh."""
        rows = len(batch.tokens)
        return global_batch(self.mesh, batch, tuple(range(rows)), rows)


@pytest.fixture(scope="package")
def rig():
    """``rig(data, fsdp, context, tensor, accumulate=1)`` on as many devices as that takes."""

    @functools.cache
    def start():
        shapes = build(1, 1, 1, 1).shapes
        params = random_params(shapes.params)
        ema = jax.tree.map(lambda x: x + np.float32(0.5), params)
        # Adam begins with zeros throughout.
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return dataclasses.replace(zeros, params=params, ema=ema)

    @functools.cache
    def build(data, fsdp, context, tensor, accumulate=1):
        sizes = MeshConfig(data, fsdp, context, tensor)
        mesh = make_mesh(sizes, jax.devices()[: data * fsdp * context * tensor])
        model = make_model(MODEL, mesh)
        init = functools.partial(init_params, model)
        config = dataclasses.replace(OPTIMIZER, accumulate=accumulate)
        optimizer = make_optimizer(config, STEPS)
        shapes, shardings = abstract_state(init, optimizer, mesh)
        loss = functools.partial(batch_loss, model, DiffusionConfig())
        step = make_step(loss, optimizer, config, SEED, shardings)
        return Rig(mesh, init, shapes, shardings, loss, step, start)

    return build


@pytest.fixture(scope="package")
def random_clips():
    """``random_clips(count, seed)``: of 1 to 6 tokens with captions of 0 to 7 letters, tokenized."""

    def make(count, seed):
        rng = np.random.default_rng(seed)
        sizes = [(1, 2, 2), (2, 2, 4), (1, 4, 4), (3, 4, 2), (5, 2, 2)]
        clips = []
        for i in range(count):
            pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)
            sample = {"video": pixels, "caption": "abcdefg"[: i % 8], "fps": 4.0 + i % 3}
            clips.append(tokenize(MODEL, sample))
        return clips

    return make


@pytest.fixture(scope="package")
def batches(random_clips):
    """Three different NumPy batches of three segments a row, with padding."""
    clips = (random_clips(3 * PACKING.rows, seed) for seed in range(3))
    return [
        pack_rows([one[3 * r : 3 * r + 3] for r in range(PACKING.rows)], PACKING) for one in clips
    ]
