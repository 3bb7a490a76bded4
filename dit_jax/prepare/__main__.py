"""``python -m dit_jax.prepare --input DIR --output DIR``: raw media to captioned clips to train on.

Every file is examined once (shots, clips, filters), captioned, and written as records that
``data.source.path`` takes: pixels, or the latents of a codec, and the states of a text encoder. Nothing
is done twice: what is in ``OUTPUT/work`` is used again, by this process or another.

Files are dealt out in *parts* of so many in a row, whole, so that what is computed together is the same
however many machines there are, and so is every bit of the result.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import shutil
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tensorflow_datasets as tfds
import tyro

from dit_jax import files, interop
from dit_jax.config import VideoRun, check_types, read_config
from dit_jax.files import check_writable, is_remote, refuse_if
from dit_jax.parallel import (
    PROCESS_HELP,
    MeshConfig,
    coordination,
    joined,
    make_mesh,
    take_process_flags,
)
from dit_jax.prepare import report
from dit_jax.prepare.captions import CaptionsConfig, clip_features, clip_texts, find_captions
from dit_jax.prepare.chat import AnswerCache, ChatClient, ChatConfig, ChatOptions, user_cache
from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.duplicates import near_duplicates
from dit_jax.prepare.examining import ExamineConfig
from dit_jax.prepare.listing import Item, find_media
from dit_jax.prepare.recaption import Models, RecaptionConfig, failures
from dit_jax.prepare.records import BatchConfig, Failed, Latents, States, write_builder
from dit_jax.prepare.stages import TRIES, BeamConfig, Examined, Kept, examine_files, read_clips
from dit_jax.prepare.work import Progress, digest
from dit_jax.prepare.workers import Outcome, WorkersConfig
from dit_jax.prepare.writing import MARK, VERSION, LatentsOf, StatesOf
from dit_jax.sampling import to_float
from dit_jax.types import TextEncoder

PROG = "python -m dit_jax.prepare"
TOLD = 20
"""Names on the terminal, at most, of each kind of what does not meet."""
VISIBLE = 120.0
"""Seconds until a file that another machine wrote is surely seen."""
Stage = Literal["examine", "captions", "states", "latents", "records"]


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Turns a folder of media into records to train on (docs/prepare.md)."""

    input: str
    """A folder, a list of files (.txt, a path on each line), or the videos of a TFDS builder,
    tfds:NAME_OR_DIRECTORY[:SPLIT]."""
    output: str
    """Gets NAME/1.0.0 (the records), report.json, report.html, files.jsonl, and work/, what the stages
    left. On Cloud Storage (gs://) it gets copies of all but work/, when they are finished."""
    for_run: str | None = None
    """The directory of a run: clips are made for its model. Its codec and text encoder, frame rate and
    longest and largest clip are then the defaults of the options below."""
    work: str | None = None
    """A local folder, or one on a disk that the machines share, in place of OUTPUT/work. Of an output
    on Cloud Storage, one in the user's cache directory."""
    name: str = "clips"
    """Of the records: lower case letters, digits and _."""
    codec: str | None = None
    """The folder of an autoencoder: its latents are stored, instead of pixels."""
    text_encoder: str | None = None
    """The folder of a text encoder: the states of captions are stored (docs/text.md)."""
    caption_server: str | None = None
    """A server of a model that sees (OpenAI's chat protocol), which describes every clip."""
    caption_model: str | None = None
    until: Stage = "records"
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
        index, _, count = self.shard.partition("/")
        share = index.isdigit() and count.isdigit() and int(index) < int(count)
        half = bool(self.caption_server) != bool(self.caption_model)
        refuse_if([(half, "--caption-server URL and --caption-model NAME go together: give both.")])
        refuse_if([(not share, f"--shard {self.shard!r}: give i/n, with i from 0 to n - 1.")])

    def reaches(self, stage: Stage) -> bool:
        """Whether a stage is done."""
        stages = typing.get_args(Stage)
        return stages.index(stage) <= stages.index(self.until)

    @property
    def place(self) -> tuple[int, int]:
        """Which share of the files this process takes, and of how many."""
        if jax.process_count() > 1:
            return jax.process_index(), jax.process_count()
        index, _, count = self.shard.partition("/")
        return int(index), int(count)


