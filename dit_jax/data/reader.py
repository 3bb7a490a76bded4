"""Reads a source's samples and leaves out those that cannot be used.

Nothing in the data ends a run. A record that cannot be read, does not fit a row or is not finite is
left out, and is named once by its index in the data set. Whether a record is left out depends on the
record alone, so a run that is killed and resumed trains on the same samples. Errors of the world (a
disk that answers EIO) are not the record's: they are tried again, and then end the run, which can be
resumed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from dit_jax.data.mixing import sample_name
from dit_jax.files import InputError, explain, retry
from dit_jax.types import Sample, Source

FIRST_TRIES = 64
"""Samples that are tried until one can be used, when a run begins."""
GROUPS_SHOWN = 5
SizeCheck = Callable[[int, int, int], None]
"""``check(frames, height, width)`` raises ``ValueError`` for a size that cannot be trained on."""
T = TypeVar("T")


class DataError(ValueError):
    """More records than the limit cannot be used; this ends a run in its middle."""


def open_source(config: Any) -> Source:
    """The source of a run: what ``config.open()`` returns, or the config itself if it is a source."""
    return config.open() if hasattr(config, "open") else config


class Reader:
    """Hands the samples of a source to functions, and collects the indices of those left out.

    Args:
        source: Random access to samples.
        limit: Records that may be left out in the middle of a run; one more raises ``DataError``.
        unfit: bool ``[len(source)]``, records that are known beforehand not to fit (``find_unfit``).
            They are passed over without being read, and do not count towards the limit.
    """

    def __init__(self, source: Source, limit: int = 0, unfit: np.ndarray | None = None) -> None:
        if len(source) < 1:
            raise InputError("the dataset is empty: check data.source's path, split and filters.")
        self.source, self.limit, self.unfit = source, limit, unfit
        self.left_out: dict[int, str] = {}
        """Why each record was left out, by its index in the data set."""
        self.cut_captions = 0
        """Captions, each time one is read, of which the end was cut off."""
        self._lock = threading.Lock()

    def use(self, index: int, function: Callable[[Sample, str], T]) -> T | None:
        """``function(sample, name)`` of the sample; None if the record is left out.

        Raises:
            DataError: if the limit is passed.
            OSError: if storage fails, also when it is tried again.
        """
        if self.unfit is not None and self.unfit[index]:
            return None
        name = sample_name(self.source, index)
        try:
            sample = retry(lambda: self.source[index], f"reading {name}")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # A source of one's own may raise anything for a damaged record.
            return self._leave_out(index, name, error)
        try:
            return function(sample, name)
        except ValueError as error:
            return self._leave_out(index, name, error)

    def _leave_out(self, index: int, name: str, error: Exception) -> None:
        reason = explain(error)
        if name not in reason:
            reason = f"{name}: {reason}"
        with self._lock:
            if index in self.left_out:
                return
            self.left_out[index] = reason
            count = len(self.left_out)
        if count > self.limit or count >= len(self.source):
            raise DataError(
                f"{count} of {len(self.source)} records cannot be used, and at most {self.limit} may "
                f"be left out (data.max_bad_records). The last: {reason}"
            ) from error
        tqdm.write(f"left out: {reason}")

    def first(self, function: Callable[[Sample, str], T]) -> T:
        """``function`` of the first sample that can be used.

        Raises:
            InputError: if none of the first ``FIRST_TRIES`` can, with the reason of the first.
        """
        reason = None
        for index in range(min(len(self.source), FIRST_TRIES)):
            if self.unfit is not None and self.unfit[index]:
                continue
            try:
                return function(self.source[index], sample_name(self.source, index))
            except (OSError, MemoryError):
                raise
            except Exception as error:
                reason = reason or error
        raise InputError(
            f"none of the first {FIRST_TRIES} records can be used. The first: {reason}"
        ) from reason

    def note_cut(self, caption: str, length: int, limit: int) -> None:
        """Counts a caption that is longer than the text encoder reads; the first is printed."""
        with self._lock:
            self.cut_captions += 1
            first = self.cut_captions == 1
        if first:
            tqdm.write(
                f"a caption of {length} tokens is cut to the {limit} that the text encoder reads: "
                f"{caption[:60]!r}... (model.text says how many; others are counted as captions_cut)"
            )

    def unfit_names(self, limit: int) -> list[str]:
        """Names of the first ``limit`` records that were known not to fit before training began."""
        indices = [] if self.unfit is None else np.flatnonzero(self.unfit)[:limit].tolist()
        return [sample_name(self.source, index) for index in indices]


def find_unfit(source: Source, check: SizeCheck) -> tuple[np.ndarray | None, list[str]]:
    """Which records cannot be used, by their stored sizes, without reading them.

    Returns bool ``[n]`` and a line for each size that does not fit; None if the source has no ``sizes``
    (int32 ``[n, 4]``: frames, height, width and text; zeros if they are unknown).
    """
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        return None, []
    t, h, w = (np.asarray(sizes[:, i], np.int64) for i in range(3))
    # One number for each size: np.unique of rows takes ten times as long, and there may be millions.
    unique, first, inverse, counts = np.unique(
        (t << 40) | (h << 20) | w, return_index=True, return_inverse=True, return_counts=True
    )
    bad, lines = np.zeros(len(unique), bool), []
    for i, code in enumerate(unique.tolist()):
        size = code >> 40, (code >> 20) & 0xFFFFF, code & 0xFFFFF
        if not size[0]:
            continue
        try:
            check(*size)
        except ValueError as error:
            bad[i] = True
            name = sample_name(source, int(first[i]))
            shape = " x ".join(map(str, size))
            lines.append(f"{counts[i]} of {shape} (the first: {name}): {explain(error)}")
    return bad[inverse], lines


def checked_reader(source: Source, check: SizeCheck, policy: str, limit: int) -> Reader:
    """A reader under ``data.bad_records`` and ``data.max_bad_records``; what does not fit is printed.

    Raises:
        InputError: if records do not fit and the policy is "refuse", or if none fits.
    """
    limit = limit if policy == "skip" else 0
    unfit, lines = find_unfit(source, check)
    if unfit is None or not unfit.any():
        return Reader(source, limit)
    more = len(lines) - GROUPS_SHOWN
    lines = lines[:GROUPS_SHOWN] + ([f"and of {more} other sizes"] if more > 0 else [])
    text = f"{int(unfit.sum())} of {len(unfit)} records cannot be packed:\n  " + "\n  ".join(lines)
    if policy == "refuse" or unfit.all():
        remedy = "None is left to train on."
        if not unfit.all():
            remedy = "Leave them out with --data.bad-records skip, or change the data."
        raise InputError(f"{text}\n{remedy}")
    if jax.process_index() == 0:
        print(f"{text}\nThey are left out.", flush=True)
    return Reader(source, limit, unfit)
