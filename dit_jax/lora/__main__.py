"""``python -m dit_jax.lora {export,import,merge}``: adapters as files, as runs, and in the weights."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import ml_dtypes
import numpy as np
import tyro

from dit_jax.config import ExpertConfig, VideoRun, absolute_paths, check_types, to_dict
from dit_jax.files import absolute, as_path, check_writable, refuse_if, run_verb, write_json
from dit_jax.lora.adapters import Adapter, LoraConfig, as_params, together
from dit_jax.lora.files import FileLayout, write_adapter
from dit_jax.lora.pipeline import open_adapter, split_weight
from dit_jax.lora.run import LoraRun, base_config, lora_run
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling.pipeline import load_run, stored_run
from dit_jax.training import CheckpointConfig, Checkpointer, open_run
from dit_jax.types import Params

PROG = "python -m dit_jax.lora"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes adapters to a file that others load."""

    lora: tuple[
        str, ...
    ]  # A run that trained adapters, or a file of any layout; several become one.
    output: str  # A .safetensors file; it must not be there yet.
    layout: FileLayout = "diffusers"
    """diffusers: PEFT's names, for Diffusers. comfyui: the authors' names, for ComfyUI. own: our own
    paths, for models that no published layout holds."""
    base: str | None = None  # The run whose model files adapt; of a run its own, if unset.
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __call__(self) -> str:
        output, adapter, config = as_path(self.output), *collected(self.lora, self.base)
        odd = output.suffix != ".safetensors"
        refuse_if([(odd, f"--output {self.output!r} is to be a file that ends in .safetensors.")])
        new_output(self.output)
        count = write_adapter(output, adapter, config, self.layout, DTYPES[self.dtype])
        return f"{count} arrays in {output}"


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a run of adapters in files, to sample with or to go on from (checkpoint.initial)."""

    lora: tuple[str, ...]  # A file of any layout, or a run; several become one.
    base: str  # The run whose model they adapt.
    output: str  # Directory of the new run; it must not be there yet.

    def __call__(self) -> str:
        adapter, _ = collected(self.lora, self.base)
        new_output(self.output)
        ranks = {name: int(a.shape[-1]) for name, (a, _) in adapter.layers.items()}
        rank = min(ranks.values())
        others = {name: one for name, one in ranks.items() if one != rank}
        lora = LoraConfig(rank, adapter.scale * rank, tuple(ranks), others)
        config = lora_run(absolute(self.base), output=absolute(self.output), lora=lora)
        write_run(self.output, config, as_params(adapter))
        return f"adapters of {len(ranks)} layers: a run in {self.output}/"


@dataclasses.dataclass(frozen=True)
class Merge:
    """Makes a run whose weights are a base's with adapters added: to convert, or to adapt again."""

    base: str  # A run, or one that trained adapters: then with these.
    output: str  # Directory of the new run; it must not be there yet.
    lora: tuple[str, ...] = ()  # More adapters, PATH[:WEIGHT].

    def __call__(self) -> str:
        new_output(self.output)
        pipeline = load_run(self.base, lora=self.lora)
        names = [field.name for field in dataclasses.fields(VideoRun)]
        fields = {name: getattr(pipeline.config, name) for name in names}
        config = VideoRun(**{**fields, "output": absolute(self.output)})
        # An expert is a run of its own, and stays what it is.
        alone = dataclasses.replace(pipeline.config, expert=ExpertConfig())
        pipeline = dataclasses.replace(pipeline, config=alone)
        write_run(self.output, config, pipeline.params)
        return f"a run in {self.output}/"


def collected(paths: Sequence[str], base: str | None) -> tuple[Adapter, VideoRun]:
    """One adapter of those at ``PATH[:WEIGHT]``, and the config whose model it is of."""
    refuse_if([(not paths, "--lora: give a run that trained adapters, or a file.")])
    if base is not None:
        config = base_config(*open_run(base))
    else:
        path, _ = split_weight(paths[0])
        file = not (as_path(path) / "checkpoints").is_dir()
        refuse_if([(file, f"--lora {path!r} is no run: give --base, the run that it adapts.")])
        config = stored_run(path)[2]
        message = f"--lora {path!r} trained no adapters."
        refuse_if([(not isinstance(config, LoraRun), message)])
    mesh, adapters = make_mesh(MeshConfig()), []
    for one in paths:
        path, weight = split_weight(one)
        adapter = open_adapter(path, config, mesh)
        adapters.append(dataclasses.replace(adapter, scale=weight * adapter.scale))
    return adapters[0] if len(adapters) == 1 else together(adapters), config


def new_output(path: str) -> None:
    """Refuses an output that is there, or that cannot be written."""
    target = as_path(path)
    refuse_if([(target.exists(), f"--output {path!r} exists: move it away, or name another.")])
    check_writable(target.parent)


def write_run(path: str, config: VideoRun, params: Params) -> None:
    """A run of no steps that has these averaged parameters."""
    values = to_dict(absolute_paths(config))
    with Checkpointer(as_path(path), CheckpointConfig()) as checkpointer:
        checkpointer.save_weights(params, values)
    write_json(as_path(path) / "config.json", values)


Commands = Annotated[Export, tyro.conf.subcommand("export")]
Commands |= Annotated[Import, tyro.conf.subcommand("import")]
Commands |= Annotated[Merge, tyro.conf.subcommand("merge")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status."""
    command = tyro.cli(Commands, args=arguments, prog=PROG, description=__doc__)
    logging.getLogger("absl").setLevel(logging.ERROR)

    def work() -> None:
        check_types(command)
        print(command())

    return run_verb(PROG, work)


if __name__ == "__main__":
    sys.exit(main())
