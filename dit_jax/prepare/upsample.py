"""Prompt upsampling: a language model writes short prompts out, as captions of training data are.

    python -m dit_jax.prepare.upsample --prompt "a cat" --server URL --model NAME --output prompts.json
    python -m dit_jax.sample --checkpoint RUN --prompts-file prompts.json --output cats

Betker et al. 2023 (DALL-E 3), section 3.5 and appendix C; Sora does the same. A model trained on
descriptive captions makes better clips of descriptive prompts. What was asked for is never dropped
silently: every prompt comes back with the text that is used, and the reason where it is unchanged.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from dit_jax.config import check_types
from dit_jax.files import check_file, refuse_if, run_verb, write_json
from dit_jax.interop.registry import text_tools
from dit_jax.model.text import ByteEncoderConfig, TextStatesConfig
from dit_jax.prepare.chat import (
    AnswerCache,
    ChatClient,
    ChatConfig,
    ChatOptions,
    Unreachable,
    default_cache,
    message,
    ordered,
    tell,
    whole_sentences,
)
from dit_jax.sampling.pipeline import stored_run
from dit_jax.sampling.request import read_prompts
from dit_jax.types import PositiveInt

PROG = "python -m dit_jax.prepare.upsample"

SYSTEM = """\
You write prompts for a model that makes videos and images of them. You are given a short prompt, and \
answer with a longer one of the same scene: keep every thing, number, colour, place, motion and text \
that it names and how they relate, and the language that it is in; add how the subject looks, what it \
does, the surroundings, the background, the light and the style, wherever the prompt leaves them open. \
Add no new subject. Write one paragraph of at most {words} words in plain present tense, as one \
describes something that is seen. A prompt that is long enough already comes back as it is. Answer \
with the prompt alone."""
# With the blank behind it; and of a tokenizer, most of whose words are one token.
BYTES_OF_WORD, TOKENS_OF_WORD = 6, 2


@dataclasses.dataclass(frozen=True)
class UpsampleConfig:
    """What is asked of the model."""

    words: PositiveInt = 100  # Of an upsampled prompt at most.
    system: str = SYSTEM  # The instruction; {words} becomes the limit.


class Upsampled(NamedTuple):
    """A prompt, what is used in its place, and why that is the prompt itself if the model did not
    choose so."""

    original: str
    text: str
    error: str = ""


def upsample(
    prompts: Sequence[str],
    client: ChatClient,
    config: UpsampleConfig = UpsampleConfig(),
    limit: int | None = None,
    length: Callable[[str], int] = lambda text: len(text.encode()),
    of_word: int = BYTES_OF_WORD,
) -> list[Upsampled]:
    """Every prompt and what is used in its place, in order; equal prompts are asked for once.

    ``limit`` is what the text encoder reads of a prompt, as ``length`` counts it (a word is about
    ``of_word``): longer texts lose sentences at their end until they fit, and are not used if the first
    is too long already.

    A refused key or an unknown model is a ``ChatError``. If nobody answers at all, prompts that no kept
    answer is of come back as they are, each with that error.
    """
    absent = ""
    try:
        client.probe()
    except Unreachable as error:
        absent = str(error)
        client.close()  # What was answered once is there still.
    words = config.words if limit is None else min(config.words, max(limit // of_word, 3))
    system = message("system", config.system.replace("{words}", str(words)))

    def one(prompt: str) -> Upsampled:
        whole, why = tell(client, [system, message("user", prompt)])
        text = whole
        while text and limit is not None and length(text) > limit:
            shorter = whole_sentences(text[:-1])
            text = shorter if shorter != text else ""
        if whole and not text:
            why = f"too long: {length(whole)} where the text encoder reads {limit}, in one sentence"
            why += f": {whole[:60]!r}..."
        if absent and why.startswith("not sent"):
            why = absent
        return Upsampled(prompt, prompt if why else text, why)

    unique = list(dict.fromkeys(prompts))
    results = ordered(one, unique, client.options.concurrency, client.close)
    by_prompt = dict(zip(unique, results, strict=True))
    return [by_prompt[prompt] for prompt in prompts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsampleArguments:
    """Has a language model write prompts out, for --prompts-file of python -m dit_jax.sample."""

    prompt: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()  # Short prompts.
    prompts_file: str | None = None  # A file of them, as --prompts-file of sample.
    output: str = "prompts.json"  # The prompts that are to be used.
    server: str  # The address of any server of OpenAI's protocol (vLLM, Ollama, ...).
    model: str  # The language model's name there.
    # File that keeps answers, none being asked for twice. Unset: in the user's cache directory.
    cache: str | None = None
    checkpoint: str | None = None  # Directory of the run that will read the prompts.
    text_encoder: str | None = None  # Folder of its text encoder, if not the one of its config.
    upsampling: UpsampleConfig = UpsampleConfig()
    chat: ChatOptions = ChatOptions()


def run(arguments: UpsampleArguments) -> None:
    """Asks for every prompt, tells what changed, and writes the prompts that are to be used."""
    check_types(arguments)
    output = check_file(arguments.output)
    prompts = [prompt for group in arguments.prompt for prompt in group]
    prompts += read_prompts(arguments.prompts_file) if arguments.prompts_file else []
    refuse_if([(not prompts, 'nothing to upsample: give --prompt "..." or --prompts-file FILE.')])
    limits: dict[str, Any] = {}
    if arguments.checkpoint is not None:
        config = stored_run(arguments.checkpoint)[2]
        text, folder = config.model.text, arguments.text_encoder or config.text_encoder.path
        if isinstance(text, ByteEncoderConfig):
            limits = {"limit": text.max_bytes}
        elif isinstance(text, TextStatesConfig) and folder is not None:
            length, most = text_tools().text_length(folder)
            limit = min(most, text.max_tokens - 1)  # One of the model's stands for the beginning.
            limits = {"length": length, "limit": limit, "of_word": TOKENS_OF_WORD}
    cache = AnswerCache(arguments.cache or default_cache())
    client = ChatClient(ChatConfig(arguments.server, arguments.model, arguments.chat), cache)
    results = upsample(prompts, client, arguments.upsampling, **limits)
    by = {"upsampled_by": arguments.model}
    records = [
        {"prompt": one.text, "original": one.original} | ({"error": one.error} if one.error else by)
        for one in results
    ]
    write_json(output, records)  # As ``read_prompts`` reads them.
    unique, failed = dict.fromkeys(results), [one for one in results if one.error]
    changed = [f"{x.original!r}\n  -> {x.text!r}" for x in unique if x.text != x.original]
    print("\n".join(changed) or "no prompt was changed", client.summary(), sep="\n")
    print(f"{len(results)} prompt(s): {output}", flush=True)
    if failed:
        kept = "\n".join(f"used as given: {x.original!r}: {x.error}" for x in dict.fromkeys(failed))
        warning = f"warning: {len(failed)} of {len(results)} prompts were NOT upsampled"
        print(f"{PROG}: {warning}:\n{kept}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Upsamples what the command line says; returns the exit status."""
    parsed = tyro.cli(UpsampleArguments, args=arguments, prog=PROG)
    return run_verb(PROG, lambda: run(parsed))


if __name__ == "__main__":
    raise SystemExit(main())
