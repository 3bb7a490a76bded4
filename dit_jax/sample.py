"""``python -m dit_jax.sample MODE --checkpoint RUN --prompt "..."``: clips from a trained model.

Each mode has options of its own and a ``--help``; without a mode, text makes clips. Everything is
checked before the weights are read: the output can be written, the run has a checkpoint, and the model
can make clips of the size that was asked for.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from dit_jax.config import check_types, load_config
from dit_jax.files import as_path, refuse_if, run_verb
from dit_jax.parallel import PROCESS_HELP, joined, make_mesh, take_process_flags
from dit_jax.sampling.commands import COMMANDS, Text, Upscale
from dit_jax.sampling.media import check_output, grid, upscale, write_video
from dit_jax.sampling.pipeline import load_run, stored_sampling
from dit_jax.sampling.sampler import SamplerConfig

PROG = "python -m dit_jax.sample"
RARE = ("label", "format", "step", "codec", "text_encoder", "config", "sampling", "mesh")
RARE += ("prompts_file", "negative_prompt", "spread_parameters")
"""Options that --help leaves to --help-all."""


def parse(arguments: Sequence[str]) -> Text | Upscale:
    """The options of a mode, whose defaults are those of the run's own config."""
    name, rest = "text", list(arguments)
    if rest and rest[0] in COMMANDS:
        name = rest.pop(0)
    command: Any = COMMANDS[name]
    stored = stored_sampling(rest)
    settings = {one.name: getattr(stored, one.name) for one in dataclasses.fields(SamplerConfig)}
    fields = dataclasses.fields(command)
    values: dict[str, Any] = {"sampling": SamplerConfig(**settings)}
    values |= {one.name: tyro.MISSING for one in fields if one.default is dataclasses.MISSING}
    about = f"{command.__doc__} Other modes: {', '.join(one for one in COMMANDS if one != name)}."
    if "--help-all" in rest:
        rest, about = ["--help"], f"{about} {PROCESS_HELP}"
    elif {"-h", "--help"} & {*rest}:
        about += " All options, also of the solver (--steps, --cfg-scale, ...): --help-all."
        # A class of the same name and module: there the help of its options is looked up.
        hidden = [(one, tyro.conf.Suppress[Any]) for one in RARE]
        where = {"__module__": command.__module__}
        command = dataclasses.make_dataclass(
            command.__name__, hidden, bases=(command,), namespace=where, frozen=True, kw_only=True
        )
    prog = f"{PROG} {name}"
    return tyro.cli(command, args=rest, prog=prog, description=about, default=command(**values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    for name in ("absl", "asyncio"):  # of arrays that do not fit, Orbax logs traces
        logging.getLogger(name).setLevel(logging.CRITICAL)
    closed = "Event loop is closed"
    sys.unraisablehook = lambda x: str(x.exc_value) == closed or sys.__unraisablehook__(x)

    def work() -> None:
        with joined(flags, PROG):
            command = parse(arguments)
            check_types(command)
            sample(command)

    return run_verb(PROG, work)


def sample(command: Text | Upscale) -> None:
    """Makes the clips of a command and writes them."""
    output = as_path(command.output)
    single = bool(output.suffix) and not output.is_dir()
    check_output(output if single else output / f"0.{command.format}")
    sizes = {one: getattr(command, one, None) for one in ("frames", "height", "width", "fps")}
    pipeline = load_run(
        command.checkpoint,
        command.step,
        command.codec,
        command.text_encoder,
        make_mesh(command.mesh),
        command.spread_parameters,
        load_config(command.config) if command.config else None,
        **vars(command.sampling),
        **{one: value for one, value in sizes.items() if value is not None},
    )
    prompts, clips, rates = command.clips(pipeline)
    if jax.process_index() != 0:
        return
    message = (
        f"--output {output} would show clips of {sorted(set(rates))} frames a second side by side: "
        "name a directory, which gets a file for each."
    )
    refuse_if([(single and len(set(rates)) > 1, message)])
    large = [(upscale(part, command.scale) for part in clip) for clip in clips]
    if single:
        tiles = (grid(list(parts)) for parts in zip(*large, strict=True))
        write_video(output, large[0] if len(large) == 1 else tiles, rates[0])
    else:
        for i, (name, parts, fps) in enumerate(zip(prompts, large, rates, strict=True)):
            name = name if isinstance(name, str) else f"class {name}"
            slug = re.sub(r"\W+", "-", name.lower()).strip("-")[:60]
            write_video(output / f"{i:04d}-{slug}.{command.format}", parts, fps)
    print(f"{len(large)} clip(s): {output}" if single else f"{len(large)} clip(s) in {output}/")


if __name__ == "__main__":
    raise SystemExit(main())
