"""``python -m dit_jax.prepare --input DIR --output DIR``: raw media to captioned clips to train on.

Every file is examined once (shots, clips, filters), captioned, and written as records that
``data.source.path`` takes: pixels, or the latents of a codec, and the states of a text encoder. Nothing
is done twice: what is in ``OUTPUT/work`` is used again, by this process or another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
import tyro

from dit_jax import tasks
from dit_jax.checks import check_types
from dit_jax.data import LatentsOf, StatesOf
from dit_jax.interop import load_codec, load_text_encoder
from dit_jax.models import Codec, TextEncoder
from dit_jax.parallel import (
    PROCESS_HELP,
    MeshConfig,
    joined,
    make_mesh,
    take_process_flags,
    wait_for_all,
)
from dit_jax.preparation import (
    AnswerCache,
    Caption,
    ChatClient,
    ChatConfig,
    ChatOptions,
    ExamineConfig,
    RecaptionConfig,
    WorkersConfig,
    failures,
)
from dit_jax.preparation.assembling import (
    Failed,
    Videos,
    pixels,
    samples,
    up_to_date,
    write_builder,
)
from dit_jax.preparation.beam import BeamConfig, examine_on_beam
from dit_jax.preparation.captioning import (
    CaptionsConfig,
    Models,
    clip_features,
    clip_texts,
    given_captions,
)
from dit_jax.preparation.encoding import BatchConfig, Latents, States
from dit_jax.preparation.listing import Item, find_media
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.report import render, summarize, write_reports
from dit_jax.preparation.stages import (
    Examined,
    Kept,
    examine_files,
    fitting,
    share,
    without_duplicates,
)
from dit_jax.preparation.work import digest
from dit_jax.sampling import to_float

PROG = "python -m dit_jax.prepare"
STAGES = ("examine", "captions", "states", "latents", "records")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turns a folder of media into records to train on (docs/prepare.md)."""

    input: str
    """A folder, a list of files (.txt, a path on each line), or the videos of a TFDS builder,
    tfds:NAME_OR_DIRECTORY[:SPLIT]."""
    output: str
    """Gets NAME/1.0.0 (the records), report.json, report.html, and work/, what the stages left."""
    name: str = "clips"
    """Of the records: lower case letters, digits and _."""
    codec: str | None = None
    """The folder of an autoencoder: its latents are stored, instead of pixels."""
    text_encoder: str | None = None
    """The folder of a text encoder: the states of captions are stored (docs/text.md)."""
    caption_server: str | None = None
    """A server of a model that sees (OpenAI's chat protocol), which describes every clip."""
    caption_model: str | None = None
    until: Literal["examine", "captions", "states", "latents", "records"] = "records"
    """The last stage that is done."""
    encoding: Literal["video", "zlib", "bytes"] = "video"
    """Of pixels: H.264 of high quality; lossless compression, some 30 times as large; or raw."""
    shard: str = "0/1"
    """i/n: this is the i-th of n machines, from 0, which share the output. Each does its part of
    all stages but the last; the same command without it finishes."""
    wait: float = 0.0
    """Seconds that a share waits for the others to be examined: near-duplicates are found among all
    files, and are not captioned and encoded. After that it ends, and the same command goes on."""
    duplicates: float | None = 4.0
    """Clips whose hashes differ by up to so many bits of 64 from an earlier one's are left out."""
    examine: ExamineConfig = ExamineConfig()
    captions: CaptionsConfig = CaptionsConfig()
    recaption: RecaptionConfig = RecaptionConfig()
    chat: ChatOptions = ChatOptions()
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig()
    """Of this process's devices: each has a copy of the codec and takes whole batches, and the text
    encoder is spread over them."""
    workers: WorkersConfig = WorkersConfig()
    beam: BeamConfig = BeamConfig()

    def __post_init__(self) -> None:
        if bool(self.caption_server) != bool(self.caption_model):
            raise ValueError(
                "--caption-server URL and --caption-model NAME go together: give both, or neither."
            )
        index, _, count = self.shard.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f"--shard {self.shard!r}: give i/n, with i from 0 to n - 1.")

    def reaches(self, stage: str) -> bool:
        """Whether a stage is done."""
        return STAGES.index(stage) <= STAGES.index(self.until)

    @property
    def place(self) -> tuple[int, int]:
        """Which share of the files this process takes, and of how many."""
        if jax.process_count() > 1:
            return jax.process_index(), jax.process_count()
        index, _, count = self.shard.partition("/")
        return int(index), int(count)