class Preparation:
    """The parts of one preparation, opened; nothing is done yet."""

    def __init__(self, config: PrepareConfig, shown: bool = True):
        self.config = config
        self.output, self.work = places(config)
        mesh = make_mesh(config.mesh, jax.local_devices())
        self.codec: Any = None
        self.encode: list[Callable[[np.ndarray], np.ndarray]] = []
        if config.codec:
            tools = interop.codec_tools()
            self.codec = tools.load_codec(config.codec)
            copies = tools.codec_copies(self.codec, mesh)
            self.encode = [lambda x, to=to: to.encode_many(to_float(x)) for to in copies]
        self.encoder: TextEncoder | None = None
        self.too_long: Callable[[str], bool] = lambda caption: False
        if config.text_encoder and config.reaches("states"):
            text = interop.text_tools()
            self.encoder = encoder = text.load_text_encoder(config.text_encoder, mesh=mesh)
            length, _ = text.text_length(config.text_encoder)
            self.too_long = lambda caption: length(caption) > encoder.max_tokens
        table = [config.captions.table] if config.captions.table else []
        self.listed = find_media(config.input, [self.output, self.work, *table])
        self.items = self.listed.items
        paths = {item.name: item.path for item in self.items}
        self.given = find_captions(paths, config.captions)
        strides = self.codec.strides if self.codec else (1, 1, 1)
        stored = config.encoding == "video" and not config.codec and config.reaches("records")
        self.examined = Examined(self.work, config.examine, config.workers, strides, stored)
        self.models = Models(self.work, config.caption_model or "", config.recaption)
        self.latents = Latents(self.work, self.codec.hash if self.codec else "", config.batch)
        self.states = States(self.work, self.encoder.hash if self.encoder else "")
        self.progress = Progress(shown)
        self.problems = dict(self.given.problems)
        self.notes = self.listed.notes + self.given.notes
        self.notes["sidecars without a media file"] = len(self.listed.orphans)
        self.captioned = bool(config.caption_server) and config.reaches("captions")
        self.coded = self.codec is not None and config.reaches("latents")

    def texts(self, one: Kept) -> dict[str, str]:
        """The captions and licence of a clip."""
        captions = self.given.of(one.item.name, one.caption)
        if self.config.caption_model:
            captions += self.models.captions(one)
        return clip_texts(captions, self.config.captions)

    @functools.cached_property
    def survey(self) -> tuple[Counter[str], dict[str, str]]:
        """How many clips of each file are kept, and of each near-duplicate the earlier clip."""
        counts = Counter[str]()

        def hashes() -> Iterator[tuple[str, tuple[int, ...]]]:
            for one in self.examined.kept(self.items):
                counts[one.item.name] += 1
                yield one.name, one.clip.hashes

        if self.config.duplicates is None:
            collections.deque(hashes(), 0)
            return counts, {}
        near = near_duplicates(hashes(), self.config.duplicates)
        for name in near:
            counts[name.rpartition("#")[0]] -= 1
        return counts, {name: earlier for name, (earlier, _) in near.items()}

    def kept(self, part: Sequence[Item]) -> Iterator[Kept]:
        """The clips of some files, in order, without near-duplicates."""
        counts, duplicates = self.survey
        items = (item for item in part if counts[item.name])
        return (one for one in self.examined.kept(items) if one.name not in duplicates)

    def captions_of(self, part: Sequence[Item]) -> list[str]:
        """Those of the clips of a part, whose states are computed together."""
        return [self.texts(one)["caption"] for one in self.kept(part)]

    def parts(self, index: int = 0, count: int = 1) -> list[tuple[Item, ...]]:
        """The parts of the files that the ``index``-th of ``count`` machines takes."""
        size = self.config.batch.files
        starts = range(0, len(self.items), size)[index::count]
        return [self.items[start : start + size] for start in starts]

    def run_stages(self, index: int, count: int) -> bool:
        """All stages but the last, for a machine's share; whether they are done for all shares."""
        config, parts, cluster = self.config, self.parts(index, count), jax.process_count() > 1
        for row in self.given.unmatched[:TOLD]:
            print(f"no such file: {row}")
        for name in self.listed.orphans[:TOLD]:
            print(f"a caption without a media file: {name}")
        mine = itertools.chain.from_iterable(parts)
        examine_files(mine, self.examined, self.progress, config.beam)
        if cluster:
            _wait_for_all("examined")
        more = self.captioned or self.coded or self.encoder is not None
        if cluster or more:
            # What other machines wrote may take a while to be seen on a network disk.
            deadline = time.monotonic() + max(config.wait, VISIBLE if cluster else 0.0)
            while (left := len(self.examined.missing(self.items))) and time.monotonic() < deadline:
                time.sleep(1.0)
            if left and cluster:
                raise OSError(f"{left} files that other processes examined have no report here")
            if left:
                print(f"share {config.shard} is examined, {left} files of other shares are not:")
                print("run the same command again when they are (or give --wait SECONDS).")
                return False
        if more:
            self.run_on_clips(parts, self.work / f"answers-{index}-of-{count}.sqlite")
        if cluster:
            _wait_for_all("prepared")
        elif count > 1:
            print(f"share {config.shard} is done: when all are, leave --shard out.")
        return cluster or count == 1

    def run_on_clips(self, parts: Sequence[Sequence[Item]], answers: Path) -> None:
        """Captions, states and latents of some parts; all files are examined."""
        config, progress = self.config, self.progress
        total = sum(self.survey[0][item.name] for part in parts for item in part)
        if self.captioned:
            chat = ChatConfig(config.caption_server or "", config.caption_model or "", config.chat)
            client = ChatClient(chat, AnswerCache(answers))
            kept = (one for part in parts for one in self.kept(part))
            with progress.stage("captions", total, "clips") as add:
                failed = self.models.ask(kept, client, self.examined, add)
            print(client.summary())
            if failed:
                told = failures(failed)
                print(f"clips without captions of the model:\n{told}", file=sys.stderr)
            self.problems |= {one.name: one.error for one in failed}
            self.notes["clips without captions of the model"] += len(failed)
        if self.encoder is not None:
            with progress.stage("states", total, "captions") as add:
                self.states.store(map(self.captions_of, parts), self.encoder, add)
        if self.coded:
            clips = (list(self.kept(part)) for part in parts)
            with progress.stage("latents", total, "clips") as add:
                self.latents.store(clips, self.encode, self.examined, add)

    def finish(self) -> dict[str, Any]:
        """Writes records and reports, and returns what ``report.json`` says."""
        config = self.config
        failed, again = self.latents.failures(self.kept(self.items) if self.coded else ())
        total = self.survey[0].total() - len(failed)
        if total and config.reaches("records"):
            again += self._records(total, failed)

        def why(name: str) -> str:
            if name in self.survey[1]:
                return f"near-duplicate: of {self.survey[1][name]}"
            return ": ".join(failed.get(name, ()))

        def texts(one: Kept) -> dict[str, str]:
            captions = self.texts(one)
            if self.too_long(captions["caption"]):
                self.notes["captions longer than the text encoder reads"] += 1
                self.problems.setdefault(one.name, "caption: longer than the text encoder reads")
            return captions

        about = {
            "clips_tried_again": again,
            "sidecars": self.listed.sidecars,
            "sidecars_without_media": list(self.listed.orphans[: report.LISTED]),
            "table_rows_without_media": list(self.given.unmatched[: report.LISTED]),
        }
        reported = (why, texts, self.problems, about, self.notes, self.progress)
        about = report.write_reports(self.output, self.items, self.examined, *reported)
        nothing = f"no clip of {config.input!r} was kept ({report.render(about)})"
        see = f"see {str(self.output / 'report.html')!r}, --examine.filters and --examine.clips"
        worth = total or again or about["files_tried_again"]
        refuse_if([(not worth, f"{nothing}: {see}.")])
        if is_remote(config.output):
            self._publish()
        return about

    def _records(self, total: int, failed: Failed) -> int:
        """Writes the records, unless they are there. How many clips the next run tries again.

        Clips that cannot be read any more are noted in ``failed``.
        """
        config, codec, encoder = self.config, self.codec, self.encoder
        latents = LatentsOf(codec.channels, codec.hash, codec.name) if codec else None
        states = StatesOf(encoder.dim, encoder.hash, encoder.name) if encoder else None
        unfit = frozenset(failed)
        # The states of a caption are with those of its part.
        part_of = {item.name: part for part in self.parts() for item in part}
        states_of = functools.lru_cache(1)(lambda part: self.states.load(self.captions_of(part)))

        def kept() -> Iterator[Kept]:
            return (one for one in self.kept(self.items) if one.name not in unfit)

        def records(clips: Iterable[Kept], unread: Failed) -> Iterator[dict[str, Any]]:
            clips, others = itertools.tee(clips)
            if codec is None:
                reads = read_clips(others, self.examined, encoded=config.encoding == "video")
            else:
                reads = (Outcome(np.load(self.latents.place(one))) for one in others)
            rate = codec.strides[0] if codec else 1  # Latents have their own frames a second.
            for one, read in zip(clips, reads, strict=True):
                record: dict[str, Any] = {"video": read.value, **self.texts(one)}
                if encoder is not None:
                    record["text_states"] = states_of(part_of[one.item.name])[record["caption"]]
                    if not np.isfinite(record["text_states"]).all():
                        read = Outcome(None, "not finite", "the states of its caption")
                if read.reason:
                    unread[one.name] = read.reason, read.detail
                    continue
                record |= {"source": one.item.name, "fps": one.clip.fps / rate}
                for name in ("height", "width", "fps"):
                    record[f"source_{name}"] = getattr(one.probe, name)
                start = one.clip.begin
                yield {**record, "start": start, "stop": start + one.clip.seconds}

        first = digest(self.examined.config, config.encoding, latents, states)
        made_of = hashlib.sha256(first.encode())
        for one in kept():
            made_of.update(digest(one.name, one.item.key, self.texts(one)).encode())
        key, texts = made_of.hexdigest()[:16], ("source", *clip_features(config.captions))
        what = (self.output, config.name, key, total, kept(), records, failed, self.progress)
        schema = {"encoding": config.encoding, "latents": latents, "text_states": states}
        return write_builder(*what, texts=texts, **schema)

    def _publish(self) -> None:
        """Copies what is finished to Cloud Storage."""
        out, records = files.as_path(self.config.output), Path(self.config.name, VERSION)
        names = [Path(name) for name in ("files.jsonl", "report.html", "report.json")]
        mark = records / MARK
        made = (self.output / mark).read_bytes() if (self.output / mark).exists() else b""
        if made and not ((out / mark).exists() and (out / mark).read_bytes() == made):
            # The mark is last: where it stands, all is there.
            every = [records / one.name for one in (self.output / records).iterdir()]
            names += sorted(every, key=lambda one: (one == mark, one))
        for name in names:
            with files.atomic_path(out / name) as fresh:
                shutil.copyfile(self.output / name, fresh)


