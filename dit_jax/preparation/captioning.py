"""The captions of every clip: those that came with its file, and those that a model gives it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dit_jax.preparation.captions import (
    Caption,
    TableConfig,
    match_table,
    read_sidecars,
    read_table,
    record_texts,
    text_features,
)
from dit_jax.preparation.chat import ChatClient
from dit_jax.preparation.decoding import DecodingConfig
from dit_jax.preparation.listing import Item
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.recaption import (
    ClipFrames,
    RecaptionConfig,
    Recaptioned,
    evenly_spaced,
    recaption,
)
from dit_jax.preparation.recorded import is_record
from dit_jax.preparation.stages import Kept, read_clips
from dit_jax.preparation.work import digest, file_name, write_json
from dit_jax.preparation.workers import WorkersConfig


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


@dataclasses.dataclass(frozen=True)
class Given:
    """The captions that came with files, by their names."""

    captions: dict[str, tuple[Caption, ...]]
    problems: dict[str, str]
    """Sidecars that could not be read."""
    table: str = ""
    """What did not match, in words."""


def given_captions(items: Sequence[Item], config: CaptionsConfig) -> Given:
    """Captions of the table and, behind them, of sidecars; a bad sidecar is told, a bad table raises.

    Raises:
        ValueError: where the table cannot be read.
    """
    found: dict[str, tuple[Caption, ...]] = {}
    said, problems = "", {}
    if config.table is not None:
        matched = match_table(read_table(config.table, config.columns), [i.name for i in items])
        found, said = dict(matched.captions), matched.render()
    for item in items:
        if is_record(item.path):
            continue
        try:
            beside = read_sidecars(item.path, config.whole_text)
        except ValueError as error:
            problems[item.name] = str(error)
            continue
        if both := tuple(dict.fromkeys(found.get(item.name, ()) + beside)):
            found[item.name] = both
    return Given(found, problems, said)


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
        client: ChatClient,
        decoding: DecodingConfig,
        workers: WorkersConfig,
        progress: Progress,
    ) -> list[Recaptioned]:
        """Asks for those that are missing. Those that failed come back, and are asked for next time.

        Raises:
            ChatError: where the server refuses the key or does not know the model.
        """
        wanted = [one for one in kept if not self.place(one).exists()]
        places = {one.name: one for one in wanted}
        failed = []
        with progress.stage("captions", len(wanted), "clips") as bar:
            if wanted:
                client.probe()
            asked = self._clips(wanted, decoding, workers)
            for told in recaption(asked, client, self.config):
                one = places[told.name]
                if told.error:
                    failed.append(told)
                else:
                    made = [dataclasses.asdict(caption) for caption in told.captions()]
                    write_json(self.place(one), made)
                bar.add(1, 1, one.clip.seconds)
        return failed

    def _clips(
        self, wanted: Sequence[Kept], decoding: DecodingConfig, workers: WorkersConfig
    ) -> Iterator[ClipFrames]:
        at = partial(evenly_spaced, wanted=self.config.frames)
        for one, read in zip(wanted, read_clips(wanted, decoding, workers, at), strict=True):
            error = f"{read.reason}: {read.detail}" if read.reason else ""
            yield ClipFrames(one.name, "", partial(_frames, read.value, error))


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
    return {**texts, "licence": licences[0] if licences else config.licence}


def clip_features(config: CaptionsConfig) -> tuple[str, ...]:
    """The names of what ``clip_texts`` gives beside ``caption``."""
    return (*text_features(config.given), "licence")