class Preparation:
    """The parts of one preparation, opened; nothing is done yet.

    Raises ``ValueError`` for a codec, input or table that is absent or foreign.
    """

    def __init__(self, config: PrepareConfig, shown: bool = True):
        self.config, self.output = config, Path(config.output)
        self.work = self.output / "work"
        mesh = make_mesh(config.mesh, jax.local_devices())
        self.codec: Codec | None = load_codec(config.codec) if config.codec else None
        copies = tasks.codec_copies(self.codec, mesh) if self.codec else []
        self.encode = [partial(_encode, copy) for copy in copies]
        self.encoder: TextEncoder | None = None
        if config.text_encoder and config.reaches("states"):
            placement = tasks.on_mesh(mesh) if mesh.size > 1 else None
            self.encoder = load_text_encoder(config.text_encoder, placement=placement)
        table = config.captions.table
        self.listed = find_media(config.input, [self.output, *([table] if table else [])])
        strides = self.codec.strides if self.codec else (1, 1, 1)
        self.given = given_captions(self.listed.items, config.captions)
        self.examined = Examined(self.work, fitting(config.examine, strides))
        self.models = Models(self.work, config.caption_model or "", config.recaption)
        self.latents = Latents(self.work, self.codec.hash if self.codec else "", config.batch)
        self.states = States(self.work, self.encoder.hash if self.encoder else "")
        self.progress = Progress(shown)
        self.problems = dict(self.given.problems)

    def texts(self, one: Kept) -> dict[str, str]:
        """The captions and licence of a clip."""
        captions = self.given.captions.get(one.item.name, ())
        if one.caption:
            captions += (Caption(one.caption, "record"),)
        if self.config.caption_model:
            captions += self.models.captions(one)
        return clip_texts(captions, self.config.captions)

    @cached_property
    def kept(self) -> tuple[list[Kept], dict[str, str]]:
        """The clips of all files, and those that are near-duplicates, with the earlier one."""
        return without_duplicates(self.examined.kept(self.listed.items), self.config.duplicates)

    def kept_of(self, parts: Sequence[Sequence[Item]]) -> list[list[Kept]]:
        """Those of parts of the files."""
        by_file: dict[str, list[Kept]] = {}
        for one in self.kept[0]:
            by_file.setdefault(one.item.name, []).append(one)
        return [[one for item in part for one in by_file.get(item.name, ())] for part in parts]

    def captions_of(self, kept: Sequence[Kept]) -> list[str]:
        """Those of the clips of a part, whose states are made together."""
        return [self.texts(one)["caption"] for one in kept]

    def examine(self, index: int, count: int) -> None:
        """The first stage, for this machine's share of the files."""
        config = self.config
        parts = share(self.listed.items, config.batch.files, index, count)
        mine = [item for part in parts for item in part]
        if config.beam.runner:
            examine_on_beam(mine, self.examined, config.workers, config.beam, self.progress)
        else:
            examine_files(mine, self.examined, config.workers, self.progress)

    @property
    def more(self) -> bool:
        """Whether anything is done between examining and the records."""
        config = self.config
        served = bool(config.caption_server) and config.reaches("captions")
        coded = self.codec is not None and config.reaches("latents")
        return served or coded or self.encoder is not None

    def not_examined(self) -> int:
        """Files that have no report, after waiting for those of others as long as is allowed."""
        deadline = time.monotonic() + self.config.wait
        while missing := self.examined.missing(self.listed.items):
            if time.monotonic() >= deadline:
                return len(missing)
            time.sleep(1.0)
        return 0

    def run_stages(self, index: int, count: int) -> None:
        """All stages between examining, which all files are, and the last, for this machine's share."""
        config, decoding = self.config, self.examined.config.decoding
        kept = self.kept_of(share(self.listed.items, config.batch.files, index, count))
        if config.caption_server and config.reaches("captions"):
            self._recaption([one for part in kept for one in part])
        if self.encoder is not None:
            captions = map(self.captions_of, kept)
            self.states.store(captions, self.encoder.encode, self.progress)
        if self.codec is not None and config.reaches("latents"):
            given = (self.encode, decoding, config.workers, self.progress)
            self.latents.store(kept, *given)

    def _recaption(self, kept: Sequence[Kept]) -> None:
        config = self.config
        assert config.caption_server and config.caption_model
        chat = ChatConfig(config.caption_server, config.caption_model, config.chat)
        self.work.mkdir(parents=True, exist_ok=True)
        index, count = config.place
        answers = self.work / f"answers-{index}-of-{count}.sqlite"
        with contextlib.closing(AnswerCache(answers)) as cache:
            client = ChatClient(chat, cache)
            decoding = self.examined.config.decoding
            failed = self.models.ask(kept, client, decoding, config.workers, self.progress)
            print(client.summary.render())
        if failed:
            print(f"clips without captions of the model:\n{failures(failed)}", file=sys.stderr)
        self.problems |= {one.name: one.error for one in failed}

    def finish(self) -> dict[str, Any]:
        """Writes records and reports, and returns what ``report.json`` says.

        Raises:
            ValueError: where no clip is left, or the records cannot be written.
        """
        config, failed = self.config, Failed()
        kept, duplicates = self.kept
        if self.codec is not None and config.reaches("latents"):
            told = ((one.name, self.latents.failure(one)) for one in kept)
            failed |= {name: why for name, why in told if why is not None}
            kept = [one for one in kept if one.name not in failed]
        texts = {one.name: self.texts(one) for one in kept}
        if kept and config.reaches("records"):
            self._records(kept, texts, failed)
        about = summarize(
            self.listed, self.examined, duplicates, failed, texts, self.problems, self.progress
        )
        write_reports(self.output, about, self.listed, self.examined)
        if not kept:
            raise ValueError(
                f"no clip of {config.input!r} was kept ({render(about)}): see "
                f"{str(self.output / 'report.html')!r}, and --examine.filters and --examine.clips."
            )
        return about

    def _records(self, kept: list[Kept], texts: dict[str, dict[str, str]], failed: Failed) -> None:
        config, codec, encoder = self.config, self.codec, self.encoder
        latents = LatentsOf(codec.channels, codec.hash, codec.name) if codec else None
        states = StatesOf(encoder.dim, encoder.hash, encoder.name) if encoder else None
        made_of = digest(
            self.examined.config,
            config.encoding,
            latents,
            states,
            [[o.name, o.item.key, texts[o.name]] for o in kept],
        )
        if up_to_date(self.output / config.name / "1.0.0", made_of):
            return
        decoding = self.examined.config.decoding
        states_of = self._states_of() if states else None

        def records(clips: Iterable[Kept]) -> Iterator[dict[str, Any]]:
            if codec is None:
                encoded = config.encoding == "video"
                videos = pixels(clips, decoding, config.workers, failed, encoded)
            else:
                videos = self._encoded(clips)
            return samples(videos, texts, states_of, failed)

        target = (self.output, config.name, made_of, len(kept), kept, records, failed)
        fields = (clip_features(config.captions), config.encoding, latents, states)
        write_builder(*target, *fields, self.progress)

    def _encoded(self, kept: Iterable[Kept]) -> Videos:
        """Latents, with their own frames a second."""
        assert self.codec is not None
        for one in kept:
            yield one, self.latents.load(one), one.clip.fps / self.codec.strides[0]

    def _states_of(self) -> Any:
        """The states of a clip's caption, found with those of its part."""
        parts = self.kept_of(share(self.listed.items, self.config.batch.files))
        number = {one.item.name: i for i, part in enumerate(parts) for one in part}
        latest: dict[int, list[str]] = {}

        def states(one: Kept) -> np.ndarray:
            i = number[one.item.name]
            if i not in latest:
                latest.clear()
                latest[i] = self.captions_of(parts[i])
            return self.states.load(latest[i], self.texts(one)["caption"], ml_dtypes.bfloat16)

        return states


