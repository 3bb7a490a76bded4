"""Paths, local or on Cloud Storage (``gs://``), and how files are written whole.

This is the only module that knows the difference. A local path is a ``pathlib.Path``. A path on Cloud
Storage is an ``etils.epath.Path``, which has the same methods and needs ``pip install -e '.[gcs]'``.
What reads local files only (FFmpeg, memory maps) goes through ``local_copy`` and ``atomic_path``.

Errors of the user (a path that is not there, a bucket without permission) are ``InputError`` and are
raised before any long work. Errors of storage (a full disk, a server that answers 503) keep their own
type; ``retry`` tries those that pass by themselves again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

REMOTE = "gs://"
MiB = 2**20
REMEDY = "check the path, its permissions, and the credentials for its bucket (docs/storage.md)"
SURROGATES = re.compile("[\ud800-\udfff]")
# Errors that may be gone at the next try: of disks (a full one, ENOSPC, is not among them), of HTTP,
# and as TensorStore's ValueErrors begin, by gRPC's names.
PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EINTR)
HTTP_PASSING = ("429", "500", "502", "503", "504")
GRPC_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "Service Unavailable")
LASTING = ("No space left", "Disk quota", "File too large", "Read-only file system")
TRIES = 4
WAIT_SECONDS = 1.0  # Before the second try; doubled for each one after it.
HEARTBEAT_SECONDS = 30.0  # From one sign of life in a lock to the next.
STALE_SECONDS = 100.0  # A lock of another host without a sign of life for so long is taken over.
T = TypeVar("T")


class InputError(ValueError):
    """Something that the user gave is wrong; the message states the value, the constraint and the
    remedy. Commands print it alone and end with exit status 2."""


def refuse_if(faults: Iterable[tuple[bool, str]]) -> None:
    """Raises ``InputError`` with the message of the first fault that is true; the faults behind it are
    not evaluated, so that they may rely on its absence."""
    for wrong, message in faults:
        if wrong:
            raise InputError(message)


@contextlib.contextmanager
def checking_input(prefix: str, remedy: str) -> Iterator[None]:
    """Within it any error is about what the user gave: an ``InputError``, with words around it."""
    try:
        yield
    except Exception as error:  # Clients of storage have their own exceptions.
        raise InputError(f"{prefix} ({explain(error)}): {remedy}.") from error


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies on Cloud Storage."""
    return os.fspath(path).startswith(REMOTE)


@functools.cache
def _configure_storage() -> None:
    missing = importlib.util.find_spec("gcsfs") is None
    refuse_if([(missing, f"paths at {REMOTE} need the package gcsfs: pip install -e '.[gcs]'.")])
    # Its probe of the bucket's kind asks another server, and warns for every bucket without one.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    # Each try that fails logs its trace; what failed in the end is raised, and printed in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Listings are not cached: TensorStore and other processes write there, too.
    settings: dict[str, Any] = {"use_listings_cache": False}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"
    for protocol in ("gs", "gcs"):
        fsspec.config.conf[protocol] = {**settings, **fsspec.config.conf.get(protocol, {})}


def as_path(path: str | os.PathLike) -> Path:
    """The absolute path of what a user wrote: ``~`` is expanded, ``gs://`` is kept."""
    text = os.fspath(path)
    empty = not text or (is_remote(text) and not text.removeprefix(REMOTE).strip("/"))
    refuse_if([(empty, f"the path {text!r} is empty: give a local one or {REMOTE}BUCKET/PATH.")])
    if not is_remote(text):
        return Path(os.path.abspath(os.path.expanduser(text)))
    _configure_storage()
    from etils import epath

    return cast(Path, epath.Path(text))


def absolute(path: str | os.PathLike) -> str:
    """``as_path`` as a string, as configs store it."""
    return os.fspath(as_path(path))


def check_writable(directory: str | os.PathLike, name: str = "--output") -> Path:
    """Makes the directory that the option ``name`` gave, and proves that files can be written there."""
    path = as_path(directory)
    # Permission bits say nothing to root or about a read-only mount.
    probe = path / f".probe-{socket.gethostname()}-{os.getpid()}"
    with checking_input(f"{name} {os.fspath(directory)!r} cannot be written", REMEDY):
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    return path


