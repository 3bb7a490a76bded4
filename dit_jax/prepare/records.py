"""What training reads of the clips that are kept: latents, states of captions, and the records.

What encodes is given as a function. A batch is of one part of the files (``Preparation.parts``) and is
filled up to a power of two, so that the same clips are encoded together on one machine or on many, and
few shapes are compiled. Latents of one clip in batches of other sizes may differ in their last bits, so
the size of a batch is a part of where they are stored; on how many devices they were made is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.files import atomic_path, refuse_if, write_json
from dit_jax.prepare.chat import ordered
from dit_jax.prepare.refusals import MACHINE_REASONS
from dit_jax.prepare.stages import TRIES, Add, Examined, Kept, read_clips
from dit_jax.prepare.work import Progress, digest, file_name
from dit_jax.prepare.workers import Outcome
from dit_jax.prepare.writing import MARK, VERSION, write_records
from dit_jax.types import PositiveInt, TextEncoder

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 ``[b, t, h, w, 3]`` to latents ``[b, t', h', w', c]``."""
Failed = dict[str, Sequence[str]]
"""By the names of clips: a reason of ``REASONS``, and words."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How much is encoded at once."""

    files: PositiveInt = 64
    """Files that are dealt to one machine together; batches are drawn from these."""
    clips: PositiveInt = 8
    """Clips of a batch, at most, all of one shape. Each device takes a batch at a time."""
    pixels: PositiveInt = 1 << 25
    """Pixels of all frames of a batch, at most; a larger clip is encoded alone."""


def tried_again(reason: str, tries: int) -> bool:
    """Whether another run may read what this one could not."""
    return reason in MACHINE_REASONS and tries < TRIES


class Latents:
    """The latents of clips under one codec, a file each."""

    def __init__(self, work: Path, codec: str, batch: BatchConfig):
        """``codec``: its hash."""
        self.batch = batch
        self.folder = work / "latents" / digest(codec, batch)

    def place(self, one: Kept) -> Path:
        """Where a clip's latents are, float16 ``[t, h, w, c]``; with .json, why there are none."""
        key = digest(one.item.key, one.clip.start, one.clip.geometry)
        return self.folder / file_name(one.name, digest(key, one.clip.frames), ".npy")

    def failure(self, one: Kept) -> tuple[str, str, int] | None:
        """Why a clip has none, if it has none: a reason, words, and how many runs tried."""
        place = self.place(one)
        if place.exists():
            return None
        if place.with_suffix(".json").exists():
            return json.loads(place.with_suffix(".json").read_bytes())
        return "failed", "it was not encoded", 0

    def failures(self, kept: Iterable[Kept]) -> tuple[Failed, int]:
        """Which clips have none and why, and how many of these the next run tries again."""
        why = {one.name: failure for one in kept if (failure := self.failure(one)) is not None}
        again = sum(tried_again(reason, tries) for reason, _, tries in why.values())
        return {name: (reason, detail) for name, (reason, detail, _) in why.items()}, again

    def store(
        self,
        parts: Iterable[Sequence[Kept]],
        encode: Sequence[Encode],
        examined: Examined,
        add: Add,
    ) -> None:
        """Encodes the clips that are missing; a batch of which one is missing is encoded whole.

        ``encode``: one for each device. Each encodes whole batches, in turn, so that no bit depends on
        how many there are.
        """

        def missing() -> Iterator[list[Kept]]:
            for batch in itertools.chain.from_iterable(map(self._batches, parts)):
                failures = filter(None, map(self.failure, batch))
                if any(tried_again(reason, tries) for reason, _, tries in failures):
                    yield batch
                else:
                    add(len(batch), 0, 0.0)

        ahead, batches = itertools.tee(missing())
        reads = read_clips(itertools.chain.from_iterable(ahead), examined)
        jobs = (
            (batch, list(itertools.islice(reads, len(batch))), one)
            for batch, one in zip(batches, itertools.cycle(encode), strict=False)
        )
        for batch in ordered(self._encode, jobs, len(encode), ahead=len(encode)):
            add(len(batch), len(batch), sum(one.video_seconds for one in batch))

    def _batches(self, part: Sequence[Kept]) -> Iterator[list[Kept]]:
        """The clips in batches of one shape, ``[t, h, w]``."""
        by_shape: dict[tuple[int, int, int], list[Kept]] = {}
        for one in part:
            assert one.clip.geometry is not None
            crop = one.clip.geometry.crop
            by_shape.setdefault((one.clip.frames, crop.height, crop.width), []).append(one)
        for (frames, height, width), alike in sorted(by_shape.items()):
            most = self.batch.pixels // (frames * height * width)
            size = max(min(most, self.batch.clips), 1)
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    def _encode(self, job: tuple[list[Kept], list[Outcome], Encode]) -> list[Kept]:
        """Stores the latents of those that could be read, and of the others why they have none."""
        batch, reads, encode = job
        videos = [read.value for read in reads if not read.reason]
        filler = videos[:1] * ((1 << max(len(videos) - 1, 0).bit_length()) - len(videos))
        latents = iter(encode(np.stack(videos + filler)) if videos else ())
        for one, read in zip(batch, reads, strict=True):
            why, before = [read.reason, read.detail], self.failure(one)
            if not read.reason:
                stored = np.asarray(next(latents), np.float16)
                if np.isfinite(stored).all():
                    with atomic_path(self.place(one)) as fresh:
                        np.save(fresh, stored)
                    continue
                why = ["not finite", "its latents have numbers that are NaN or infinite"]
            tries = before[2] + 1 if before else 1
            write_json(self.place(one).with_suffix(".json"), [*why, tries])
        return batch