def _encode(codec: Codec, videos: np.ndarray) -> np.ndarray:
    return codec.encode_many(to_float(videos))


def prepare(config: PrepareConfig, shown: bool = True) -> dict[str, Any] | None:
    """Does what is left to be done; what was made is returned by the process that finishes.

    Raises:
        ValueError: where an input, codec, encoder, table or output does not serve.
    """
    preparation = Preparation(config, shown)
    try:
        preparation.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output {config.output!r} cannot be written ({error.strerror}): give another."
        ) from error
    index, count = config.place
    alone = jax.process_count() == 1
    preparation.examine(index, count)
    if not alone:
        wait_for_all("examined")
    elif count > 1 and preparation.more and (left := preparation.not_examined()):
        print(
            f"share {config.shard} is examined, and {left} files of other shares are not: run the same "
            "command again when they are (or give --wait SECONDS)."
        )
        return None
    if preparation.more:
        preparation.run_stages(index, count)
    if not alone:
        wait_for_all("prepared")
    elif count > 1:
        print(f"share {config.shard} is done: when all are, run the same command without --shard.")
        return None
    return preparation.finish() if index == 0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        config = tyro.cli(
            PrepareConfig,
            args=given,
            prog=PROG,
            description=f"Turns a folder of media into records to train on. {PROCESS_HELP}",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
        check_types(config)
        with joined(flags, PROG):
            about = prepare(config)
            if about is not None:
                print(render(about))
                print(f"{config.output}: {config.name}/1.0.0, report.html")
    except (ImportError, ValueError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