def check_file(path: str | os.PathLike, name: str = "--output") -> Path:
    """The path of a file that can be written, in a directory that is made."""
    place = as_path(path)
    check_writable(place.parent, name)
    with checking_input(f"{name} {os.fspath(path)!r} cannot be written", REMEDY):
        folder = place.is_dir()  # Fails for a name that is too long, say.
    refuse_if([(folder, f"{name} {os.fspath(path)!r} is a directory: give a file in it.")])
    return place


def check_exists(path: str | os.PathLike, name: str, hint: str = "check the path") -> Path:
    """The path of something that must be there already."""
    place, prefix = as_path(path), f"{name} {os.fspath(path)!r}"
    with checking_input(f"{prefix} cannot be read", REMEDY):
        absent = not place.exists()
    refuse_if([(absent, f"{prefix} is not there: {hint}.")])
    return place


def explain(error: BaseException) -> str:
    """An error of storage in one line."""
    text = str(getattr(error, "strerror", None) or error).strip()
    # A long path often stands before the reason.
    return text.split("\n")[0][:600].strip() or type(error).__name__


def passes(error: BaseException) -> bool:
    """Whether an error of storage may be gone at the next try."""
    of_network = isinstance(error, TimeoutError | ConnectionError)
    of_network |= str(getattr(error, "code", None)) in HTTP_PASSING
    of_network |= any(name in str(error) for name in GRPC_PASSING)
    return of_network or getattr(error, "errno", None) in PASSING


def is_storage_error(error: BaseException) -> bool:
    """Whether a disk or a storage server failed, for a while or for good (no space is left)."""
    of_client = type(error).__module__.startswith(("gcsfs", "aiohttp", "google."))
    lasting = any(words in str(error) for words in LASTING)
    return isinstance(error, OSError) or of_client or lasting or passes(error)


def retry(function: Callable[[], T], what: str) -> T:
    """What ``function`` returns; errors of storage that pass by themselves are tried again."""
    for attempt in range(1, TRIES):
        try:
            return function()
        except Exception as error:
            if not passes(error):
                raise
            wait, why = WAIT_SECONDS * 2 ** (attempt - 1), explain(error)
            _print(f"{what} failed ({why}): try {attempt + 1} of {TRIES} in {wait:.0f} s")
            time.sleep(wait)
    return function()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def silence_traces() -> None:
    """Leaves the line that matters in sight if arrays cannot be read or written: Orbax and TensorStore
    log a trace for every array, and Python one for those under way when one fails."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    closed, left, hook = "Event loop is closed", inspect.iscoroutine, sys.__unraisablehook__
    sys.unraisablehook = lambda x: left(x.object) or str(x.exc_value) == closed or hook(x)


def run_verb(
    prog: str,
    work: Callable[[], Any],
    wrong: type[Exception] = ValueError,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Does the work of a command; returns its exit status, after an error was printed in a line.

    0 or what ``work`` returns: done. 2: something that was given is ``wrong``. 1: storage failed, or
    one of ``failures``, and the same command may succeed later. Other errors are raised.
    """
    with contextlib.suppress(AttributeError):
        # A file's name may be no UTF-8: printing it must not end what is done already.
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return work() or 0
    except wrong as error:
        _print(f"{prog}: error: {error}")
        return 2
    except Exception as error:
        if not isinstance(error, failures) and not is_storage_error(error):
            raise
        name = getattr(error, "filename", None)
        where = f"{os.fsdecode(name)!r}: " if isinstance(name, str | bytes) else ""
        _print(f"{prog}: failed: {where}{explain(error)}")
        return 1


def read_bytes(path: str | os.PathLike, limit: int, name: str = "the file") -> bytes:
    """The bytes of a file of at most ``limit`` bytes; ``InputError`` if it is absent or larger."""
    place, prefix = as_path(path), f"{name} {os.fspath(path)!r}"
    with checking_input(f"{prefix} cannot be read", REMEDY), place.open("rb") as file:
        # Not by its size: a pipe or a device that never ends must not fill the memory.
        data = file.read(limit + 1)
    large = len(data) > limit
    refuse_if([(large, f"{prefix} has more than {limit:,} bytes: give a smaller file.")])
    return data


