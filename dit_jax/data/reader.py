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
from typing import TypeVar

import jax
import numpy as np
from tqdm import tqdm

from dit_jax.data.mixing import MixedSource
from dit_jax.data.records import RecordsSource
from dit_jax.files import InputError, explain, retry
from dit_jax.types import Sample, Source

FIRST_TRIES = 64
"""Samples that are tried until one can be used, when a run begins."""
GROUPS_SHOWN = 5
T = TypeVar("T")


class DataError(ValueError):
    """More records than the limit cannot be used; this ends a run in its middle."""


def record_name(source: Source, index: int) -> str:
    """How messages name the sample ``index`` of a source."""
    if isinstance(source, MixedSource):
        part, inside = source.locate(index)
        return record_name(source.parts[part], inside)
    if isinstance(source, RecordsSource):
        return f"record {index} of {source.config.path!r}"
    return f"sample {index}"


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
        self.source, self.limit = source, limit
        self.left_out: dict[int, str] = {}
        """Why each record was left out, by its index in the data set."""
        self.cut_captions = 0
        """Captions, each time one is read, of which the end was cut off."""
        self.unfit = unfit
        self._lock = threading.Lock()

    def use(self, index: int, function: Callable[[Sample, str], T]) -> T | None:
        """``function(sample, name)`` of the sample; None if the record is left out.

        Raises:
            DataError: if the limit is passed.
            OSError: if storage fails, also when it is tried again.
        """
        if self.unfit is not None and self.unfit[index]:
            return None
        name = record_name(self.source, index)
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
            of = f"{count} of {len(self.source)} records"
            raise DataError(
                f"{of} cannot be used, and at most {self.limit} may be left out "
                f"(data.max_bad_records). The last: {reason}"
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
            name = record_name(self.source, index)
            try:
                return function(self.source[index], name)
            except (OSError, MemoryError):
                raise
            except Exception as error:
                reason = reason or error
        raise InputError(
            f"none of the first {FIRST_TRIES} records can be used. The first: {reason}"
        ) from reason

    def note_cut(self, caption: str, length: int, limit: int) -> None:
        """Counts a caption that is longer than the text encoder reads; the first is said."""
        with self._lock:
            self.cut_captions += 1
            first = self.cut_captions == 1
        if first:
            tqdm.write(
                f"a caption of {length} tokens is cut to the {limit} that the text encoder reads: "
                f"{caption[:60]!r}... (model.text says how many; others are counted as captions_cut)"
            )


def stored_sizes(source: Source) -> np.ndarray | None:
    """Frames, height, width and text length int32 ``[n, 4]`` of every record, as the data sets'
    metadata have them; zeros for sets that do not say, None if no set does."""
    if isinstance(source, MixedSource):
        parts = [stored_sizes(part) for part in source.parts]
        if all(part is None for part in parts):
            return None
        pairs = zip(parts, source.parts, strict=True)
        return np.concatenate(
            [np.zeros((len(one), 4), np.int32) if part is None else part for part, one in pairs]
        )
    return getattr(source, "sizes", None)


def find_unfit(
    source: Source, check: Callable[[int, int, int], None]
) -> tuple[np.ndarray | None, list[str]]:
    """Which records cannot be used, by their stored sizes, without reading them.

    ``check(frames, height, width)`` raises ``ValueError`` for a size that does not fit. Returns bool
    ``[n]`` and a line for each size that does not; None if nothing is known of the sizes.
    """
    sizes = stored_sizes(source)
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
            name = record_name(source, int(first[i]))
            shape = " x ".join(map(str, size))
            lines.append(f"{counts[i]} of {shape} (the first: {name}): {explain(error)}")
    return bad[inverse], lines


def check_records(
    source: Source, check: Callable[[int, int, int], None], policy: str
) -> np.ndarray | None:
    """``find_unfit``, printed before training begins; ``policy`` is ``data.bad_records``.

    Raises:
        InputError: if records do not fit and the policy is "refuse", or if none fits.
    """
    unfit, lines = find_unfit(source, check)
    if unfit is None or not unfit.any():
        return None
    shown = lines[:GROUPS_SHOWN]
    if len(lines) > GROUPS_SHOWN:
        shown.append(f"and of {len(lines) - GROUPS_SHOWN} other sizes")
    text = f"{int(unfit.sum())} of {len(unfit)} records cannot be packed:\n  " + "\n  ".join(shown)
    if policy == "refuse":
        raise InputError(
            f"{text}\nLeave them out with --data.bad-records skip, or change the data."
        )
    if unfit.all():
        raise InputError(f"{text}\nNone is left to train on.")
    if jax.process_index() == 0:
        print(f"{text}\nThey are left out.", flush=True)
    return unfit


def checked_reader(
    source: Source, check: Callable[[int, int, int], None], policy: str, limit: int
) -> Reader:
    """A reader under ``data.bad_records`` and ``data.max_bad_records``; raises as ``check_records``."""
    unfit = check_records(source, check, policy)
    return Reader(source, limit if policy == "skip" else 0, unfit)


def names_of(reader: Reader, limit: int) -> list[str]:
    """Names of the first ``limit`` records that were known not to fit before training began."""
    indices = [] if reader.unfit is None else np.flatnonzero(reader.unfit)[:limit].tolist()
    return [record_name(reader.source, index) for index in indices]
