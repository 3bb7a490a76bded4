"""The captions of every clip: those that came with its file, and those that a model gives it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dit_jax.files import write_json
from dit_jax.prepare.captions import (
    Caption,
    TableConfig,
    match_table,
    read_listed_sidecars,
    read_table,
    record_texts,
    text_features,
)
from dit_jax.prepare.chat import ChatClient
from dit_jax.prepare.decoding import DecodingConfig
from dit_jax.prepare.listing import Item
from dit_jax.prepare.progress import Progress
from dit_jax.prepare.recaption import (
    ClipFrames,
    RecaptionConfig,
    Recaptioned,
    evenly_spaced,
    recaption,
)
from dit_jax.prepare.recorded import is_record
from dit_jax.prepare.stages import Kept, read_clips
from dit_jax.prepare.tables import encodable
from dit_jax.prepare.work import digest, file_name
from dit_jax.prepare.workers import WorkersConfig


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Where given captions are from."""

    table: str | None = None
    """A CSV, TSV, JSONL or JSON file with a row for each media file (docs/captions.md)."""
    columns: TableConfig = TableConfig()
    whole_text: bool = False
    """A sidecar ``cat.txt`` is one caption, and not one on each line."""
    given: int = 1
    """Captions that came with a file are kept, at most so many."""
    licence: str = ""
    """Of files of which neither table nor sidecar says one."""

    def __post_init__(self) -> None:
        if self.given < 1:
            raise ValueError(f"captions.given is {self.given}: it is at least 1.")


@dataclasses.dataclass
class Given:
    """The captions that came with files, by their names."""

    captions: dict[str, tuple[Caption, ...]]
    problems: dict[str, str]
    """Sidecars that could not be read."""
    table: str = ""
    """What became of the table, in a line."""
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """What did not meet, or was repaired, counted by what it is."""
    unmatched: tuple[str, ...] = ()
    """Rows of the table that match no file, and where they stand."""


def given_captions(items: Sequence[Item], config: CaptionsConfig) -> Given:
    """Captions of the table and, behind them, of sidecars; a bad sidecar is told, a bad table raises.

    Raises:
        ValueError: where the table cannot be read.
    """
    given = Given({}, {})
    if config.table is not None:
        matched = match_table(read_table(config.table, config.columns), [i.name for i in items])
        given.captions |= matched.captions
        given.table = (
            f"{config.table}: {len(matched.captions)} of {len(items)} files have a row, and "
            f"{len(matched.unmatched)} rows match no file"
        )
        given.unmatched = tuple(f"{row.file} ({row.where})" for row in matched.unmatched)
        given.notes["table rows that match no file"] = len(matched.unmatched)
        given.notes["files without a row in the table"] = len(matched.uncaptioned)
    for item in items:
        if is_record(item.path):
            continue
        try:
            beside = read_listed_sidecars(item.path, config.whole_text)
        except (ValueError, OSError, RecursionError) as error:
            given.problems[item.name] = encodable(f"sidecar: {error}")
            given.notes["sidecars that cannot be read"] += 1
            beside = ()
        if both := tuple(dict.fromkeys(given.captions.get(item.name, ()) + beside)):
            given.captions[item.name] = both
            if any(caption.repaired for caption in both):
                given.problems.setdefault(item.name, "caption: half a surrogate pair became U+FFFD")
                given.notes["files whose captions were repaired"] += 1
    return given


class Models:
    """The captions of a model, in a folder with a file for each clip that it answered for."""

    def __init__(self, work: Path, model: str, config: RecaptionConfig):
        self.config = config
        self.folder = work / "captions" / digest(model, config)

    def place(self, one: Kept) -> Path:
        """Where a clip's captions are, or will be."""
        key = digest(one.item.key, one.clip.start, one.clip.frames)
        return self.folder / file_name(one.name, key, ".json")

    def captions(self, one: Kept) -> tuple[Caption, ...]:
        """Those that there are."""
        if not self.place(one).exists():
            return ()
        return tuple(Caption(**values) for values in json.loads(self.place(one).read_bytes()))

    def ask(
        self,
        kept: Iterable[Kept],
        total: int,
        client: ChatClient,
        decoding: DecodingConfig,
        workers: WorkersConfig,
        progress: Progress,
    ) -> list[Recaptioned]:
        """Asks for those that are missing, of ``total`` clips. Those that failed come back, and are
        asked for next time.

        Raises:
            ChatError: where the server refuses the key or does not know the model.
        """
        failed, probed = [], False
        waiting: collections.deque[Kept] = collections.deque()
        with progress.stage("captions", total, "clips") as bar:

            def missing() -> Iterator[Kept]:
                nonlocal probed
                for one in kept:
                    if self.place(one).exists():
                        bar.add(1, 0, 0.0)
                        continue
                    if not probed:
                        client.probe()
                        probed = True
                    waiting.append(one)
                    yield one

            for told in recaption(self._clips(missing(), decoding, workers), client, self.config):
                one = waiting.popleft()
                if told.error:
                    failed.append(told)
                else:
                    made = [dataclasses.asdict(caption) for caption in told.captions()]
                    write_json(self.place(one), made)
                bar.add(1, 1, one.video_seconds)
        return failed

    def _clips(
        self, wanted: Iterable[Kept], decoding: DecodingConfig, workers: WorkersConfig
    ) -> Iterator[ClipFrames]:
        at = partial(evenly_spaced, wanted=self.config.frames)
        names, clips = itertools.tee(wanted)
        for read in read_clips(clips, decoding, workers, at):
            error = f"{read.reason}: {read.detail}" if read.reason else ""
            yield ClipFrames(next(names).name, "", partial(_frames, read.value, error))


def _frames(frames: np.ndarray | None, error: str) -> np.ndarray:
    if frames is None:
        raise ValueError(error)
    return frames


def clip_texts(captions: Sequence[Caption], config: CaptionsConfig) -> dict[str, str]:
    """A clip's captions and licence as features of its record.

    Where none was given, ``caption`` is the descriptive or else the short one of the model, and its
    origin says so; a clip without any has an empty one, and trains as if it had been dropped.
    """
    texts = record_texts(captions, config.given)
    made = next((k for k in ("caption_descriptive", "caption_short") if texts[k]), None)
    if not texts["caption"] and made is not None:
        texts["caption"] = texts[made]
        origins = dict(one.split(": ", 1) for one in texts["caption_origin"].split("; "))
        texts["caption_origin"] = f"caption: {origins[made]}; {texts['caption_origin']}"
    licences = [one.licence for one in captions if one.licence]
    return {**texts, "licence": licences[0] if licences else encodable(config.licence)}


def clip_features(config: CaptionsConfig) -> tuple[str, ...]:
    """The names of what ``clip_texts`` gives beside ``caption``."""
    return (*text_features(config.given), "licence")
