"""Prompt upsampling: a language model writes short prompts out, as captions of training data are.

    python -m dit_jax.prepare.upsample --prompt "a cat" --server URL --model NAME --output prompts.json
    python -m dit_jax.sample --checkpoint RUN --prompts-file prompts.json --output cats

Betker et al. 2023 (DALL-E 3), section 3.5 and appendix C; Sora does the same. A model trained on
descriptive captions makes better clips of descriptive prompts. What was asked for is never dropped
silently: every prompt comes back with the text that is used, and the reason where it is unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from dit_jax import interop
from dit_jax.config import check_types
from dit_jax.files import check_file, refuse_if, run_verb, write_json
from dit_jax.model import ByteEncoderConfig, TextStatesConfig
from dit_jax.prepare.chat import (
    AnswerCache,
    ChatClient,
    ChatConfig,
    ChatOptions,
    Unreachable,
    default_cache,
    message,
    tell,
    whole_sentences,
)
from dit_jax.prepare.recaption import ordered
from dit_jax.sampling import read_prompts
from dit_jax.sampling.pipeline import stored_run

PROG = "python -m dit_jax.prepare.upsample"

SYSTEM = """\
You write prompts for a model that makes videos and images of them. You are given a short prompt, and \
answer with a longer one of the same scene: keep every thing, number, colour, place, motion and text \
that it names and how they relate, and the language that it is in; add how the subject looks, what it \
does, the surroundings, the background, the light and the style, wherever the prompt leaves them open. \
Add no new subject. Write one paragraph of at most {words} words in plain present tense, as one \
describes something that is seen. A prompt that is long enough already comes back as it is. Answer \
with the prompt alone."""
BYTES_OF_WORD, TOKENS_OF_WORD = 6, 2
"""With the blank behind it; and of a tokenizer, most of whose words are one token."""


@dataclasses.dataclass(frozen=True)
class UpsampleConfig:
    """What is asked of the model."""

    words: int = 100
    """Of an upsampled prompt at most; fewer where the text encoder reads less."""
    system: str = SYSTEM
    """The instruction; ``{words}`` becomes the limit."""

    def __post_init__(self) -> None:
        refuse_if([(self.words < 1, f"upsampling.words is {self.words}: it is at least 1.")])


@dataclasses.dataclass(frozen=True)
class Upsampled:
    """A prompt, and what is used in its place."""

    original: str
    text: str
    """The upsampled prompt, or the original."""
    error: str = ""
    """Why it is the original, where that was not the model's choice."""

    @property
    def changed(self) -> bool:
        return self.text != self.original


def utf8_length(text: str) -> int:
    """Bytes of a text: what a byte encoder reads."""
    return len(text.encode())


def upsample(
    prompts: Sequence[str],
    client: ChatClient,
    config: UpsampleConfig | None = None,
    limit: int | None = None,
    length: Callable[[str], int] = utf8_length,
    of_word: int = BYTES_OF_WORD,
) -> list[Upsampled]:
    """Every prompt and what is used in its place, in order; equal prompts are asked for once.

    ``limit`` is what the text encoder reads of a prompt, as ``length`` counts it (a word is about
    ``of_word``): longer texts lose sentences at their end until they fit, and are not used where the
    first is too long already.

    A refused key or an unknown model is a ``ChatError``. If nobody answers at all, prompts that no kept
    answer is of come back as they are, each with that error.
    """
    config = config or UpsampleConfig()
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
        if not text and not why:
            why = f"too long: {length(whole)} where the text encoder reads {limit}, in one sentence"
            why += f": {whole[:60]!r}..."
        if why:
            return Upsampled(
                prompt, prompt, absent if absent and why.startswith("not sent") else why
            )
        return Upsampled(prompt, text)

    unique = list(dict.fromkeys(prompts))
    results = ordered(one, unique, client.options.concurrency, client.close)
    by_prompt = dict(zip(unique, results, strict=True))
    return [by_prompt[prompt] for prompt in prompts]


def changes(results: Sequence[Upsampled]) -> str:
    """What upsampling changed: two lines for every prompt that it did, once for equal ones."""
    lines = [f"{one.original!r}\n  -> {one.text!r}" for one in results if one.changed]
    return "\n".join(dict.fromkeys(lines))


def warnings(results: Sequence[Upsampled]) -> str:
    """A line for every prompt that is used as given against what was asked for, and why."""
    lines = [f"used as given: {one.original!r}: {one.error}" for one in results if one.error]
    return "\n".join(dict.fromkeys(lines))


def records(results: Sequence[Upsampled], model: str) -> list[dict[str, Any]]:
    """JSON values that ``read_prompts`` reads as the texts that are used, to make the same again."""
    return [
        {"prompt": one.text, "original": one.original}
        | ({"upsampled_by": model} if not one.error else {"error": one.error})
        for one in results
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsampleArguments:
    """Has a language model write prompts out, for --prompts-file of python -m dit_jax.sample."""

    prompt: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Short prompts."""
    prompts_file: str | None = None
    """A file of them, as --prompts-file of sample."""
    output: str = "prompts.json"
    """The prompts that are to be used."""
    server: str
    """The address of any server of OpenAI's protocol (vLLM, Ollama, ...)."""
    model: str
    """The language model's name there."""
    cache: str | None = None
    """File that keeps answers, none being asked for twice. Unset: in the user's cache directory."""
    checkpoint: str | None = None
    """Directory of the run that will read the prompts: none becomes longer than it reads."""
    text_encoder: str | None = None
    """Folder of that run's text encoder. Unset: the one that its config names."""
    upsampling: UpsampleConfig = UpsampleConfig()
    chat: ChatOptions = ChatOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Upsamples what the command line says; returns the exit status."""
    given = tyro.cli(UpsampleArguments, args=arguments, prog=PROG)

    def work() -> None:
        check_types(given)
        run(given)

    return run_verb(PROG, work)


def run(given: UpsampleArguments) -> None:
    """Asks for every prompt, tells what changed, and writes the prompts that are to be used."""
    output = check_file(given.output)
    prompts = [one for some in given.prompt for one in some]
    prompts += read_prompts(given.prompts_file) if given.prompts_file else []
    refuse_if([(not prompts, 'nothing to upsample: give --prompt "..." or --prompts-file FILE.')])
    limits: dict[str, Any] = {}
    if given.checkpoint is not None:
        config = stored_run(given.checkpoint)[2]
        text, folder = config.model.text, given.text_encoder or config.text_encoder.path
        if isinstance(text, ByteEncoderConfig):
            limits = {"limit": text.max_bytes}
        elif isinstance(text, TextStatesConfig) and folder is not None:
            length, most = interop.text_tools().text_length(folder)
            # One token of the model's stands for the beginning.
            limit = min(most, text.max_tokens - 1)
            limits = {"length": length, "limit": limit, "of_word": TOKENS_OF_WORD}
    with contextlib.closing(AnswerCache(given.cache or default_cache())) as cache:
        client = ChatClient(ChatConfig(given.server, given.model, given.chat), cache)
        results = upsample(prompts, client, given.upsampling, **limits)
    write_json(output, records(results, given.model))
    print(changes(results) or "no prompt was changed")
    print(client.summary())
    print(f"{len(results)} prompt(s): {output}", flush=True)
    if kept := warnings(results):
        failed = sum(bool(one.error) for one in results)
        print(
            f"{PROG}: warning: {failed} of {len(results)} prompts were NOT upsampled:\n{kept}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
