"""What training reads of the clips that are kept: latents, states of captions, and the records.

What encodes is given as a function. A batch is of one part of the files (``stages.py``) and is filled
up to a power of two, so that the same clips are encoded together on one machine or on many, and few
shapes are compiled. Latents of one clip in batches of other sizes may differ in their last bits, so
the size of a batch is a part of where they are stored; on how many devices they were made is not.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import refuse_if, write_json, write_whole
from dit_jax.prepare.encoded import EncodedVideo
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import MACHINE_REASONS
from dit_jax.prepare.stages import TRIES, Kept, read_clips
from dit_jax.prepare.work import Progress, digest, file_name
from dit_jax.prepare.workers import Outcome, WorkersConfig
from dit_jax.prepare.writing import (
    SHARD_BYTES,
    VERSION,
    Encoding,
    LatentsOf,
    StatesOf,
    write_records,
)

MARK = "prepared.json"
"""Beside the records: what they were made of, and that they were made here."""
Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 ``[b, t, h, w, 3]`` to latents ``[b, t', h', w', c]``."""
EncodeTexts = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Captions to states, bfloat16 ``[s, e]`` each."""
Failed = dict[str, tuple[str, str]]
"""By the names of clips: a reason of ``REASONS``, and words."""
Videos = Iterator[tuple[Kept, np.ndarray | EncodedVideo, float]]
"""Clips with what is stored of them, pixels or latents, and its frames a second."""


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
        values = dataclasses.asdict(self).items()
        refuse_if(
            (value < 1, f"batch.{name} is {value}: it is at least 1.") for name, value in values
        )


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

    def failure(self, one: Kept) -> tuple[str, str, int] | None:
        """Why a clip has none, if it has none: a reason, words, and how many runs tried."""
        place = self.place(one)
        if place.exists():
            return None
        if place.with_suffix(".json").exists():
            reason, detail, tries = json.loads(place.with_suffix(".json").read_bytes())
            return reason, detail, tries
        return "failed", "it was not encoded", 0

    def load(self, one: Kept) -> np.ndarray:
        """float16 ``[t, h, w, c]``."""
        return np.load(self.place(one))

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
                for batch in itertools.chain.from_iterable(map(self._batches, parts)):
                    failures = map(self.failure, batch)
                    if any(why and tried_again(why[0], why[2]) for why in failures):
                        yield batch
                    else:
                        add(len(batch), 0, 0.0)

            def finish() -> None:
                batch, done = running.popleft()
                done.result()
                add(len(batch), len(batch), sum(one.video_seconds for one in batch))

            ahead, batches = itertools.tee(missing())
            frames = read_clips(itertools.chain.from_iterable(ahead), decoding, workers)
            for i, batch in enumerate(batches):
                readable = self._read(batch, frames)
                if len(running) == len(encoders):
                    finish()
                encode = encoders[i % len(encoders)]
                running.append((batch, pool.submit(self._encode, readable, encode)))
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
        readable: list[tuple[Kept, np.ndarray]] = []
        for one, read in zip(batch, frames, strict=False):
            if read.reason:
                before = self.failure(one)
                tries = before[2] + 1 if before is not None else 1
                place = self.place(one).with_suffix(".json")
                write_json(place, [read.reason, read.detail, tries])
            else:
                readable.append((one, read.value))
        return readable

    def _encode(self, readable: Sequence[tuple[Kept, np.ndarray]], encode: Encode) -> None:
        if not readable:
            return
        videos = [video for _, video in readable]
        power = 1 << (len(videos) - 1).bit_length()
        filled = videos + videos[:1] * (power - len(videos))
        for (one, _), latents in zip(readable, encode(np.stack(filled)), strict=False):
            data = io.BytesIO()
            np.save(data, np.asarray(latents, np.float16))
            write_whole(self.place(one), data.getvalue())


def tried_again(reason: str, tries: int) -> bool:
    """Whether another run may read what this one could not."""
    return reason in MACHINE_REASONS and tries < TRIES


class States:
    """The states of captions under one text encoder, a file for each part of the media."""

    def __init__(self, work: Path, encoder: str):
        """``encoder``: its hash."""
        self.folder = work / "states" / encoder
        self._open: tuple[Path, dict[str, np.ndarray]] | None = None

    def place(self, captions: Iterable[str]) -> Path:
        """Where the states of a part's captions are, or will be."""
        key = digest(sorted(set(captions)))
        return self.folder / key[:2] / f"{key}.npz"

    def store(
        self, parts: Iterable[Sequence[str]], total: int, encode: EncodeTexts, progress: Progress
    ) -> None:
        """Encodes the captions, ``total`` at most, of every part that has no states yet."""
        with progress.stage("states", total, "captions") as add:
            for part in (sorted(set(captions)) for captions in parts):
                if part and not self.place(part).exists():
                    states = encode(part)
                    data = io.BytesIO()
                    ends = np.cumsum([len(one) for one in states])
                    # NumPy's files know no bfloat16: its bits.
                    bits = np.concatenate(states).view(np.uint16)
                    np.savez(data, captions=np.array(part), ends=ends, bits=bits)
                    write_whole(self.place(part), data.getvalue())
                add(len(part), 0, 0.0)

    def load(self, captions: Sequence[str], caption: str, dtype: Any) -> np.ndarray:
        """The states ``[s, e]`` of one of a part's captions."""
        place = self.place(captions)
        if self._open is None or self._open[0] != place:
            with np.load(place) as stored:
                split = np.split(stored["bits"].view(dtype), stored["ends"][:-1])
                self._open = place, dict(zip(stored["captions"].tolist(), split, strict=True))
        return self._open[1][caption]


