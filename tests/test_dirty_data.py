"""A run over a set with records that cannot be used, and the errors that are not the data's."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import train
from dit_jax.config import load_config
from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.prepare.writing import write_records
from dit_jax.training import Checkpointer
from tests.runs import scalars, steps

CONFIG = """
from dit_jax.config import VideoRun, DataConfig, LogConfig
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig

def get_config():
    packing = PackingConfig(rows=2, row_tokens=64, row_text=64, row_segments=6, bins=2)
    return VideoRun(
        steps=20,
        data=DataConfig(source=RecordsConfig({path!r}), packing=packing),
        model=ModelConfig(
            dit=DiTConfig(width=32, depth=1, heads=2),
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=ByteEncoderConfig(width=16, depth=0, heads=2, max_bytes=15),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=10, draw_every=0),
        evaluators=(),
    )
"""
LONG = {5, 17, 29}


def sample(index: int) -> dict:
    rng = np.random.default_rng(index)
    video = rng.normal(size=(17 if index in LONG else 3, 4, 4, 4)).astype(np.float16)
    caption = "a caption of more than fifteen bytes" if index == 0 else f"clip {index}"
    return {"video": video, "caption": caption, "fps": 8.0}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A config of 40 records of latents, four in a shard: three are too long for a row, and the end of
    a shard is missing; with the indices of the records in that."""
    folder = tmp_path_factory.mktemp("dirty")
    splits, more = {"train": [sample(i) for i in range(40)]}, {"latents": (4, "a codec")}
    path = write_records(
        folder, "dirty", splits, description="some bad", shard_bytes=2000, encoding="bytes", **more
    )
    last = max(path.glob("*.array_record*"))
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 3])
    (folder / "config.py").write_text(CONFIG.replace("{path!r}", repr(str(path))))
    source, lost = RecordsSource(RecordsConfig(str(path))), set()
    for index in range(len(source)):
        try:
            source[index]
        except ValueError:
            lost.add(index)
    return folder / "config.py", lost


def run(config: Path, output: Path, *extra) -> tuple[int, str]:
    """Trains in this process on one device; the exit status and what was printed."""
    arguments, first = ("--config", config, "--output", output, *extra), jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as text:
        patch.setattr(jax, "devices", lambda: first)
        patch.setattr(jax, "local_devices", lambda: first)
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            status = train.main([str(one) for one in arguments])
        return status, text.getvalue()


@pytest.fixture(scope="module")
def whole(dirty, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of several epochs that nothing interrupts, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    status, text = run(dirty[0], output)
    assert status == 0 and steps(output) == [10, 20]
    return output, text


def test_what_cannot_be_used_is_left_out_and_named(dirty, whole):
    lost, (output, text) = dirty[1], whole
    assert lost and lost == set(range(min(lost), 40))
    report = json.loads((output / "report.json").read_text())
    assert report["records_left_out"] == len(LONG | lost)
    for index in LONG | lost:
        assert sum(f"record {index} of" in line for line in report["left_out"]) == 1, index
    assert "3 of 40 records cannot be packed" in text and "record 5 of" in text
    for index in lost:
        assert text.count(f"left out: record {index} of") == 1, index
    assert report["captions_cut"] > 0 and text.count("is cut to") == 1
    assert scalars(output, "records_left_out")[20] == len(lost)
    losses = scalars(output, "loss")
    assert np.isfinite(list(losses.values())).all() and losses[20] < losses[1]
    assert set(scalars(output, "skipped").values()) == {0}


def test_past_the_limit_the_save_under_way_is_finished_first(dirty, tmp_path: Path):
    """Nor do logs that cannot be written end a run."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "logs").write_text("a file, where a folder should be")
    status, text = run(
        dirty[0], output, "--checkpoint.every", 1, "--data.max-bad-records", len(dirty[1]) - 1
    )
    assert status == 1 and "data.max_bad_records" in text and "Traceback" not in text
    assert steps(output) and f"saved: {steps(output)}" in text
    assert text.count("logs cannot be written") == 1


def test_a_full_disk_is_no_fault_of_the_user(dirty, whole, tmp_path: Path, monkeypatch):
    """A limit on the size of files stands for a disk without space: writing fails in the middle. The
    run then goes on under a config with changes, which are printed."""
    output, save = tmp_path / "run", Checkpointer.save
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "checkpoints" / "20")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", limited)
        try:
            status, text = run(dirty[0], output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "resumed at step 10" in text
    assert "Failed writing" in text  # A long path may hide the cause.
    assert len(re.findall("^Traceback", text, re.MULTILINE)) <= 1, text
    status, text = run(dirty[0], output, "--data.packing.bins", 3)
    assert status == 0 and steps(output) == [10, 20] and "resumed at step 10" in text
    assert "data.packing.bins: 3 (it was 2)" in text and "packed anew" in text


def test_a_change_of_the_learning_rate_is_printed(dirty):
    config = load_config(str(dirty[0]))
    text = train.changes(dataclasses.replace(config, steps=12), config, 10)
    assert "steps: 12 (it was 20)" in text
    rates = re.search(r"learning rate at step 10: (\S+) \(it was (\S+)\)", text)
    assert 0 < float(rates[1]) < float(rates[2])
    assert not train.changes(config, config, 10)


def test_records_known_not_to_fit_and_a_directory_in_use_are_refused(dirty, tmp_path: Path):
    status, text = run(dirty[0], tmp_path, "--data.bad-records", "refuse")
    assert status == 2 and "3 of 40 records cannot be packed" in text
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "lock.json").exists()
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "time": 0.0}
    (tmp_path / "lock.json").write_text(json.dumps(holder))
    status, text = run(dirty[0], tmp_path)
    assert status == 2 and f"process {os.getppid()} on" in text
