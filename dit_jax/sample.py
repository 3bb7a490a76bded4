"""``python -m dit_jax.sample --checkpoint RUN --prompt "..."``: clips from a trained model.

Everything is checked before the weights are read: the output can be written, the run has a
checkpoint, and the model can make clips of the size that was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from dit_jax.codec.opening import open_codec
from dit_jax.config import VideoRun, check_types
from dit_jax.files import as_path, local_copy, run_verb, write_json
from dit_jax.model import ByteEncoderConfig, ClassLabels
from dit_jax.parallel import (
    PROCESS_HELP,
    MeshConfig,
    broadcast,
    joined,
    make_mesh,
    take_process_flags,
)
from dit_jax.prepare import (
    AnswerCache,
    ChatClient,
    ChatConfig,
    ChatOptions,
    UpsampleConfig,
    Upsampled,
    default_cache,
    read_prompts,
    upsample,
)
from dit_jax.prepare.prompting import probe_prompt, read_prompt
from dit_jax.prepare.upsample import TOKENS_OF_WORD, changes, records, warnings
from dit_jax.sampling import (
    Request,
    Space,
    check_output,
    check_request,
    decode_long,
    grid,
    make_edits,
    make_long,
    upscale,
    write_parts,
    write_video,
)
from dit_jax.sampling.long_plan import LongArguments, make_long_plan
from dit_jax.sampling.options import gathered
from dit_jax.sampling.pipeline import SamplingOverrides, Trained, chosen
from dit_jax.sampling.requested import ModeArguments, Plan, Shape, make_plan
from dit_jax.text.opening import cut_note, open_text_encoder, prompt_length, with_states
from dit_jax.upscale.super_resolution import (
    check_enlarges,
    check_given,
    cut_again,
    each_clip,
    enlarging,
    read_clips,
)

PROG = "python -m dit_jax.sample"
SEVERAL = ("prompt", "label", "keyframe", "super-resolve")
"""Options that take several values, behind one flag or each behind its own."""


@dataclasses.dataclass(frozen=True)
class SampleArguments:
    """Makes clips from the averaged weights of a training run."""

    checkpoint: str
    """Directory of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar='"TEXT" ["TEXT" ...]')] = ()
    """What to make; several prompts make several clips."""
    prompts_file: str | None = None
    """A text file with a prompt on every line, or a .csv, .tsv, .json or .jsonl file with a column or
    key "prompt"."""
    label: tuple[int, ...] = ()
    """Classes, by number, for a model of classes: in place of prompts."""
    super_resolve: tuple[str, ...] = ()
    """Clips to enlarge, for a model of super-resolution: files, or a directory that samples were
    written to. A prompt for each of them, one for all, or none."""
    augmentation: float = 0.0
    """Noise level of clips to enlarge, up to what training did: 0 for clips as they were filmed, about
    0.1 for what a model generated."""
    output: str = "samples.mp4"
    """A file ending in .mp4, .gif or .png (several clips share it, as a grid), or a directory that
    gets a file for each clip."""
    format: Literal["mp4", "gif", "png"] = "mp4"
    """Of the files in a directory."""
    num: int = 1
    """Clips for each prompt."""
    seed: int = 0
    """Clip number i (from 0) is made from noise of seed + i; the same seed gives the same file."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = SamplingOverrides()  # pyright: ignore[reportInvalidTypeForm]
    """What else the run's config says (``sampling``), size and solver among it; 1 frame is a still
    image."""
    mode: tyro.conf.OmitArgPrefixes[ModeArguments] = ModeArguments()
    """Pictures and clips as prompts, and loops (docs/modes.md)."""
    long: tyro.conf.OmitArgPrefixes[LongArguments] = LongArguments()
    """Minutes (docs/long.md)."""
    codec: str | None = None
    """Folder of the autoencoder, for a model of latents. Unset: the one that the run's config names."""
    text_encoder: str | None = None
    """Folder of the text encoder, for a model that reads its states. Unset: the one that the run's
    config names."""
    step: int | None = None
    """Of the checkpoint; the newest if unset."""
    scale: int = 1
    """Enlarges every pixel so many times in the file."""
    upsample: bool = False
    """Has a language model write the prompts out first, as the captions were that were trained on;
    says what it changed, and writes the texts that are used beside the output, where --prompts-file
    can read them (OUTPUT.prompts.json, or prompts.json in a directory)."""
    upsample_server: str | None = None
    """Of that model: the address of any server of OpenAI's protocol (vLLM, Ollama, ...)."""
    upsample_model: str | None = None
    """Its name there."""
    upsample_cache: str | None = None
    """File that keeps its answers, so that none is asked for twice. Unset: in the user's cache
    directory."""
    upsampling: UpsampleConfig = UpsampleConfig()
    chat: ChatOptions = ChatOptions()
    mesh: MeshConfig = MeshConfig()
    spread_parameters: bool = False
    """Shard parameters over mesh.context too: for models too large for one device, at the price of
    gathering them in every step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    arguments = gathered(arguments, SEVERAL)
    description = f"{SampleArguments.__doc__} {PROCESS_HELP}"
    given = tyro.cli(SampleArguments, args=arguments, prog=PROG, description=description)
    logging.getLogger("absl").setLevel(logging.ERROR)

    def work() -> None:
        check_types(given)
        with joined(flags, PROG):
            sample(given)

    return run_verb(PROG, work)


def _prompts(given: SampleArguments) -> list[str | int]:
    """What is asked for, each so many times: texts, or numbers of classes."""
    prompts: list[str | int] = [*given.prompt, *given.label]
    if given.prompts_file is not None:
        prompts += read_prompts(given.prompts_file)
    given.long.check(given.mode, len(prompts), given.upsample)
    if (board := given.long.board()) is not None:
        prompts = [board.prompts[0]]
    if not prompts and not given.super_resolve:
        raise ValueError(
            'nothing to make: give --prompt "...", --prompts-file FILE or --label NUMBER.'
        )
    if given.upsample and not prompts:
        raise ValueError("--upsample writes prompts out, and there are none: give --prompt.")
    if given.num < 1 or given.scale < 1:
        raise ValueError(f"--num {given.num} and --scale {given.scale} are at least 1.")
    return [prompt for prompt in prompts for _ in range(given.num)]


def _requests(given: SampleArguments, config: VideoRun, prompts: list[str | int]) -> list[Request]:
    """One clip for each prompt; raises ``ValueError`` where the model reads no such prompts."""
    seed, negative = given.seed, given.mode.negative_prompt or ""
    made, labels = config.sampling, config.model.conditioners.get("label")
    for prompt in prompts:
        if isinstance(labels, ClassLabels):
            if not isinstance(prompt, int):
                raise ValueError(
                    f"the model knows classes: in place of {prompt[:60]!r} give --label with numbers "
                    f"of 0 to {labels.classes - 1}."
                )
            labels.check("label", np.array(prompt))
        elif isinstance(prompt, int):
            raise ValueError(f"--label {prompt}: the model knows no classes. Give --prompt.")
    size = config.codec.latent_size(made.frames, made.height, made.width)
    fps = config.codec.latent_fps(made.fps)
    return [
        Request("", *size, fps, seed + i, segment_fields={"label": prompt})
        if isinstance(prompt, int)
        else Request(prompt, *size, fps, seed + i, negative=negative)
        for i, prompt in enumerate(prompts)
    ]


def _plan(given: SampleArguments, config: VideoRun) -> Plan:
    """Of what size, rate and length; looks into the files that are given."""
    files = given.mode.files
    probes = [probe_prompt(local_copy(file)) for file in files]
    shapes = [Shape(p.height, p.width, p.fps, p.kind == "image") for p in probes]
    return make_plan(given.mode, chosen(given.sampling), config, shapes)


def _media(plan: Plan) -> dict[str, np.ndarray]:
    count = 1 if plan.given.source == "image" else None
    return {
        file: read_prompt(local_copy(file), plan.height, plan.width, plan.fps, count)
        for file in plan.given.files
    }


def _clip(file: Path) -> tuple[np.ndarray, float]:
    """All of a file as it is displayed, and its rate."""
    shown = probe_prompt(file)
    return read_prompt(file, shown.height, shown.width, shown.fps), shown.fps


def sample(given: SampleArguments) -> None:
    """Makes the clips and writes them."""
    asked = chosen(given.sampling)
    given.mode.check(asked, given.long.long is not None)
    if given.super_resolve:
        check_enlarges(given.mode, given.long, asked)
    directory = as_path(given.output)
    single = bool(directory.suffix) and not directory.is_dir()
    check_output(directory if single else directory / f"0.{given.format}")
    prompts = _prompts(given)
    trained = Trained(given.checkpoint, given.step, given.sampling, given.codec, given.text_encoder)
    config = trained.config
    plan = _plan(given, config)
    rates = [plan.output_fps]
    check_given(config, given.super_resolve, given.augmentation)
    if clips := read_clips(given.super_resolve, _clip):
        prompts, clips = each_clip(prompts, clips, given.num)
        rates = [fps for _, fps in clips]
        if single and len(set(rates)) > 1:
            raise ValueError(
                f"--output {given.output} would show clips of {sorted(set(rates))} frames a second "
                "side by side: name a directory, which gets a file for each."
            )
    requests = _requests(given, config, prompts)
    check_request(requests[0], config.model.patch)
    media = _media(plan)
    mesh = make_mesh(given.mesh)
    codec = open_codec(config, mesh)
    assert codec is not None  # `Trained` refuses models of latents without one
    space = Space(codec, config.model.patch)
    if given.upsample:
        file = directory.with_suffix(".prompts.json") if single else directory / "prompts.json"
        requests = _requests(given, config, _upsampled(given, config, prompts, file))
    board = given.long.board()
    texts = [*(board.prompts if board else ()), *(one.prompt for one in requests)]
    texts += [one.negative for one in requests]
    if jax.process_index() == 0 and (note := cut_note(config, texts)):
        print(f"{PROG}: warning: {note}", file=sys.stderr, flush=True)

    if given.long.long is not None:
        _sample_long(given, trained, plan, plan.likes(requests, space), space, mesh, media)
        return

    # Gone again before the model's own weights are read.
    likes = (
        enlarging(requests, clips, config, codec, given.augmentation)
        if clips
        else plan.likes(requests, space)
    )
    likes = with_states(likes, open_text_encoder(config, mesh))
    edits = cut_again(likes, clips) if clips else plan.edits(likes, space, media)
    generator, params = trained.load(mesh, given.spread_parameters)
    made = make_edits(generator, params, edits, config.model, mesh, True, codec.decode)
    if jax.process_index() == 0:
        _write(given, directory, single, prompts, made, rates)


def _sample_long(
    given: SampleArguments,
    trained: Trained,
    plan: Plan,
    likes: list[Request],
    space: Space,
    mesh: Mesh,
    media: dict[str, np.ndarray],
) -> None:
    """Makes long clips and writes them, some frames at a time. What windows have made is kept beside
    the output until that is written: the same command goes on from there."""
    config, directory = trained.config, as_path(given.output)
    begun, context = plan.beginning(media), plan.context(space)
    long = make_long_plan(given.long, config, space, plan.fps, begun, context)
    clips = long.requests(likes, given.long.board(), plan.fps)
    encoder = open_text_encoder(config, mesh)
    clips = [with_states(requests, encoder) for requests in clips]
    del encoder
    single = bool(directory.suffix) and not directory.is_dir()
    kept = directory.with_suffix(".windows.npz") if single else directory / "windows.npz"
    generator, params = trained.load(mesh, given.spread_parameters)
    made = make_long(
        generator,
        params,
        clips,
        long.windows,
        config.model,
        mesh,
        given.long.noise,
        heads=long.heads(space, len(clips)),
        kept=kept,
        progress=True,
        weights=str(trained.path),
    )
    if jax.process_index() != 0:
        return
    parts = [long.whole(decode_long(space.codec, latents, long.decoded)) for latents in made]
    large = [(upscale(part, given.scale) for part in one) for one in parts]
    if single:
        together = (grid(list(frames)) for frames in zip(*large, strict=True))
        write_parts(directory, large[0] if len(large) == 1 else together, plan.fps)
    else:
        names = _names([like.segment_fields.get("label", like.prompt) for like in likes])
        for name, one in zip(names, large, strict=True):
            write_parts(directory / f"{name}.{given.format}", one, plan.fps)
    kept.unlink(missing_ok=True)
    print(
        f"{len(made)} clip(s) of {long.frames} frames in {len(long.windows)} windows: {directory}"
    )


def _chat_config(given: SampleArguments, prompts: list[str | int]) -> ChatConfig:
    if not given.upsample_server or not given.upsample_model:
        raise ValueError(
            "--upsample asks a language model: give --upsample-server URL and --upsample-model NAME."
        )
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("--upsample writes prompts out, and --label gives classes: leave one out.")
    return ChatConfig(given.upsample_server, given.upsample_model, given.chat)


def _upsampled(
    given: SampleArguments, config: VideoRun, prompts: list[str | int], file: Path
) -> list[str | int]:
    """The texts that are used in place of prompts; process 0 asks for them, says and writes what they
    are, and tells the others."""
    asked = _chat_config(given, prompts)
    texts = ""
    if jax.process_index() == 0:
        limits: dict[str, Any] = {}
        if (counted := prompt_length(config)) is not None:
            limits = {"length": counted[0], "limit": counted[1]}
            if not isinstance(config.model.text, ByteEncoderConfig):
                limits["of_word"] = TOKENS_OF_WORD
        words = list(dict.fromkeys(str(prompt) for prompt in prompts))
        with contextlib.closing(AnswerCache(given.upsample_cache or default_cache())) as cache:
            client = ChatClient(asked, cache)
            found = upsample(words, client, given.upsampling, **limits)
        _tell_changes(found, client, file)
        texts = json.dumps({one.original: one.text for one in found})
    used = json.loads(broadcast("prompts", texts))
    return [used[prompt] for prompt in prompts]


def _tell_changes(found: list[Upsampled], client: ChatClient, file: Path) -> None:
    write_json(file, records(found, client.config.model))
    print(changes(found) or "no prompt was changed")
    print(client.summary.render())
    print(f"the prompts that are used: {file}", flush=True)
    if kept := warnings(found):
        failed = sum(bool(one.error) for one in found)
        print(
            f"{PROG}: warning: {failed} of {len(found)} prompts were NOT upsampled:\n{kept}",
            file=sys.stderr,
            flush=True,
        )


def _names(prompts: Sequence[str | int]) -> list[str]:
    """Of files in a directory: numbers, and what is asked for."""
    words = [p if isinstance(p, str) else f"class {p}" for p in prompts]
    slugs = [re.sub(r"\W+", "-", one.lower()).strip("-")[:60] for one in words]
    return [f"{i:04d}-{slug}" for i, slug in enumerate(slugs)]


def _write(
    given: SampleArguments,
    directory: Path,
    single: bool,
    prompts: list[str | int],
    clips: list[np.ndarray],
    rates: list[float],
) -> None:
    """Writes one file, or one for each clip; ``rates`` are of each, or one of all."""
    large = [upscale(clip, given.scale) for clip in clips]
    if single:
        write_video(directory, large[0] if len(large) == 1 else grid(large), rates[0])
        print(f"{len(large)} clip(s): {directory}")
        return
    rates = rates if len(rates) == len(large) else rates * len(large)
    for name, clip, fps in zip(_names(prompts), large, rates, strict=True):
        write_video(directory / f"{name}.{given.format}", clip, fps)
    print(f"{len(large)} clip(s) in {directory}/")


if __name__ == "__main__":
    raise SystemExit(main())