class States:
    """The states of captions under one text encoder, a file for each part of the media."""

    def __init__(self, work: Path, encoder: str):
        """``encoder``: its hash."""
        self.folder = work / "states" / encoder

    def place(self, captions: Iterable[str]) -> Path:
        """Where the states of a part's captions are, or will be."""
        key = digest(sorted(set(captions)))
        return self.folder / key[:2] / f"{key}.npz"

    def store(self, parts: Iterable[Sequence[str]], encoder: TextEncoder, add: Add) -> None:
        """Encodes the captions of every part that has no states yet."""
        for part in (sorted(set(captions)) for captions in parts):
            if part and not self.place(part).exists():
                states = encoder.encode(part)
                ends = np.cumsum([len(one) for one in states])
                # NumPy's files know no bfloat16: its bits.
                bits = np.concatenate(states).view(np.uint16)
                with atomic_path(self.place(part)) as fresh:
                    np.savez(fresh, captions=np.array(part), ends=ends, bits=bits)
            add(len(part), 0, 0.0)

    def load(self, captions: Iterable[str]) -> dict[str, np.ndarray]:
        """The states bfloat16 ``[s, e]`` of a part's captions."""
        with np.load(self.place(captions)) as stored:
            states = np.split(stored["bits"].view(ml_dtypes.bfloat16), stored["ends"][:-1])
            return dict(zip(stored["captions"].tolist(), states, strict=True))


def write_builder(
    output: Path,
    name: str,
    made_of: str,
    total: int,
    kept: Iterable[Kept],
    records: Callable[[Iterable[Kept], Failed], Iterable[Mapping[str, Any]]],
    failed: Failed,
    progress: Progress,
    **options: Any,
) -> int:
    """Writes ``output/NAME/1.0.0``, unless it is there and no clip that it lacks is worth another try;
    returns how many clips the next run tries again.

    ``records`` yields those of clips, and notes the clips of which there is none; these are added to
    ``failed``. What ``write_records`` keeps of a call that failed is kept of these, too.
    """
    target = output / name / VERSION
    unread = target.with_name(f"{VERSION}.incomplete") / "failed.json"
    mark = json.loads((target / MARK).read_bytes()) if (target / MARK).exists() else {}
    message = f"{str(target)!r} is there and was not prepared by this command: remove it, or give "
    foreign = target.exists() and not mark
    refuse_if([(foreign, f"{message}another --output or --name.")])
    same = mark.get("made_of") == made_of
    tries = mark["tries"] if same else 0
    if same and not any(tried_again(reason, tries) for reason, _ in mark["failed"].values()):
        failed |= mark["failed"]
        return 0
    lost = Failed()
    with progress.stage("records", total, "clips") as add:

        def after(start: int) -> Iterator[Mapping[str, Any]]:
            """The records from the ``start``-th on: those before are in finished shards."""
            lost.update(json.loads(unread.read_bytes()) if start else {})
            known, written = frozenset(lost), -1
            clips = (one for one in kept if one.name not in known)
            add(start, 0, 0.0)
            for record in records(itertools.islice(clips, start, None), lost):
                if len(lost) > written:  # Before the shard is finished that leaves them out.
                    write_json(unread, lost)
                    written = len(lost)
                yield record
                video = record["video"].shape[0] > 1  # A picture has no duration.
                add(1, 1, record["stop"] - record["start"] if video else 0.0)

        def again() -> int:
            return sum(tried_again(reason, 0) for reason, _ in lost.values())

        write_records(
            output,
            name,
            {"train": after},
            description="Clips prepared by dit_jax: start, stop in seconds of the source, a path.",
            labels=("source_height", "source_width"),
            numbers=("start", "stop", "source_fps"),
            resume=made_of,
            mark=lambda: {"made_of": made_of, "tries": tries + bool(again()), "failed": lost},
            **options,
        )
    failed |= lost
    return again() if tries + 1 < TRIES else 0
