"""What a compiler is told of a task, against what the task does: shapes, dtypes and shardings."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import load_config
from dit_jax.model import forward_flops
from dit_jax.parallel import AttentionConfig, MeshConfig, global_batch, make_mesh
from dit_jax.plan.abstract import abstract_denoise, abstract_task
from dit_jax.sampling import Generator, Request, make_clips, plain
from dit_jax.training import OptimizerConfig, abstract_params
from dit_jax.training.video_task import init_params, make_model
from tests import tiny_config


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])


@pytest.fixture(scope="module", params=["bytes", "states"])
def config(request, latents):
    if request.param == "states":
        return latents
    return dataclasses.replace(
        tiny_config.get_config(),
        # One clip is made below, of 3 x 3 x 3 tokens, which context does not divide.
        sampling=dataclasses.replace(latents.sampling, frames=5, height=24, width=24),
    )


def assert_alike(expected, found, but_for=()):
    """Leaves of equal shapes and dtypes, that lie alike but for those named."""
    paths, structure = jax.tree_util.tree_flatten_with_path(expected)
    assert structure == jax.tree.structure(found)
    for (path, ours), theirs in zip(paths, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        assert ours.shape == theirs.shape, where
        assert ours.dtype == theirs.dtype, where
        if where not in but_for:
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim), (
                where,
                ours.sharding,
                theirs.sharding,
            )


def test_a_train_step_is_told_what_it_is_given(config, mesh):
    abstract, packing = abstract_task(config, mesh), config.data.packing
    task = config.build(mesh)
    rows = tuple(range(task.rows))
    loader = task.loader(rows)
    batch = global_batch(mesh, next(loader), rows, task.rows)
    loader.close()
    assert_alike(abstract.batch, batch)
    # Tokens are spread over all four devices, texts over the two that hold different rows.
    whole = batch.tokens.size // 4, batch.text.size // 2
    parts = (batch.tokens, batch.text)
    assert tuple(part.addressable_shards[0].data.size for part in parts) == whole
    assert abstract_params(abstract.init, mesh) == abstract_params(task.init, mesh)
    assert abstract.tokens == packing.rows * packing.row_tokens
    full = np.array([packing.row_tokens]), np.array([packing.row_text])
    # Three forward passes of full rows. Exact: whole numbers below 2^53.
    assert abstract.flops == 3 * packing.rows * forward_flops(config.model, *full)[0]


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((8, 1, 1), {}, "packing.rows 4 .* do not divide over mesh.data x mesh.fsdp = 8"),
        (
            (2, 2, 2),
            {"optimizer": OptimizerConfig(accumulate=4)},
            "rows 4 in optimizer.accumulate 4 parts do not divide over",
        ),
        ((1, 1, 3), {}, "packing.row_tokens 16 do not divide over mesh.context 3: make them a"),
        (
            (2, 2, 2),
            {"attention": AttentionConfig(ulysses=8)},
            "attention.ulysses 8 must divide mesh.context 2",
        ),
    ],
)
def test_batches_that_cannot_be_laid_out_are_refused(latents, sizes, changes, message):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with pytest.raises(ValueError, match=message):
        abstract_task(dataclasses.replace(latents, **changes), mesh)


class Seen(Exception):
    """Raised in place of the first step."""


@pytest.fixture
def first_step(mesh):
    """``first_step(config, clips)``: what a generator gives its first step for clips of the config."""

    def run(config, clips=1):
        made, text = config.sampling, config.model.text
        model = make_model(config.model, mesh, config.attention)
        generator = Generator(model, config.diffusion, made)
        shapes, shardings = abstract_params(partial(init_params, model), mesh, over_context=False)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        states = np.ones((3, text.dim), np.float16) if hasattr(text, "dim") else None
        size = (made.frames, made.height, made.width, made.fps)
        seen = []

        def step(*arguments, **_):
            seen.append(arguments)
            raise Seen

        generator.step = step
        requests = clips * [plain(Request("a red circle", *size, seed=3, text_states=states))]
        with pytest.raises(Seen):
            make_clips(generator, jax.device_put(zeros, shardings), requests, mesh)
        return seen[0]

    return run


# Levels of noise and their count are numbers of the host, which lie nowhere yet.
HOST = ("[5]", "[6]", "[7]", "[1].history.t", "[1].history.t_earlier")


# One guided clip is two rows, one for each of data's devices; one that is not guided is made twice.
@pytest.mark.parametrize(
    ("config", "made", "model", "clips", "rows", "texts"),
    [
        ("bytes", {"cfg_scale": 1.0}, {}, 1, 2, 2),
        # What this solver remembers is on the host too.
        ("states", {"solver": "unipc"}, {}, 2, 2, 4),
        ("states", {}, {"dtype": "bfloat16"}, 1, 1, 2),
    ],
    indirect=["config"],
)
def test_a_step_of_the_solver_is_given_what_the_generator_gives(
    config, mesh, first_step, made, model, clips, rows, texts
):
    sampling = dataclasses.replace(config.sampling, **made)
    model = dataclasses.replace(config.model, **model)
    config = dataclasses.replace(config, sampling=sampling, model=model)
    given = first_step(config, clips)
    assert (given[1][0].shape[0], given[3].shape[0]) == (rows, texts)
    abstract = abstract_denoise(config, mesh, rows)
    assert_alike(abstract.arguments, given, HOST)
    # Parameters are in the dtype that layers compute in, but for what is always in float32.
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(abstract.arguments[0])}
    layers = model.dtype.replace("auto", "float32")
    assert dtypes == {layers, "float32"} and given[3].dtype == layers
    count = model.patch.num_tokens(sampling.frames, sampling.height, sampling.width)
    # The text is encoded once, before the first step.
    letters = np.array([model.text.max_tokens])
    once = forward_flops(model, np.array([count]), letters, encode_text=False)
    assert abstract.flops == texts * once[0]


@pytest.mark.parametrize("name", ["quickstart", "dit_xl2_imagenet256", "video_1b3"])
def test_configs_trace_with_the_kernel_of_tpus(name):
    """Texts and clips of all lengths: the kernel takes blocks, and pads what is shorter."""
    config = load_config(f"configs/{name}.py")
    dit = dataclasses.replace(config.model.dit, depth=2)  # of many alike
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))
    config = dataclasses.replace(config, attention=AttentionConfig(kernel="splash"))
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    task = abstract_task(config, mesh)
    params = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    total, _ = jax.eval_shape(task.loss, params, {}, task.batch, jax.random.key(0))
    assert total.shape == ()
    step = abstract_denoise(config, mesh)
    (made, _), _ = jax.eval_shape(step.function, *step.arguments)
    assert made.shape == step.arguments[1][0].shape
    # And the text, which is encoded apart.
    model = make_model(config.model, mesh, config.attention)
    condition = step.arguments[2]
    given = (condition.text, condition.text_segment_ids)
    states = jax.eval_shape(partial(model.apply, method="encode_text"), params, *given)
    assert states.shape[:2] == condition.text.shape[:2]
