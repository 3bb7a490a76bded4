"""Why a file is not used: a closed list of reasons, so that every file can be counted under one."""

from __future__ import annotations

from collections.abc import Iterable

# `hdr`: what cannot be tone-mapped (Dolby Vision without a base layer).
# `unsupported`: a format that is recognised but not decoded here.
CONTENT_REASONS = ("empty file", "not media", "no video stream", "no frames", "truncated")
CONTENT_REASONS += ("cannot be decoded", "encrypted", "hdr", "unsupported", "too large")
# Another run, with more time or memory or a disk that answers, may not meet these again.
# `failed`: a fault of ours.
MACHINE_REASONS = frozenset(
    {"cannot be read", "timed out", "decoder crashed", "out of memory", "failed"}
)
REASONS = {*CONTENT_REASONS, *MACHINE_REASONS}


class Refused(Exception):
    """A file that is not used: `reason` is one of `REASONS`, `detail` says more in words."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def refuse_file(faults: Iterable[tuple[bool, str, str]]) -> None:
    """Raises the first of (whether it is so, reason, detail) that is so."""
    for wrong, reason, detail in faults:
        if wrong:
            raise Refused(reason, detail)
