"""A run over a set with records that cannot be used, and the errors that are not the data's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dit_jax import train
from dit_jax.config import load_config
from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.prepare.writing import write_records
from dit_jax.train import changes
from tests.runs import Verbs, end, scalars, steps

CONFIG = """
from dit_jax.config import VideoRun, DataConfig, LogConfig
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig

def get_config():
    return VideoRun(
        steps=20,
        data=DataConfig(
            source=RecordsConfig({path!r}),
            packing=PackingConfig(rows=2, row_tokens=64, row_text=64, row_segments=6, bins=2),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=32, depth=1, heads=2),
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=ByteEncoderConfig(width=16, depth=0, heads=2, max_bytes=15),
        ),
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=10, draw_every=0),
        evaluators=(),
    )
"""
LONG, NOT_FINITE = (5, 17, 29), (8, 22)
SENTINEL = struct.pack("<e", 77.0)
NAN = struct.pack("<e", np.nan)


def write(directory: Path) -> Path:
    """40 records of latents, four in a shard: three too long for a row, two with NaN, and a shard whose
    end is missing."""
    rng = np.random.default_rng(0)

    def sample(index: int) -> dict:
        video = rng.normal(size=(17 if index in LONG else 3, 4, 4, 4)).astype(np.float16)
        if index in NOT_FINITE:
            video[0, 0, 0, 0] = 77.0
        caption = "a caption of more than fifteen bytes" if index == 0 else f"clip {index}"
        return {"video": video, "caption": caption, "fps": 8.0}

    path = write_records(
        directory,
        "dirty",
        {"train": [sample(i) for i in range(40)]},
        description="latents, some bad",
        encoding="bytes",
        latents=(4, "a codec"),
        shard_bytes=2000,
    )
    # The writer refuses NaN: someone else's records have it.
    for shard in sorted(path.glob("*.array_record*")):
        reader = ArrayRecordReader(str(shard))
        records = [bytes(one) for one in reader.read_all()]
        reader.close()
        if any(SENTINEL in one for one in records):
            writer = ArrayRecordWriter(str(shard), "group_size:1")
            for one in records:
                writer.write(one.replace(SENTINEL, NAN))
            writer.close()
    shards = sorted(path.glob("*.array_record*"))
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(last[: len(last) // 3])
    return path


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A config of the set, and the indices of the records in the truncated shard."""
    folder = tmp_path_factory.mktemp("dirty")
    path = write(folder)
    (folder / "config.py").write_text(CONFIG.replace("{path!r}", repr(str(path))))
    source, lost = RecordsSource(RecordsConfig(str(path))), set()
    for index in range(len(source)):
        try:
            source[index]
        except ValueError:
            lost.add(index)
    return folder / "config.py", lost - set(NOT_FINITE)


@pytest.fixture(scope="module")
def whole(dirty, verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of several epochs that nothing interrupts, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    status, text = run(verbs, dirty[0], output)
    assert status == 0 and steps(output) == [10, 20]
    return output, text


def run(verbs: Verbs, config: Path, output: Path, *extra) -> tuple[int, str]:
    """Trains on one device; the exit status and what was printed."""
    (ended,) = end(verbs.start("train", ["--config", config, "--output", output, *extra]))
    return ended.status, ended.text


def test_what_cannot_be_used_is_left_out_and_named(dirty, whole):
    lost, (output, text) = dirty[1], whole
    assert lost and lost == set(range(min(lost), 40))
    report = json.loads((output / "report.json").read_text())
    expected = {*LONG, *NOT_FINITE, *lost}
    assert report["records_left_out"] == len(expected)
    for index in expected:
        assert sum(f"record {index} of" in line for line in report["left_out"]) == 1, index
    assert "3 of 40 records cannot be packed" in text and "record 5 of" in text
    for index in {*NOT_FINITE, *lost}:
        assert text.count(f"left out: record {index} of") == 1, index
    assert report["captions_cut"] > 0 and text.count("is cut to") == 1
    assert scalars(output, "records_left_out")[20] == len({*NOT_FINITE, *lost})
    losses = scalars(output, "loss")
    assert np.isfinite(list(losses.values())).all() and losses[20] < losses[1]
    assert set(scalars(output, "skipped").values()) == {0}


def test_past_the_limit_the_save_under_way_is_finished_first(dirty, verbs: Verbs, tmp_path: Path):
    """Nor do logs that cannot be written end a run."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "logs").write_text("a file, where a folder should be")
    limit = ("--data.max-bad-records", 4)
    status, text = run(verbs, dirty[0], output, "--checkpoint.every", 1, *limit)
    assert status == 1 and "data.max_bad_records" in text and "Traceback" not in text
    assert steps(output) and f"saved: {steps(output)}" in text
    assert text.count("logs cannot be written") == 1


def test_a_full_disk_is_no_fault_of_the_user(dirty, whole, verbs: Verbs, tmp_path: Path):
    """A limit on the size of files stands for a disk without space: writing fails in the middle. The
    run then goes on under a config with changes, which are printed."""
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "checkpoints" / "20")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        started = verbs.start("train", ["--config", dirty[0], "--output", output])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (ended,) = end(started)
    assert ended.status == 1 and "Failed writing" in ended.text  # A long path may hide the cause.
    assert len(re.findall("^Traceback", ended.text, re.MULTILINE)) <= 1, ended.text
    status, text = run(verbs, dirty[0], output, "--data.packing.bins", 3)
    assert status == 0 and steps(output) == [10, 20]
    assert "resumed at step 10" in ended.text and "resumed at step 10" in text
    assert "data.packing.bins: 3 (it was 2)" in text and "packed anew" in text


def test_a_change_of_the_learning_rate_is_printed(dirty):
    config = load_config(str(dirty[0]))
    text = changes(dataclasses.replace(config, steps=12), config, 10)
    assert "steps: 12 (it was 20)" in text
    rates = re.search(r"learning rate at step 10: (\S+) \(it was (\S+)\)", text)
    assert 0 < float(rates[1]) < float(rates[2])
    assert not changes(config, config, 10)


def test_records_known_not_to_fit_can_be_refused(dirty, tmp_path: Path, capsys):
    output, mesh = tmp_path / "run", ("--mesh.data", 8, "--data.packing.rows", 8)
    given = ("--config", dirty[0], "--output", output, "--data.bad-records", "refuse", *mesh)
    assert train.main([str(one) for one in given]) == 2
    assert "3 of 40 records cannot be packed" in capsys.readouterr().err
    assert not (output / "checkpoints").exists() and not (output / "lock.json").exists()


def test_a_directory_in_use_is_refused(dirty, tmp_path: Path, capsys):
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "time": 0.0}
    (tmp_path / "lock.json").write_text(json.dumps(holder))
    assert train.main(["--config", str(dirty[0]), "--output", str(tmp_path)]) == 2
    assert f"process {os.getppid()} on" in capsys.readouterr().err
