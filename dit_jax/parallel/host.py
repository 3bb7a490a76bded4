"""Memory of the host: large pages for what XLA allocates and frees at every step."""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Starts this program again with glibc's allocator asking for huge pages.

    On a CPU a train step allocates hundreds of MiB anew, and a sixth of its time goes into page
    faults without this (measured with ``benchmarks/train_step.py``). The allocator reads its
    settings when a process starts, hence the restart. Does nothing off Linux and glibc, nor where
    ``GLIBC_TUNABLES`` is set already (to anything, so this happens once).
    """
    if sys.platform != "linux" or TUNABLES in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
