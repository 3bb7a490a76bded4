"""Why a file is not used: a closed list of reasons, so that every file can be counted under one."""

from __future__ import annotations

REASONS = (
    "empty file",
    "cannot be read",
    "not media",
    "no video stream",
    "no frames",
    "truncated",
    "cannot be decoded",
    "encrypted",
    "hdr",
    "unsupported",
    "too large",
    "timed out",
    "decoder crashed",
    "out of memory",
    "failed",
)
"""`hdr`: only where it is refused rather than tone-mapped, or cannot be (Dolby Vision without a base
layer). `unsupported`: a format that is recognised but not decoded here. `failed`: a fault of ours."""
MACHINE_REASONS = frozenset(
    {"cannot be read", "timed out", "decoder crashed", "out of memory", "failed"}
)
"""Reasons that another run, with more time or memory or a disk that answers, may not find again. All
others follow from what is in the file."""


class Refused(Exception):
    """A file that is not used: `reason` is one of `REASONS`, `detail` says more in words."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