def parse(words: Sequence[str]) -> PrepareConfig:
    """The options, whose defaults are those of the run that ``--for-run`` names."""
    # Read ahead of the others: tyro shows and checks options by their defaults.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--for-run", "--for_run")
    run = parser.parse_known_args(list(words))[0].for_run
    config = PrepareConfig(tyro.MISSING, tyro.MISSING)
    if run is not None:
        hint = "give a run (python -m dit_jax.convert --to run makes one of a published model)"
        stored = files.check_exists(files.as_path(run) / "config.json", "--for-run", hint)
        config = for_model(config, read_config(stored))
    text = f"Turns a folder of media into records to train on. {PROCESS_HELP}"
    how: Any = {"config": (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), "prog": PROG}
    return tyro.cli(PrepareConfig, args=words, description=text, default=config, **how)


def for_model(config: PrepareConfig, of: VideoRun) -> PrepareConfig:
    """The config with what the model of a run needs: its codec and text encoder, and clips of its frame
    rate, at most as long and large as those that it is sampled with."""
    codec, patch, size = of.codec, of.model.patch, of.sampling
    longest = size.frames / size.fps
    clips = ClipConfig(
        min_seconds=min(ClipConfig.min_seconds, longest),
        max_seconds=longest,
        stride=codec.t,
        fps=size.fps,
        area=size.height * size.width,
        multiple=math.lcm(codec.h * patch.h, codec.w * patch.w),
    )
    examine = dataclasses.replace(config.examine, clips=clips)
    networks = {"codec": codec.path, "text_encoder": of.text_encoder.path}
    return dataclasses.replace(config, examine=examine, **networks)


