"""A trained model, opened to make samples of: the config of its run, and its averaged parameters."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import typing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from dit_jax.config import VideoRun, stored_config
from dit_jax.files import InputError, absolute, as_path
from dit_jax.sampling import Generator, SamplingConfig
from dit_jax.text.opening import check_reads
from dit_jax.training import abstract_params, open_run
from dit_jax.training.video_task import init_params, make_model
from dit_jax.types import Params


def _said_of_fields(config: type) -> dict[str, str]:
    """What a config's source says of its fields, below each."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    said = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                said[name] = " ".join(words.split())
    return said


RUN = "run"
"""An override's value for "as the run's config says"; None is a value of its own."""


def _overrides(config: type) -> Any:
    """A config's dataclass again, with ``RUN`` as every field's default."""
    hints, said = typing.get_type_hints(config), _said_of_fields(config)
    fields = []
    for field in dataclasses.fields(config):
        help = f"{said.get(field.name, '')} ({RUN}, or unset: as the run's config says)".strip()
        hint = typing.Annotated[
            hints[field.name] | typing.Literal["run"],
            tyro.conf.arg(help=help, help_behavior_hint=""),
        ]
        fields.append((field.name, hint, RUN))
    return dataclasses.make_dataclass(f"{config.__name__}Overrides", fields, frozen=True)


SamplingOverrides: Any = _overrides(SamplingConfig)
"""The fields of ``SamplingConfig``; ``RUN`` is what the run's config says."""


def chosen(overrides: Any) -> dict[str, Any]:
    """The fields of overrides that are not the run's, None among their values."""
    return {name: value for name, value in vars(overrides).items() if value != RUN}


class Trained:
    """A checkpoint of a run, and the config to sample from it with; no weights are read yet.

    Raises:
        ValueError: where there is no such run or checkpoint, or its model cannot be sampled so.
    """

    def __init__(
        self,
        run: str,
        step: int | None,
        sampling: Any,
        codec: str | None,
        text_encoder: str | None = None,
    ) -> None:
        self._checkpointer, self.step = open_run(as_path(run), step)
        self.path = self._checkpointer.path(self.step)
        stored = stored_config(self._checkpointer.config(self.step), self.path / "config")
        self.config = dataclasses.replace(
            stored,
            sampling=dataclasses.replace(stored.sampling, **chosen(sampling)),
            codec=_with_path(stored.codec, codec, "--codec"),
            text_encoder=_with_path(stored.text_encoder, text_encoder, "--text-encoder"),
        )
        check_reads(self.config, run)
        _check_pixels(self.config, run)

    def load(self, mesh: Mesh, spread_parameters: bool) -> tuple[Generator, Params]:
        """The averaged parameters over a mesh, also over ``context`` if they are to be spread, and what
        samples from them.

        Raises:
            ValueError: where they cannot be read, or are not finite.
        """
        config = self.config
        # Kernel and way are for the machine that samples to say, not for the one that trained.
        attention = dataclasses.replace(config.attention, kernel="auto", ulysses=None)
        model = make_model(config.model, mesh, attention)
        generator = Generator(model, config.diffusion, config.sampling)
        init = partial(init_params, model)
        shapes, shardings = abstract_params(init, mesh, over_context=spread_parameters)
        params = self._checkpointer.restore_ema(self.step, shapes, shardings)
        check_finite(params, str(self.path), f", of {self._checkpointer.steps()}")
        self._checkpointer.close()
        return generator, params


def _with_path(part: Any, path: str | None, option: str) -> Any:
    """The config of a codec or text encoder with another folder, if one is given."""
    if path is None:
        return part
    if "path" not in vars(part):
        raise InputError(f"{option} {path!r}: the run's model uses none. Leave it out.")
    return dataclasses.replace(part, path=absolute(path))


def _check_pixels(config: VideoRun, run: str) -> None:
    channels = config.model.patch.channels
    if channels != 3 and config.codec.path is None:
        raise ValueError(
            f"the model of {run!r} makes latents of {channels} channels: give --codec, the folder of "
            "the autoencoder that turns them into pixels."
        )


def check_finite(params: Params, where: str, steps: str = "") -> None:
    """Raises ``ValueError`` that names the first of the parameters that are not finite.

    ``where`` is the checkpoint, and ``steps`` names others for the message.
    """
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    finite = jax.jit(lambda leaves: [jnp.isfinite(leaf).all() for leaf in leaves])(
        [leaf for _, leaf in named]
    )
    broken = [path for (path, _), fine in zip(named, finite, strict=True) if not fine]
    if broken:
        first = "/".join(str(key.key) for key in broken[0])
        raise InputError(
            f"{where!r} has parameters that are NaN or infinite ({len(broken)}, the first {first!r}), "
            f"from which nothing can be made: choose an earlier --step{steps}."
        )
