"""Captions to the states of a text encoder, and clips to a codec's latents, in batches of equal shape.

What encodes is given as a function. A batch is drawn from one part of the files (``stages.py``) and is
filled up to a power of two, so that the same clips are encoded together on one machine or on many, and
few shapes are compiled. Latents of one clip in batches of other sizes may differ in their last bits, so
the size of a batch is a part of where they are stored; on how many devices they were made is not.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.files import write_json, write_whole
from dit_jax.prepare.decoding import DecodingConfig
from dit_jax.prepare.refusals import MACHINE_REASONS
from dit_jax.prepare.stages import TRIES, Kept, read_clips
from dit_jax.prepare.work import Progress, digest, file_name
from dit_jax.prepare.workers import Outcome, WorkersConfig

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 ``[b, t, h, w, 3]`` to latents ``[b, t', h', w', c]``."""
EncodeTexts = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Captions to states, bfloat16 ``[s, e]`` each."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How much is encoded at once."""

    files: int = 64
    """Files that are dealt to one machine together; batches are drawn from these."""
    clips: int = 8
    """Clips of a batch, at most, all of one shape. Each device takes a batch at a time."""
    pixels: int = 1 << 25
    """Pixels of all frames of a batch, at most; a larger clip is encoded alone."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"batch.{name} is {value}: it is at least 1.")


class Failure(NamedTuple):
    """Why a clip has no latents."""

    reason: str
    """Of ``REASONS``."""
    detail: str
    tries: int

    @property
    def again(self) -> bool:
        """Whether another run may have better luck."""
        return self.reason in MACHINE_REASONS and self.tries < TRIES


class Latents:
    """The latents of clips under one codec, a file each."""

    def __init__(self, work: Path, codec: str, batch: BatchConfig):
        """``codec``: its hash."""
        self.batch = batch
        self.folder = work / "latents" / digest(codec, batch)

    def place(self, one: Kept) -> Path:
        """Where a clip's latents are, or will be; with the end .json, why there are none."""
        key = digest(one.item.key, one.clip.start, dataclasses.asdict(one.clip)["geometry"])
        return self.folder / file_name(one.name, digest(key, one.clip.frames), ".npy")

    def failure(self, one: Kept) -> Failure | None:
        """Why a clip has none, if it has none."""
        place = self.place(one)
        if place.exists():
            return None
        try:
            return Failure(*json.loads(place.with_suffix(".json").read_bytes()))
        except FileNotFoundError:
            return Failure("failed", "it was not encoded", 0)

    def load(self, one: Kept) -> np.ndarray:
        """float16 ``[t, h, w, c]``."""
        return np.load(self.place(one))

    def done(self, one: Kept) -> bool:
        """Whether nothing is left to be done for a clip."""
        failure = self.failure(one)
        return failure is None or not failure.again

    def store(
        self,
        parts: Iterable[Sequence[Kept]],
        total: int,
        encoders: Sequence[Encode],
        decoding: DecodingConfig,
        workers: WorkersConfig,
        progress: Progress,
    ) -> None:
        """Encodes the clips, ``total`` in all, that are missing; a batch of which one is missing is
        encoded whole.

        ``encoders``: one for each device. Each encodes whole batches, in a thread of its own, so that
        no bit depends on how many there are.
        """
        running: collections.deque[tuple[list[Kept], Future[None]]] = collections.deque()
        with (
            progress.stage("latents", total, "clips") as add,
            ThreadPoolExecutor(len(encoders)) as pool,
        ):

            def missing() -> Iterator[list[Kept]]:
                for part in parts:
                    for batch in self._batches(part):
                        if all(map(self.done, batch)):
                            add(len(batch), 0, 0.0)
                        else:
                            yield batch

            def finish() -> None:
                batch, done = running.popleft()
                done.result()
                add(len(batch), len(batch), sum(one.video_seconds for one in batch))

            ahead, wanted = itertools.tee(missing())
            frames = read_clips(itertools.chain.from_iterable(ahead), decoding, workers)
            for i, batch in enumerate(wanted):
                found = self._read(batch, frames)
                if len(running) == len(encoders):
                    finish()
                encode = encoders[i % len(encoders)]
                running.append((batch, pool.submit(self._encode, found, encode)))
            while running:
                finish()

    def _batches(self, part: Sequence[Kept]) -> Iterator[list[Kept]]:
        by_shape: dict[tuple[int, int, int], list[Kept]] = {}
        for one in part:
            by_shape.setdefault(one.shape, []).append(one)
        for (frames, height, width), alike in sorted(by_shape.items()):
            most = self.batch.pixels // (frames * height * width)
            size = max(min(most, self.batch.clips), 1)
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    def _read(
        self, batch: Sequence[Kept], frames: Iterator[Outcome]
    ) -> list[tuple[Kept, np.ndarray]]:
        """The frames of those that have any; of the others, why they have none is stored."""
        found: list[tuple[Kept, np.ndarray]] = []
        for one, read in zip(batch, frames, strict=False):
            if read.reason:
                before = self.failure(one)
                tries = before.tries + 1 if before is not None else 1
                place = self.place(one).with_suffix(".json")
                write_json(place, [read.reason, read.detail, tries])
            else:
                found.append((one, read.value))
        return found

    def _encode(self, found: Sequence[tuple[Kept, np.ndarray]], encode: Encode) -> None:
        if not found:
            return
        videos = [video for _, video in found]
        filled = videos + videos[:1] * (_power(len(videos)) - len(videos))
        for (one, _), latents in zip(found, encode(np.stack(filled)), strict=False):
            data = io.BytesIO()
            np.save(data, np.asarray(latents, np.float16))
            write_whole(self.place(one), data.getvalue())


class States:
    """The states of captions under one text encoder, a file for each part of the media."""

    def __init__(self, work: Path, encoder: str):
        """``encoder``: its hash."""
        self.folder = work / "states" / encoder
        self._open: tuple[Path, dict[str, np.ndarray]] | None = None

    def place(self, captions: Sequence[str]) -> Path:
        """Where the states of a part's captions are, or will be."""
        key = digest(list(captions))
        return self.folder / key[:2] / f"{key}.npz"

    def store(
        self,
        parts: Iterable[Sequence[str]],
        total: int,
        encode: EncodeTexts,
        progress: Progress,
    ) -> None:
        """Encodes the captions, ``total`` at most, of every part that has no states yet."""
        with progress.stage("states", total, "captions") as add:
            for part in map(_unlike, parts):
                if not part or self.place(part).exists():
                    add(len(part), 0, 0.0)
                    continue
                made = encode(part)
                data = io.BytesIO()
                np.savez(
                    data,
                    captions=np.array(part),
                    ends=np.cumsum([len(states) for states in made]),
                    # NumPy's files know no bfloat16: its bits.
                    bits=np.concatenate(made).view(np.uint16),
                )
                write_whole(self.place(part), data.getvalue())
                add(len(part), 0, 0.0)

    def load(self, captions: Sequence[str], caption: str, dtype: Any) -> np.ndarray:
        """The states ``[s, e]`` of one of a part's captions."""
        place = self.place(_unlike(captions))
        if self._open is None or self._open[0] != place:
            with np.load(place) as stored:
                split = np.split(stored["bits"].view(dtype), stored["ends"][:-1])
                self._open = place, dict(zip(stored["captions"].tolist(), split, strict=True))
        return self._open[1][caption]


def _unlike(captions: Sequence[str]) -> list[str]:
    """Each caption once, sorted."""
    return sorted(set(captions))


def _power(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
