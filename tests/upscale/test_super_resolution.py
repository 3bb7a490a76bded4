"""Super-resolution: what is given at low resolution reaches the model, in training and sampling."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.codec import PixelCodec
from dit_jax.config import load_config
from dit_jax.model import forward_flops, patchify, unpatchify
from dit_jax.parallel import MeshConfig, global_batch, make_mesh
from dit_jax.plan.abstract import abstract_task
from dit_jax.sampling import Generator, Request, make_clips, make_inputs, plain, to_float, to_uint8
from dit_jax.training.video_task import eval_requests, make_model, tokenize
from dit_jax.upscale.low_res import LowRes, factor_of
from dit_jax.upscale.resizing import enlarge, shrink
from dit_jax.upscale.super_resolution import (
    SuperResolutionEvaluator,
    enlarging,
    fidelity,
    low_res_field,
)
from tests import tiny_config
from tests.denoiser import struct

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PLAIN = tiny_config.get_config()
CONFIG = dataclasses.replace(
    PLAIN,
    model=dataclasses.replace(
        PLAIN.model, conditioners={"low_res": LowRes(factor=2, augmentation=0.2)}
    ),
    diffusion=dataclasses.replace(PLAIN.diffusion, prediction="x0"),
    sampling=dataclasses.replace(PLAIN.sampling, cfg_scale=1.5, steps=2),
)


def clip(seed=0, frames=5, height=24, width=24):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def built(mesh):
    return CONFIG.build(mesh)


@pytest.fixture(scope="module")
def batch(built):
    loader = built.loader(tuple(range(built.rows)))
    found = next(loader)
    loader.close()
    return found


@pytest.fixture(scope="module")
def params(built):
    """Random ones, none of which is zero."""
    shapes = nn.unbox(jax.eval_shape(built.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)


# --- the data ---


def test_every_segment_has_its_own_clip_at_low_resolution(batch):
    low_res = batch.token_fields["low_res"]
    assert low_res.shape == batch.tokens.shape and low_res.dtype == np.float32
    assert not low_res[batch.segment_ids == 0].any()
    for row, slot in zip(*np.nonzero(batch.num_tokens), strict=True):
        at = batch.segment_ids[row] == slot + 1
        size = next(
            s
            for s in ((f, 24, w) for f in (1, 3, 5) for w in (24, 32))
            if CONFIG.model.patch.num_tokens(*s) == at.sum()
            and batch.positions[row][at][-1, 2] == s[2] // 8 - 1
        )
        patch = CONFIG.model.patch
        video = to_uint8(unpatchify(patch, batch.tokens[row][at], *size))
        given = to_uint8(unpatchify(patch, low_res[row][at], *size))
        assert np.array_equal(given, enlarge(shrink(video, 2), 2))


def test_a_model_that_does_not_enlarge_has_none_of_it(mesh):
    sample = {"video": clip(), "caption": "a", "fps": 8.0}
    assert tokenize(PLAIN.model, sample)["token_fields"] == {}
    assert abstract_task(PLAIN, mesh).batch.token_fields == {}
    plain, other = (
        jax.eval_shape(abstract_task(c, mesh).init, jax.random.key(0))["params"]
        for c in (PLAIN, CONFIG)
    )
    assert set(other) - set(plain) == {"conditioners_low_res"}
    assert set(other["conditioners_low_res"]) == {"embedding", "time"}
    for name in plain:
        shapes = [jax.tree.map(jnp.shape, jax.tree.leaves(tree[name])) for tree in (plain, other)]
        assert shapes[0] == shapes[1]


def test_latents_are_refused():
    sample = {"video": np.zeros((5, 24, 24, 3), np.float32), "caption": "a", "fps": 8.0}
    with pytest.raises(ValueError, match="enlarges clips 2 times and the data are latents"):
        tokenize(CONFIG.model, sample)


def test_the_abstract_batch_is_as_the_loader_makes_it(built, batch, mesh):
    abstract = abstract_task(CONFIG, mesh).batch
    placed = global_batch(mesh, batch, tuple(range(built.rows)), built.rows)
    assert jax.tree.map(jnp.shape, placed) == jax.tree.map(jnp.shape, abstract)
    assert [x.dtype for x in jax.tree.leaves(placed)] == [
        x.dtype for x in jax.tree.leaves(abstract)
    ]
    counts = np.array([10]), np.array([5])
    extra = forward_flops(CONFIG.model, *counts) - forward_flops(PLAIN.model, *counts)
    dim, width = 2 * 8 * 8 * 3, 32
    # Of its patches, and once of its noise level.
    assert extra == 2 * dim * width * 10 + 2 * (256 + width) * width


# --- training and sampling ---


def test_the_loss_has_a_gradient_of_what_is_given(built, params, batch, mesh):
    placed = global_batch(mesh, batch, tuple(range(built.rows)), built.rows)
    found = jax.jit(jax.grad(built.loss, has_aux=True))(params, {}, placed, jax.random.key(0))[0]
    for layer in jax.tree.leaves(found["params"]["conditioners_low_res"]):
        assert np.isfinite(layer).all() and np.abs(layer).max() > 0


def requests(sizes=((5, 24, 24), (1, 24, 32))):
    made = []
    for i, size in enumerate(sizes):
        fields = {"low_res": low_res_field(shrink(clip(i, *size), 2), 2, PixelCodec())}
        level = {"low_res_level": np.float32(0.1)}
        request = Request("a red circle", *size, 8.0, i, segment_fields=level, pixel_fields=fields)
        made.append(request)
    return made


def with_low_res(request, low_res):
    return dataclasses.replace(request, pixel_fields={"low_res": low_res})


def test_a_clip_depends_on_its_own_input_alone_on_every_mesh(params, mesh):
    generator = Generator(make_model(CONFIG.model, mesh), CONFIG.diffusion, CONFIG.sampling)

    def sampled(requests, generator=generator, mesh=mesh):
        return make_clips(generator, params, [plain(one) for one in requests], mesh)

    both = sampled(requests())
    assert [one.shape for one in both] == [(5, 24, 24, 3), (1, 24, 32, 3)]
    # Rows of other lengths are summed in another order: a level of 255 at most.
    assert np.abs(sampled(requests()[1:])[0].astype(int) - both[1]).max() <= 1
    other = [with_low_res(r, -r.pixel_fields["low_res"]) for r in requests()]
    assert np.abs(sampled(other)[0].astype(int) - both[0]).max() > 3
    many = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    spread = Generator(make_model(CONFIG.model, many), CONFIG.diffusion, CONFIG.sampling)
    for one, another in zip(both, sampled(requests(), spread, many), strict=True):
        assert one.std() > 0 and np.abs(one.astype(int) - another).max() <= 1


def test_inputs_have_the_clip_of_each_request(params, mesh):
    made = make_inputs(requests(), CONFIG.model, 40)
    low_res = made.token_fields["low_res"]
    assert low_res.shape == made.tokens.shape
    tokens = patchify(CONFIG.model.patch, requests()[1].pixel_fields["low_res"])
    assert np.array_equal(low_res[1, : len(tokens)], tokens)
    assert not low_res[1, len(tokens) :].any()
    # The generator noises it once, to the level that the requests say.
    generator = Generator(make_model(CONFIG.model, mesh), CONFIG.diffusion, CONFIG.sampling)
    noised = generator.prepare_fields(jax.tree.map(jnp.asarray, made))
    eps = (noised.token_fields["low_res"] - 0.9 * low_res)[made.segment_ids > 0] / 0.1
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    broken = dataclasses.replace(requests()[0], pixel_fields={})
    with pytest.raises(ValueError, match="no token field 'low_res'"):
        make_clips(generator, params, [plain(broken)], mesh)


def test_what_is_given_at_low_resolution_is_noised_in_training():
    one = CONFIG.model.conditioners["low_res"]
    keys = jax.random.split(jax.random.key(0), (64, 4))
    ids = jnp.tile(jnp.repeat(jnp.array([1, 2, 3, 4]), 3), (64, 1))
    low_res = jnp.sin(jnp.arange(64 * 12 * 8, dtype=np.float32)).reshape(64, 12, 8)
    rows = struct(
        tokens=low_res,
        positions=jnp.zeros((64, 12, 3)),
        segment_ids=ids,
        token_ids=jnp.tile(jnp.arange(12), (64, 1)),
        group_ids=ids,
        group_t=jnp.zeros((64, 4)),
        token_fields={"low_res": low_res},
    )
    rows = one.prepare("low_res", keys, rows, True)
    level = np.asarray(rows.segment_fields["low_res_level"])
    # Uniform up to 0.2: Kolmogorov and Smirnov, passed by chance less often than once in 10^4.
    n = level.size
    assert np.abs(np.sort(level.ravel()) / 0.2 - (np.arange(n) + 0.5) / n).max() < 2.23 / n**0.5
    at = np.repeat(level, 3, 1)[..., None]
    eps = ((rows.token_fields["low_res"] - (1 - at) * low_res) / at)[at[..., 0] > 0.02]
    assert abs(eps.mean()) < 4.5 / eps.size**0.5
    assert abs(eps.var() - 1) < 4.5 * (2 / eps.size) ** 0.5


@pytest.mark.parametrize("level", [-0.1, 0.3])
def test_more_noise_than_was_trained_on_is_refused(level):
    with pytest.raises(ValueError, match=f"--augmentation {level}.* 0.2"):
        CONFIG.model.conditioners["low_res"].enlarge([], [], CONFIG, PixelCodec(), level)


# --- what is measured ---


def test_the_report_compares_with_bicubic_enlargement():
    true = [clip(1), clip(2)]
    plain = [enlarge(shrink(one, 2), 2) for one in true]
    found = fidelity(plain, true, 2)
    assert found["gain"] == 0 and found["psnr"] == found["bicubic_psnr"] and found["count"] == 2
    assert fidelity(true, true, 2)["gain"] > 50


def test_cases_are_given_true_clips_at_low_resolution():
    requests, true = eval_requests(CONFIG, PixelCodec(), 3)
    measure = SuperResolutionEvaluator().measure(CONFIG, requests, true)
    assert len(requests) == len(true) == 3
    low = [to_uint8(request.pixel_fields["low_res"]) for request in requests]
    assert low[0].shape == (5, 24, 24, 3)
    assert measure(low)["gain"] == 0


# --- files ---


def test_clips_become_requests():
    """Also those that do not fill their last token: the model is shown the last frame again."""
    clips = [(clip(3, 3, 12, 16), 12.0), (clip(4, 4, 8, 8), 12.0)]
    asked = [Request(p, 1, 8, 8, 8.0, i, negative="b") for i, p in enumerate("aa")]
    edits = enlarging(asked, clips, CONFIG, PixelCodec())
    requests = [request for edit in edits for request in edit.requests]
    assert [r.negative for r in requests] == ["b", "b"]
    sizes = [(r.frames, r.height, r.width, r.fps) for r in requests]
    assert sizes == [(3, 24, 32, 12.0), (5, 16, 16, 12.0)]
    first, second = (r.pixel_fields["low_res"] for r in requests)
    assert np.array_equal(first, to_float(enlarge(clips[0][0], 2)))
    assert np.array_equal(second[:4], low_res_field(clips[1][0], 2, None))
    assert np.array_equal(second[4], second[3])
    for edit, (video, _) in zip(edits, clips, strict=True):
        shown = edit.finish([np.zeros((edit.requests[0].frames, 24, 24, 3), np.uint8)])
        assert len(shown) == len(video)


def test_sizes_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="height 28"):
        enlarging([Request("", 1, 8, 8, 8.0, 0)], [(clip(0, 3, 14, 12), 8.0)], CONFIG, PixelCodec())
    with pytest.raises(ValueError, match="24 x 24 pixels.*5 times fewer"):
        shrink(clip(), 5)


# --- the configs ---


def test_the_cascade_fits_together(mesh):
    stages = [load_config(str(CONFIGS / f"cascade_{size}.py")) for size in (64, 256, 768)]
    made = [(s.sampling.frames, s.sampling.height, s.sampling.width) for s in stages]
    assert made == [(17, 64, 64), (17, 256, 256), (17, 768, 768)]
    assert [factor_of(s.model) for s in stages] == [1, 4, 3]
    for config in stages:
        task = abstract_task(config, mesh)
        tokens = config.model.patch.num_tokens(
            config.sampling.frames, config.sampling.height, config.sampling.width
        )
        assert tokens == config.data.packing.row_tokens
        assert config.data.transform.crop == config.sampling.height
        assert ("low_res" in task.batch.token_fields) == (factor_of(config.model) > 1)
    params = jax.eval_shape(task.init, jax.random.key(0))
    loss, totals = jax.eval_shape(task.loss, params, {}, task.batch, jax.random.key(0))
    assert loss.shape == totals.weight.shape == ()


def test_the_sprites_config_is_given_half_of_each_side():
    config = load_config(str(CONFIGS / "sprites_upscale.py"))
    tokens = config.model.patch.num_tokens(8, 32, 32)
    assert (factor_of(config.model), tokens) == (2, config.data.packing.row_tokens)
    assert config.data.eval_split == "test"