def places(config: PrepareConfig) -> tuple[Path, Path]:
    """The local folders of the output and of the work; Cloud Storage gets a copy at the end."""
    output = check_writable(config.output)
    if not is_remote(config.output):
        work = check_writable(config.work, "--work") if config.work else output / "work"
        return output, work
    message = f"--output {config.output!r} is on Cloud Storage: machines that share the work need "
    hidden = config.work is None and config.place[1] > 1
    refuse_if([(hidden, f"{message}--work DIR on a disk that all of them see.")])
    cached = user_cache() / "prepare" / digest(str(output))
    work = check_writable(config.work or cached, "--work")
    print(f"{config.output}: made in {str(work)!r} (--work) and copied when it is finished.")
    return work / "output", work


def _wait_for_all(stage: str) -> None:
    """Returns when every process has come to the end of a stage."""
    # Not by a collective: on CPUs it gives up after 30 s, and the shares may be hours apart.
    coordination().wait_at_barrier(f"dit_jax/{stage}", 7 * 24 * 3600 * 1000)


def prepare(config: PrepareConfig, shown: bool = True) -> dict[str, Any] | None:
    """Does what is left to be done; the process that finishes returns what ``report.json`` says."""
    preparation = Preparation(config, shown)
    index, count = config.place
    with files.locked(preparation.work / f"share-{index}-of-{count}"):
        done = preparation.run_stages(index, count)
        return preparation.finish() if done and index == 0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 if something given is wrong, 1 if something failed by
    itself, also a file that the next run tries again."""
    words, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()

    def work() -> int:
        config = parse(words)
        check_types(config)
        with joined(flags, PROG):
            about = prepare(config)
        if about is None:
            return 0
        print(report.render(about))
        print(f"{config.output}: {config.name}/{VERSION}, report.html")
        left = about["files_tried_again"], about["clips_tried_again"]
        if any(left):
            why = f"{left[0]} files and {left[1]} clips could not be read this time (report.html)"
            again = f"the same command tries them again, in up to {TRIES} runs"
            print(f"{PROG}: {why}: {again}.", file=sys.stderr)
        return int(any(left))

    return files.run_verb(PROG, work)


if __name__ == "__main__":
    raise SystemExit(main())
