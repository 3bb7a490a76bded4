"""Windows: whose pixels they are, what fills them up, and that nothing but the seed decides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dit_jax.codec.crops import ClipBatch, CropConfig, CropLoader, cut
from dit_jax.config import check_types
from dit_jax.types import Sample

# Frames, rows, columns: longer than a window, shorter, as short as an image, exactly as large.
SIZES = [(12, 9, 11), (4, 8, 8), (1, 10, 7), (5, 6, 6)]
CONFIG = CropConfig(rows=4, frames=5, height=6, width=6)
TIME = 2


class Clips:
    """Clips whose every pixel says whose it is and where: (16 index + frame, row, column)."""

    def __init__(self, count: int = 8) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        t, h, w = SIZES[index % len(SIZES)]
        video = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1)
        video[..., 0] += 16 * index
        return {"video": video.astype(np.uint8), "caption": "", "fps": 8.0}


def loader(seed: int = 0, rows: Sequence[int] | None = None, **change: Any) -> CropLoader:
    return CropLoader(Clips(), dataclasses.replace(CONFIG, **change), TIME, seed, rows)


def taken(many: CropLoader, count: int = 6) -> list[ClipBatch]:
    made = [next(many) for _ in range(count)]
    many.close()
    return made


def same(one: list[ClipBatch], other: list[ClipBatch]) -> bool:
    return all(
        np.array_equal(a.video, b.video) and np.array_equal(a.num_frames, b.num_frames)
        for a, b in zip(one, other, strict=True)
    )


def test_windows_are_cut_out_of_clips_and_filled_by_their_last_frame():
    flipped, starts, seen = set(), set(), set()
    for batch in taken(loader(), 24):
        assert batch.video.shape == (4, 5, 6, 6, 3) and batch.video.dtype == np.uint8
        assert batch.num_frames.shape == (4,) and batch.num_frames.dtype == np.int32
        for video, count in zip(np.asarray(batch.video), batch.num_frames, strict=True):
            index, first = divmod(int(video[0, 0, 0, 0]), 16)
            t, h, w = SIZES[index % len(SIZES)]
            # Of 4 frames 3 make whole latents of 2; of 12 and of 5 there are 5.
            assert count == {12: 5, 4: 3, 1: 1, 5: 5}[t] and first + count <= t
            rows, columns = video[0, :, 0, 1].astype(int), video[0, 0, :, 2].astype(int)
            assert np.array_equal(np.diff(rows), [1] * 5) and rows[-1] < h
            turned = columns[0] > columns[-1]
            assert np.array_equal(np.diff(columns), [-1 if turned else 1] * 5)
            assert max(columns) < w
            assert np.array_equal(video[:count, 0, 0, 0], 16 * index + first + np.arange(count))
            assert (video[count:] == video[count - 1]).all()
            flipped.add(bool(turned))
            starts.add((first, rows[0], min(columns)))
            seen.add(index)
    assert flipped == {False, True} and seen == set(range(8)) and len(starts) > 20


def test_the_seed_decides_and_nothing_else():
    once = taken(loader(3))
    assert same(once, taken(loader(3, threads=2)))
    assert not same(once, taken(loader(4)))
    for batch in taken(loader(flip=False)):
        assert (np.diff(np.asarray(batch.video)[..., 2].astype(int), axis=3) == 1).all()


def test_processes_read_their_rows_of_the_same_batches():
    whole, halves = taken(loader(3)), [taken(loader(3, rows)) for rows in ((0, 1), (2, 3))]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch.video, np.concatenate([first.video, second.video]))
        counts = np.concatenate([first.num_frames, second.num_frames])
        np.testing.assert_array_equal(batch.num_frames, counts)


def test_a_saved_stream_goes_on_as_if_never_stopped():
    once, stopped = taken(loader(3), 7), loader(3)
    for _ in range(3):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    stopped.close()
    assert set(state) == {"0", "1", "2", "3", "run"}
    resumed = loader(3)
    resumed.set_state(state)
    assert same(once[3:], taken(resumed, 4))
    # Of more rows than this process reads.
    part = loader(3, (1, 2))
    part.set_state(state)
    np.testing.assert_array_equal(taken(part, 1)[0].video, once[3].video[1:3])
    other = loader(3)
    with pytest.raises(ValueError, match=r"no rows \[2"):
        other.set_state({"0": state["0"], "1": state["1"]})
    other.close()


def test_clips_that_hold_no_window_are_refused():
    rng = np.random.default_rng(0)
    sample: Any = {"video": np.zeros((5, 8, 5, 3), np.uint8), "caption": "", "fps": 8.0}
    with pytest.raises(ValueError, match="clip 7 is of 8 x 5 pixels, and data.crop takes 6 x 6"):
        cut(CONFIG, TIME, sample, rng, "clip 7")
    sample["video"] = np.zeros((5, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="clip 7 is float32"):
        cut(CONFIG, TIME, sample, rng, "clip 7")
    with pytest.raises(ValueError, match="the dataset is empty"):
        CropLoader(Clips(0), CONFIG, TIME, 0)


@pytest.mark.parametrize("name", ["rows", "frames", "height", "width"])
def test_sizes_below_one_are_refused(name: str):
    change: Any = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        check_types(dataclasses.replace(CONFIG, **change))
