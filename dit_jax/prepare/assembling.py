"""Clips to records: a TFDS builder whose bytes depend on the media and the settings alone."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import write_json
from dit_jax.prepare.decoding import DecodingConfig
from dit_jax.prepare.encoded import EncodedVideo
from dit_jax.prepare.stages import Kept, read_clips
from dit_jax.prepare.work import Progress
from dit_jax.prepare.workers import WorkersConfig
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
LABELS = ("source_height", "source_width")
NUMBERS = ("start", "stop", "source_fps")
DESCRIPTION = "Clips prepared by dit_jax: start, stop in seconds of the source, a path."

Failed = dict[str, tuple[str, str]]
"""By the names of clips: a reason of ``REASONS``, and words."""
Videos = Iterator[tuple[Kept, np.ndarray | EncodedVideo, float]]
"""Clips with what is stored of them, pixels or latents, and its frames a second."""


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
        pixel = isinstance(video, EncodedVideo) or video.dtype == np.uint8
        if not pixel and not np.isfinite(video).all():
            failed[one.name] = "not finite", "its latents have numbers that are NaN or infinite"
            continue
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
            if not np.isfinite(sample["text_states"]).all():
                failed[one.name] = "not finite", "the states of its caption are NaN or infinite"
                continue
        yield sample


def _mark(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MARK).read_bytes())
    except FileNotFoundError:
        return {}


def up_to_date(target: Path, made_of: str) -> bool:
    """Whether these records are there already.

    Raises:
        ValueError: where something else is there, which was not made here.
    """
    if _mark(target).get("made_of") == made_of:
        return True
    if target.exists() and not _mark(target):
        raise ValueError(
            f"{str(target)!r} is there and was not prepared by this command: remove it, or give "
            "another --output or --name."
        )
    return False


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

    ``records`` makes those of clips, and notes clips of which none can be made in ``failed``. After a
    failure the same call goes on after the last finished shard.

    Raises:
        ValueError: as ``write_records`` does.
    """
    target, fresh = output / name / VERSION, output / "work" / "writing"
    made, unread = fresh / name / VERSION, fresh / "failed.json"
    if _mark(made).get("made_of") == made_of:
        failed |= {clip: tuple(why) for clip, why in _mark(made)["failed"].items()}
    else:
        shutil.rmtree(made, ignore_errors=True)
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
                description=DESCRIPTION,
                labels=LABELS,
                texts=("source", *texts),
                numbers=NUMBERS,
                encoding=encoding,
                latents=latents,
                text_states=states,
                shard_bytes=shard_bytes,
                resume=made_of,
            )
        write_json(made / MARK, {"made_of": made_of, "failed": failed})
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(made, target)
    shutil.rmtree(fresh)
    return target