def pixels(
    kept: Iterable[Kept],
    decoding: DecodingConfig,
    workers: WorkersConfig,
    failed: Failed,
    encoded: bool = False,
) -> Videos:
    """The clips' frames, read again; those that cannot be are noted in ``failed`` and left out."""
    clips, others = itertools.tee(kept)
    reads = read_clips(others, decoding, workers, encoded=encoded)
    for one, read in zip(clips, reads, strict=True):
        if read.reason:
            failed[one.name] = read.reason, read.detail
        else:
            yield one, read.value, one.clip.fps


def samples(
    videos: Videos,
    texts: Callable[[Kept], Mapping[str, str]],
    states: Callable[[Kept], np.ndarray] | None,
    failed: Failed,
) -> Iterator[dict[str, Any]]:
    """Records; ``texts`` gives a clip's captions. Clips with numbers that are not finite are noted in
    ``failed`` and left out."""
    for one, video, fps in videos:
        sample = {
            "video": video,
            "fps": fps,
            **texts(one),
            "source": one.item.name,
            "start": one.clip.begin,
            "stop": one.clip.begin + one.clip.seconds,
            "source_height": one.probe.height,
            "source_width": one.probe.width,
            "source_fps": one.probe.fps,
        }
        if states is not None:
            sample["text_states"] = states(one)
        pixel = isinstance(video, EncodedVideo) or video.dtype == np.uint8
        if not pixel and not np.isfinite(video).all():
            failed[one.name] = "not finite", "its latents have numbers that are NaN or infinite"
        elif states is not None and not np.isfinite(sample["text_states"]).all():
            failed[one.name] = "not finite", "the states of its caption are NaN or infinite"
        else:
            yield sample


def read_mark(folder: Path) -> dict[str, Any]:
    """What the mark beside records says; empty if there is none."""
    mark = folder / MARK
    return json.loads(mark.read_bytes()) if mark.exists() else {}


def up_to_date(target: Path, made_of: str) -> bool:
    """Whether these records are there already; ``InputError`` if other things are, not made here."""
    message = f"{str(target)!r} is there and was not prepared by this command: remove it, or give "
    foreign = target.exists() and not read_mark(target)
    refuse_if([(foreign, f"{message}another --output or --name.")])
    return read_mark(target).get("made_of") == made_of


def write_builder(
    output: Path,
    name: str,
    made_of: str,
    total: int,
    kept: Iterable[Kept],
    records: Callable[[Iterable[Kept]], Iterable[Mapping[str, Any]]],
    failed: Failed,
    texts: Sequence[str],
    encoding: Encoding,
    latents: LatentsOf | None,
    states: StatesOf | None,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes ``output/NAME/1.0.0`` in a folder of its own, and moves it to its place when it is whole.

    ``records`` yields those of clips, and notes clips of which there is none in ``failed``. After a
    failure the same call goes on after the last finished shard.
    """
    target, fresh = output / name / VERSION, output / "work" / "writing"
    folder, unread = fresh / name / VERSION, fresh / "failed.json"
    if read_mark(folder).get("made_of") == made_of:
        failed |= {clip: tuple(why) for clip, why in read_mark(folder)["failed"].items()}
    else:
        shutil.rmtree(folder, ignore_errors=True)
        with progress.stage("records", total, "clips") as add:

            def after(start: int) -> Iterator[Mapping[str, Any]]:
                """The records from the ``start``-th on: those before are in finished shards."""
                clips = iter(kept)
                earlier = json.loads(unread.read_bytes()) if start else {}
                done = 0
                while done < start:
                    one = next(clips)
                    if one.name in earlier:
                        failed[one.name] = tuple(earlier[one.name])
                    else:
                        done += 1
                add(start, 0, 0.0)
                written = -1
                for record in records(clips):
                    # Before the shard is finished that leaves them out.
                    if len(failed) > written:
                        write_json(unread, failed)
                        written = len(failed)
                    yield record
                    video = record["video"].shape[0] > 1  # A picture has no duration.
                    add(1, 1, record["stop"] - record["start"] if video else 0.0)

            write_records(
                fresh,
                name,
                {"train": after},
                description="Clips prepared by dit_jax: start, stop in seconds of the source, a path.",
                labels=("source_height", "source_width"),
                texts=("source", *texts),
                numbers=("start", "stop", "source_fps"),
                encoding=encoding,
                latents=latents,
                text_states=states,
                shard_bytes=shard_bytes,
                resume=made_of,
            )
        write_json(folder / MARK, {"made_of": made_of, "failed": failed})
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)
    shutil.rmtree(fresh)
    return target
