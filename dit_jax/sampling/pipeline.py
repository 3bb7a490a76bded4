"""A trained run, opened for sampling: ``load_run(path) -> Pipeline``.

pipeline = load_run("runs/quickstart", steps=20)
(video,) = pipeline.sample([plain(pipeline.request("a big red circle moves left"))])
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.config import VideoRun, differences, stored_config, to_dict
from dit_jax.files import InputError, absolute, as_path, refuse_if
from dit_jax.model import TextStatesConfig, TextToVideo
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling.modes import Generation, make_clips
from dit_jax.sampling.request import Request, Space
from dit_jax.sampling.sampler import Experts, Generator, SamplingConfig
from dit_jax.training import Checkpointer, abstract_params, open_run, video_task
from dit_jax.types import Codec, Params

# Pipelines of models with adapters: a satellite, named and not imported.
ADAPTED = "dit_jax.lora.pipeline"


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A run's config, codec, text encoder and averaged weights; weights are read at their first use."""

    config: VideoRun
    mesh: Mesh
    codec: Codec
    checkpointer: Checkpointer
    step: int
    over_context: bool = False  # whether parameters are sharded over mesh.context too

    @property
    def path(self) -> Path:
        """The directory of the checkpoint."""
        return self.checkpointer.path(self.step)

    @property
    def space(self) -> Space:
        return Space(self.codec, self.config.model.patch)

    @cached_property
    def model(self) -> TextToVideo:
        # Kernel and context parallelism are for the machine that samples to choose.
        attention = dataclasses.replace(self.config.attention, kernel="auto", ulysses=None)
        return video_task.make_model(self.config.model, self.mesh, attention)

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.model, self.config.diffusion, self.config.sampling)

    @cached_property
    def params(self) -> Params | Experts:
        """The averaged parameters, checked to be finite; with those of the expert, if there is one."""
        own, expert = self._restore(self.checkpointer, self.step), self.config.expert
        if expert.path is None:
            return own
        checkpointer, step, config = stored_run(expert.path)
        message = f"expert.path {expert.path!r} is a run of another model: give one of this model."
        refuse_if([(config.model != self.config.model, message)])
        return Experts(own, self._restore(checkpointer, step), expert.below, expert.cfg_scale)

    def _restore(self, checkpointer: Checkpointer, step: int) -> Params:
        init = partial(video_task.init_params, self.model)
        shapes, shardings = abstract_params(init, self.mesh, over_context=self.over_context)
        params = checkpointer.restore_ema(step, shapes, shardings)
        check_finite(params, str(checkpointer.path(step)), f", of {checkpointer.steps()}")
        checkpointer.close()
        return params

    def request(self, prompt: str = "", seed: int = 0, **fields: Any) -> Request:
        """A plain clip of the run's size and rate."""
        codec, size = self.config.codec, self.config.sampling
        latents = codec.latent_size(size.frames, size.height, size.width)
        return Request(prompt, *latents, codec.latent_fps(size.fps), seed, **fields)

    def encode_text(self, requests: Sequence[Request]) -> list[Request]:
        """Requests with the states of their prompts, for a model that reads a text encoder's."""
        # Opened for this call alone, because the encoder may be as large as the model.
        encoder = self.config.text_encoder.open(self.config.model.text, self.mesh)
        return video_task.with_states(requests, encoder)

    def sample(self, generations: Sequence[Generation], progress: bool = False) -> list[np.ndarray]:
        """The clips uint8 ``[t, h, w, 3]`` of generations of any modes, on every process."""
        decode = self.codec.decode
        return make_clips(self.generator, self.params, generations, self.mesh, progress, decode)


def load_run(
    run: str | os.PathLike,
    step: int | None = None,
    codec: str | None = None,
    text_encoder: str | None = None,
    mesh: Mesh | None = None,
    over_context: bool = False,
    own: VideoRun | None = None,
    lora: Sequence[str] = (),
    unmerged: bool = False,
    **sampling: Any,
) -> Pipeline:
    """Opens a checkpoint of a run: the step, or the newest.

    ``codec`` and ``text_encoder`` are folders in place of those that the run's config names,
    ``sampling`` are fields of its ``SamplingConfig`` in place of its own, and ``own`` is the config
    that it was trained with, for conditioners of a user's own module, which are not stored. ``lora``
    are adapters (docs/lora.md), which are added to the weights, or with ``unmerged`` computed beside.
    """
    checkpointer, step, config = stored_run(run, step)
    model, parts = config.model, {}
    if own is not None:
        model = dataclasses.replace(model, conditioners=own.model.conditioners)
        changes = differences(to_dict(model), to_dict(config.model), "model")
        message = "{} is {!r} in --config, and {!r} in {!r}."
        refuse_if((True, message.format(*change, str(run))) for change in changes)
    for name, path in {"codec": codec, "text_encoder": text_encoder}.items():
        if path is not None:
            part, option = getattr(config, name), f"--{name.replace('_', '-')}"
            unused = f"{option} {path!r}: the run's model uses none. Leave it out."
            refuse_if([("path" not in vars(part), unused)])
            parts[name] = dataclasses.replace(part, path=absolute(path))
    settings = dataclasses.replace(config.sampling, **sampling)
    config = dataclasses.replace(config, model=model, sampling=settings, **parts)
    text = model.text
    if isinstance(text, TextStatesConfig) and config.text_encoder.path is None:
        message = f"{str(run)!r} reads prompts as states of {text.encoder!r}: give --text-encoder."
        raise InputError(message)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    opened = config.codec.open(model.patch.channels, mesh)
    if opened is None:
        message = f"{str(run)!r} makes latents of {model.patch.channels} channels: give --codec."
        raise InputError(message)
    arguments: Any = config, mesh, opened, checkpointer, step, over_context
    if lora or hasattr(config, "lora"):
        return importlib.import_module(ADAPTED).open_adapted(*arguments, lora, unmerged)
    return Pipeline(*arguments)


def stored_run(
    run: str | os.PathLike, step: int | None = None
) -> tuple[Checkpointer, int, VideoRun]:
    """The checkpoints of a run, the step asked for or the newest, and its config."""
    checkpointer, step = open_run(as_path(run), step)
    config = stored_config(checkpointer.config(step), checkpointer.path(step) / "config")
    return checkpointer, step, config


def stored_sampling(arguments: Sequence[str]) -> SamplingConfig:
    """The ``sampling`` of the run that a command line names with --checkpoint (and --step), for the
    defaults of its options; the class's own if it names none."""
    # Read ahead of the others: tyro shows and checks options by their defaults.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--step", type=int)
    named, _ = parser.parse_known_args(list(arguments))
    run = named.checkpoint
    return stored_run(run, named.step)[2].sampling if run else SamplingConfig()


def check_finite(params: Params, where: str, steps: str = "") -> None:
    """Raises ``InputError`` with the first parameter of the checkpoint ``where`` that is not finite;
    ``steps`` names other checkpoints."""
    finite = jax.jit(partial(jax.tree.map, lambda leaf: jnp.isfinite(leaf).all()))(params)
    broken = [path for path, fine in jax.tree_util.tree_leaves_with_path(finite) if not fine]
    if broken:
        name = jax.tree_util.keystr(broken[0], simple=True, separator="/")
        raise InputError(
            f"{where!r} has parameters that are NaN or infinite ({len(broken)}, the first {name!r}): "
            f"choose an earlier --step{steps}."
        )
