"""Runs of the tiny model in processes of their own, as a user starts them, and what they leave."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dit_jax.files import write_whole

# The writer of logs imports PyTorch if it is there, for seconds and for nothing: now it does not.
absent = sys.modules.setdefault("torch", None) is None  # pyright: ignore
from tensorboardX.proto.event_pb2 import Event  # noqa: E402

if absent:
    del sys.modules["torch"]

ROOT = Path(__file__).parents[1]
CONFIG = Path(__file__).with_name("tiny_config.py")
INTERRUPTED = """
import os, runpy, signal, sys, threading
from dit_jax import training

number, step, seconds = signal.Signals[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])
advance, done = training.Progress.advance, []

def advance_and_send(*arguments):
    done.append(advance(*arguments))
    if len(done) == step:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()

training.Progress.advance = advance_and_send
sys.argv[1:4] = []
runpy.run_module("dit_jax.train", run_name="__main__", alter_sys=True)
"""
"""dit_jax.train as it is, but for a signal that the kernel delivers so many seconds after it began
its so-manieth step: a signal from outside would meet a step only by luck."""


@dataclasses.dataclass
class Ended:
    """A process that has ended."""

    status: int
    text: str


@dataclasses.dataclass
class Started:
    """A process, and the file that gets what it says (a pipe would hold up who is not listened to)."""

    process: subprocess.Popen[bytes]
    log: Path


@dataclasses.dataclass
class Run:
    """A run's directory, and the processes that made it, one after another or side by side."""

    directory: Path
    started: list[Started] = dataclasses.field(default_factory=list)
    ended: list[Ended] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Verbs:
    """Starts verbs as processes. Programs that one compiles the others find in a shared cache."""

    cache: Path
    logs: Path

    def start(
        self,
        verb: str,
        arguments: Sequence[Any],
        *,
        devices: int = 1,
        place: tuple[int, int, int] | None = None,
        stop: tuple[str, int, float] | None = None,
        code: str = "",
    ) -> Started:
        """Starts ``python -m dit_jax.VERB``, or Python code.

        ``place`` is (process, processes, port) of a run of several; ``stop`` is (signal, step,
        seconds): after so many seconds of the so-manieth step that it makes it gets the signal.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        # It serves process 0 alone; others would come to a collective later by a compilation.
        cache = self.logs / str(place[2]) if place else self.cache
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": os.environ["XLA_FLAGS"],
            "PYTHONPATH": f"{ROOT / 'tests' / 'without'}{os.pathsep}{ROOT}",
        }
        if place:
            index, count, port = place
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        command = ["-c", code] if code else ["-m", f"dit_jax.{verb}"]
        if stop:
            command = ["-c", INTERRUPTED, *map(str, stop)]
        handle, log = tempfile.mkstemp(dir=self.logs, suffix=f"-{verb}.log")
        with open(handle, "wb") as file:
            arguments = [sys.executable, *command, *map(str, arguments)]
            process = subprocess.Popen(
                arguments, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=self.logs
            )
        return Started(process, Path(log))

    def train(self, directory: Path | str, *extra: Any, **how: Any) -> Started:
        """Starts to train the tiny config."""
        return self.start("train", ["--config", CONFIG, "--output", directory, *extra], **how)


def end(*started: Started) -> list[Ended]:
    """Waits for processes. Where a test runs out of time meanwhile, kills them all."""
    try:
        return [Ended(one.process.wait(), one.log.read_text()) for one in started]
    finally:
        for one in started:
            one.process.kill()
            one.process.wait()
            print(f"--- {one.log}, exit status {one.process.returncode}")
            print(one.log.read_text()[-3000:])


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with fields, by their dotted names, set one after the other."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        inner = changed(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})
    return config


def upload_checkpoint(
    directory: Path, step: int, target: str, items: Sequence[str] = ("ema", "config")
) -> str:
    """Copies items of a run's checkpoint (by default what sampling reads) to a run on Cloud Storage;
    returns that."""
    source, place = directory / "checkpoints" / str(step), f"{target}/checkpoints/{step}"
    for file in source.rglob("*"):
        if file.is_file() and file.relative_to(source).parts[0] in items:
            write_whole(f"{place}/{file.relative_to(source)}", file.read_bytes())
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        data = (source / name).read_bytes() if (source / name).exists() else b""
        write_whole(f"{place}/{name}", data)
    return target


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def steps(directory: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    names = (path.name for path in (directory / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def item_arrays(directory: Path, step: int, item: str) -> Any:
    """The tree of one item of a checkpoint, as NumPy arrays."""
    path: Any = directory / "checkpoints" / str(step) / item
    names = ocp.PyTreeCheckpointHandler().metadata(path).tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
    return ocp.PyTreeCheckpointer().restore(path, restore_args=plain)


def arrays(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path: parameters, averages, moments and counters."""
    found = {}
    for item in ("params", "ema", "opt"):
        tree = item_arrays(directory, step, item)
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[item + jax.tree_util.keystr(key)] = np.asarray(leaf)
    return found


def data_state(directory: Path, step: int) -> dict[str, Any]:
    """Where the data stood at a checkpoint."""
    return json.loads((directory / "checkpoints" / str(step) / "data" / "metadata").read_text())


def assert_same_run(run: Path, other: Path, at: Sequence[int]) -> None:
    """Bit by bit at steps: parameters, averages, moments, counters, and where the data stands.

    What was lost and made again was logged again, with the same value: `scalars` checks it.
    """
    for step in at:
        one, two = arrays(run, step), arrays(other, step)
        assert one.keys() == two.keys() and len(one) > 50
        for name in one:
            assert one[name].dtype == two[name].dtype, name
            assert one[name].tobytes() == two[name].tobytes(), f"{name} at step {step}"
        assert data_state(run, step) == data_state(other, step)
    assert scalars(run, "loss") == scalars(other, "loss")


def scalars(directory: Path, name: str) -> dict[int, float]:
    """A logged scalar by step; no step may have been logged with two values."""
    found: dict[int, float] = {}
    for path in sorted((directory / "logs").glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            # A record: its length, a checksum of that, the event, a checksum of the event.
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break  # what a killed process was about to write
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.tag == name:
                    assert found.setdefault(event.step, value.simple_value) == value.simple_value
    return found
