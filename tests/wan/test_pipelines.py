"""Whole pipelines of Wan against Diffusers: the same noise and prompts, and so the same frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import convert
from dit_jax.model import unpatchify
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import Generation, modes
from dit_jax.sampling.pipeline import Pipeline, load_run
from dit_jax.sampling.request import Request, make_inputs
from tests.interop.published import diffusers, needs, torch

pytestmark = needs("torch", "diffusers", "transformers", "accelerate", "PIL")
STEPS, SCALE, FRAMES = 4, 5.0, 9
PROMPT, NEGATIVE = "a red circle moves", "blurred"


def open_small(folder: Path, target: Path) -> Pipeline:
    """The pipeline in a folder, converted to a run, on one device."""
    given = convert.ConvertArguments(str(folder), str(target), "run", mesh=MeshConfig(data=1))
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    patch = pytest.MonkeyPatch()
    patch.setattr(convert, "make_mesh", lambda config: one)
    try:
        convert.convert(given)
    finally:
        patch.undo()
    return load_run(target, mesh=one, steps=STEPS, cfg_scale=SCALE, batch=1)


def template(pipeline: Pipeline, height: int, width: int) -> Request:
    """A request of that size in pixels, with the states of its prompts."""
    codec = pipeline.config.codec
    t, h, w = codec.latent_size(FRAMES, height, width)
    fps = codec.latent_fps(pipeline.config.sampling.fps)
    request = Request(PROMPT, t, h, w, fps, seed=3, negative=NEGATIVE)
    return pipeline.encode_text([request])[0]


def noise_of(pipeline: Pipeline, request: Request) -> Any:
    """What sampling begins with, as Diffusers takes it: ``[1, c, t, h, w]``."""
    model = pipeline.config.model
    eps = pipeline.generator._noise(jax.tree.map(jnp.asarray, make_inputs([request], model)))
    clip = unpatchify(model.patch, np.asarray(eps[0]), *request.size)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 0)[None]))


def published(folder: Path, kind: str, **arguments: Any) -> np.ndarray:
    """Frames float [t, h, w, 3] in [0, 1], as Diffusers makes them."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    arguments |= dict(prompt=PROMPT, negative_prompt=NEGATIVE, num_frames=FRAMES)
    arguments |= dict(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="np")
    with pytest.MonkeyPatch.context() as patch:
        # It repairs text by a package that is not wanted for this alone.
        patch.setattr(f"{type(pipeline).__module__}.prompt_clean", lambda text: text)
        return pipeline(**arguments).frames[0]


def assert_same_frames(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within two of 255 levels; and frames that are no flat grey, which any two clips could share."""
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255


@pytest.mark.parametrize("kind", ["2.1-t2v", "2.2-ti2v", "2.2-t2v-a14b"])
def test_text_to_video(kind: str, small_wan: Callable[[str], Path], tmp_path: Path):
    folder, size = small_wan(kind), (64, 96)
    pipeline = open_small(folder, tmp_path / "run")
    request = template(pipeline, *size)
    more: dict[str, Any] = {}
    if pipeline.config.expert.path:
        # Levels on both sides of the boundary, and each expert's own guidance.
        levels = pipeline.generator.levels(int(np.prod(request.size)) // 4)[:-1]
        assert 0 < (levels < pipeline.config.expert.below).sum() < STEPS
        more["guidance_scale_2"] = pipeline.config.expert.cfg_scale
        assert more["guidance_scale_2"] != SCALE
    (ours,) = pipeline.sample([modes.plain(request)])
    noise = noise_of(pipeline, request)
    theirs = published(folder, "WanPipeline", latents=noise, height=64, width=96, **more)
    assert_same_frames(ours, theirs)


@pytest.mark.parametrize("kind", ["2.1-i2v", "2.2-ti2v", "2.2-i2v-a14b"])
def test_image_to_video(kind: str, small_wan: Callable[[str], Path], tmp_path: Path):
    from PIL import Image

    folder = small_wan(kind)
    pipeline = open_small(folder, tmp_path / "run")
    request = template(pipeline, 64, 96)
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    image = np.kron(image, np.ones((16, 16, 1), np.uint8))
    reads = pipeline.config.model.conditioners
    ((known,), _) = modes.image_to_video(pipeline.space, request, {0: image}, conditioners=reads)
    (ours,) = pipeline.sample([Generation((known,))])  # With the first frame as it is decoded.
    more: dict[str, Any] = {}
    if kind == "2.2-ti2v":  # A pipeline of text; that of images takes the same parts.
        parts = diffusers.WanPipeline.from_pretrained(folder).components
        whole = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
        whole.save_pretrained(folder := tmp_path / "images")
    if pipeline.config.expert.path:
        more["guidance_scale_2"] = pipeline.config.expert.cfg_scale
    theirs = published(
        folder,
        "WanImageToVideoPipeline",
        image=Image.fromarray(image),
        latents=noise_of(pipeline, dataclasses.replace(request)),
        height=64,
        width=96,
        **more,
    )
    assert_same_frames(ours, theirs)