def read_json(path: str | os.PathLike, name: str = "the file") -> Any:
    """The value of a JSON file; ``InputError`` as ``read_bytes``."""
    data = read_bytes(path, 64 * MiB, name)
    # Not UTF-8, no JSON, or nested too deeply.
    with checking_input(f"{name} {os.fspath(path)!r} is no JSON", "restore it"):
        return json.loads(data)


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file that is there whole or not at all, also for other processes that look."""
    with atomic_path(path) as fresh:
        fresh.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """``write_whole`` of JSON, indented for readers."""
    write_whole(path, json_bytes(value, indent=2))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8; half a surrogate pair, which UTF-8 cannot hold, becomes ``\\ud83d``."""
    # What ``backslashreplace`` writes for it is JSON's own escape.
    return json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="backslashreplace")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A local path of the same name for a file or a new folder, which becomes ``path`` if the block
    ends without an error; directories above ``path`` are made."""
    target, place = as_path(path), None
    if not is_remote(target):
        target = Path(os.path.realpath(target))  # A link stays a link.
        place = target.parent  # Only on the target's own disk a file is moved at once.
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dit_jax-", dir=place) as scratch:
        fresh = Path(scratch) / target.name
        yield fresh
        if place is None:  # An object of Cloud Storage appears when its upload is complete.
            retry(lambda: _copy(fresh, target), f"writing {os.fspath(target)!r}")
        else:
            os.replace(fresh, target)


def _copy(source: Path, target: Path) -> None:
    """Copies a file or folder, either side of which may lie on Cloud Storage."""
    if source.is_dir():
        if not is_remote(target):
            target.mkdir(exist_ok=True)
        for inner in sorted(source.iterdir()):
            if inner.name:
                _copy(inner, target / inner.name)
        return
    with source.open("rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, 16 * MiB)


def local_copy(path: str | os.PathLike) -> Path:
    """A local path with the same contents: the path itself, or a copy in the machine's temporary
    directory, made once per process and removed when that ends."""
    source = as_path(path)
    return _fetch(os.fspath(source)) if is_remote(source) else source


@functools.cache
def _fetch(name: str) -> Path:
    source = check_exists(name, "path")
    folder = Path(tempfile.mkdtemp(prefix="dit_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    retry(lambda: _copy(source, folder / source.name), f"reading {name!r}")
    return folder / source.name


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a directory for this process by a file with a sign of life in it; ``InputError`` if another
    living process holds it.

    On one host the process id tells whether the holder lives; on another it lives if its sign of life
    changes within ``STALE_SECONDS``, and else the lock is taken over (a launcher may start a pod again
    on another host). Local and network disks share no compare-and-swap, so two starts within the same
    second may both succeed.
    """
    path, me = directory / "lock.json", {"host": socket.gethostname(), "pid": os.getpid()}

    def read() -> dict[str, Any]:
        with contextlib.suppress(OSError, TypeError, ValueError):
            return dict(json.loads(path.read_bytes()))
        return {}

    def lives(holder: dict[str, Any], name: str) -> bool:
        if holder.get("host") == me["host"]:
            try:
                os.kill(int(holder.get("pid", -1)), 0)
            except (OSError, ValueError) as error:
                return isinstance(error, PermissionError)  # It lives, and is another user's.
            return True
        _print(f"the lock of {name} is there: waiting {STALE_SECONDS:.0f} s for a sign of life.")
        for _ in range(20):
            time.sleep(STALE_SECONDS / 20)
            if (now := read()).get("time") != holder.get("time"):
                return bool(now)
        return False

    holder, ended = read(), threading.Event()
    if any(holder.get(key, value) != value for key, value in me.items()):
        name = f"process {holder.get('pid')} on {holder.get('host')}"
        message = f"{os.fspath(directory)!r} is in use by {name}: wait for it to end, give another "
        message += f"--output, or remove {os.fspath(path)!r} if it has ended already."
        refuse_if([(lives(holder, name), message)])
        _print(f"the lock of {name} is stale: taken over.")

    def beat() -> None:
        with contextlib.suppress(Exception):  # What cannot be written is tried again next time.
            write_json(path, {**me, "time": time.time()})

    def beat_on() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            beat()

    beat()
    # A thread, since a step or a compilation may take longer than a lock stays fresh.
    threading.Thread(target=beat_on, name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(Exception):
            path.unlink()
