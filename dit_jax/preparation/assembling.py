"""Clips to records: a TFDS builder whose bytes depend on the media and the settings alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_jax.data.writing import VERSION, LatentsOf, StatesOf, write_records
from dit_jax.preparation.decoding import DecodingConfig
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.stages import Kept, read_clips
from dit_jax.preparation.work import write_json
from dit_jax.preparation.workers import WorkersConfig

MARK = "prepared.json"
"""Beside the records: what they were made of, and that they were made here."""
LABELS = ("source_height", "source_width")
NUMBERS = ("start", "stop", "source_fps")
DESCRIPTION = "Clips prepared by dit_jax: start, stop in seconds of the source, a path."

Failed = dict[str, tuple[str, str]]
"""By the names of clips: a reason of ``REASONS``, and words."""
Videos = Iterator[tuple[Kept, np.ndarray, float]]
"""Clips with what is stored of them, pixels or latents, and its frames a second."""


def pixels(
    kept: Sequence[Kept], decoding: DecodingConfig, workers: WorkersConfig, failed: Failed
) -> Videos:
    """The clips' frames, read again; those that cannot be are noted in ``failed`` and left out."""
    for one, read in zip(kept, read_clips(kept, decoding, workers), strict=True):
        if read.reason:
            failed[one.name] = read.reason, read.detail
        else:
            yield one, read.value, one.clip.fps


def samples(
    videos: Videos,
    texts: Mapping[str, Mapping[str, str]],
    states: Callable[[Kept], np.ndarray] | None,
) -> Iterator[dict[str, Any]]:
    """Records; ``texts`` are by clip."""
    for one, video, fps in videos:
        sample = {
            "video": video,
            "fps": fps,
            **texts[one.name],
            "source": one.item.name,
            "start": one.clip.begin,
            "stop": one.clip.begin + one.clip.seconds,
            "source_height": one.probe.height,
            "source_width": one.probe.width,
            "source_fps": one.probe.fps,
        }
        if states is not None:
            sample["text_states"] = states(one)
        yield sample


def up_to_date(target: Path, made_of: str) -> bool:
    """Whether these records are there already.

    Raises:
        ValueError: where something else is there, which was not made here.
    """
    mark = target / MARK
    if mark.exists():
        return json.loads(mark.read_bytes())["made_of"] == made_of
    if target.exists():
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
    records: Iterable[Mapping[str, Any]],
    texts: Sequence[str],
    encoding: Literal["zlib", "bytes"],
    latents: LatentsOf | None,
    states: StatesOf | None,
    progress: Progress,
) -> Path:
    """Writes ``output/NAME/1.0.0`` in a folder of its own, and moves it to its place when it is whole.

    Raises:
        ValueError: as ``write_records`` does.
    """
    target, fresh = output / name / VERSION, output / "work" / "writing"
    shutil.rmtree(fresh, ignore_errors=True)
    with progress.stage("records", total, "clips") as bar:

        def counted() -> Iterator[Mapping[str, Any]]:
            for record in records:
                yield record
                bar.add(1, 1, record["stop"] - record["start"])

        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of downloads.
            made = write_records(
                fresh,
                name,
                {"train": counted()},
                description=DESCRIPTION,
                labels=LABELS,
                texts=("source", *texts),
                numbers=NUMBERS,
                encoding=encoding,
                latents=latents,
                text_states=states,
            )
    write_json(made / MARK, {"made_of": made_of})
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(made, target)
    shutil.rmtree(fresh)
    return target
