"""Adapters that several processes train: the losses of one device, and exact after a death."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from tests import runs
from tests.lora.adapted import base_config, save_base
from tests.runs import Ended, Started, Verbs, assert_same_run, end, scalars

LAST, EVERY = 6, 2
CONFIG = """
import dataclasses
from dit_jax.data import PackingConfig
from dit_jax.lora import LoraConfig, lora_run
from dit_jax.training import CheckpointConfig, HeldOutLoss, OptimizerConfig

def get_config():
    return lora_run(
        {base!r},
        steps={last},
        lora=LoraConfig(rank=4, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every={every}, max_to_keep=9),
        evaluators=(HeldOutLoss(),),
    )
"""
MESH = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.context", 2, "--log.every", 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of adapters, beside the base that they adapt."""
    folder = tmp_path_factory.mktemp("processes")
    base = save_base(base_config(folder / "base"))
    (folder / "lora.py").write_text(CONFIG.format(base=base.output, last=LAST, every=EVERY))
    return folder / "lora.py"


def start(
    verbs: Verbs, config: Path, directory: Path, dies: int | None = None
) -> tuple[Started, Started]:
    """Two processes of four devices, of which the second may die in a step."""
    port = runs.free_port()
    apart = dataclasses.replace(verbs, cache=verbs.logs / str(port))
    given = ["--config", config, "--output", directory, *MESH]
    given += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id"]
    stop = None if dies is None else ("SIGKILL", dies, 0)
    first = apart.start("train", [*given, 0], devices=4)
    return first, apart.start("train", [*given, 1], devices=4, stop=stop)


@pytest.mark.slow
def test_two_processes_train_what_one_device_trains(verbs: Verbs, config: Path, tmp_path: Path):
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))

    def statuses(ended: list[Ended]) -> list[int]:
        return [one.status for one in ended]

    one = verbs.start("train", ["--config", config, "--output", alone, "--log.every", 1])
    assert statuses(end(one)) == [0]
    assert statuses(end(*start(verbs, config, whole))) == [0, 0]
    assert statuses(end(*start(verbs, config, killed, dies=5))) == [
        -signal.SIGABRT,
        -signal.SIGKILL,
    ]
    ended = end(*start(verbs, config, killed))
    assert statuses(ended) == [0, 0] and "resumed at step" in ended[0].text
    assert_same_run(whole, killed, [LAST])
    assert len(losses := scalars(alone, "loss")) == LAST
    assert scalars(whole, "loss") == pytest.approx(losses, rel=1e-5)
