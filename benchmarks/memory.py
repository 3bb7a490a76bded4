"""What settings that save memory cost in loss: short runs of the quickstart, one for each setting.

    python benchmarks/memory.py [--steps 150] [--rows 4] [NAME ...]

All runs see the same data and draw the same noise, but for ``seed``: the baseline with another one,
which tells how much of a difference means nothing. Printed is the loss on held-out clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.quickstart import get_config
from dit_jax import parallel
from dit_jax.train import train
from dit_jax.training import HeldOutLoss, OptimizerConfig

ADAMW = OptimizerConfig(learning_rate=1e-3, warmup_steps=20, ema_decay=0.97)
MUON = dataclasses.replace(get_config().optimizer, warmup_steps=20, ema_decay=0.97)
FEWEST = {"moments": "int8", "ema": "none", "param_dtype": "bfloat16"}
SETTINGS = {
    "float32": ADAMW,
    "seed": ADAMW,
    "moments bfloat16": dataclasses.replace(ADAMW, moments="bfloat16"),
    "moments int8": dataclasses.replace(ADAMW, moments="int8"),
    "moments factored": dataclasses.replace(ADAMW, moments="factored"),
    "ema none": dataclasses.replace(ADAMW, ema="none"),
    "ema bfloat16": dataclasses.replace(ADAMW, ema="bfloat16"),
    "param_dtype bfloat16": dataclasses.replace(ADAMW, param_dtype="bfloat16"),
    "int8, no ema, bfloat16": dataclasses.replace(ADAMW, **FEWEST),
    "muon float32": MUON,
    "muon moments int8": dataclasses.replace(MUON, moments="int8"),
}


def main() -> None:
    """Trains with each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=4)
    given = parser.parse_args()
    parallel.tune_cpu()
    for name in given.names:
        with tempfile.TemporaryDirectory() as directory:
            base = get_config()
            packing = dataclasses.replace(base.data.packing, rows=given.rows)
            # One compiled layer for all: most of the time of a short run is compiling.
            dit = dataclasses.replace(base.model.dit, scan=True)
            config = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, dit=dit),
                output=directory,
                seed=base.seed + (name == "seed"),
                steps=given.steps,
                data=dataclasses.replace(base.data, packing=packing),
                log=dataclasses.replace(base.log, every=10, draw_every=0),
                optimizer=SETTINGS[name],
                evaluators=(HeldOutLoss(),),
            )
            start = time.process_time()
            if train(config):  # Stopped by a signal.
                return
            report = json.loads((Path(directory) / "report.json").read_text())
            loss = {key: value for key, value in report.items() if "loss" in key}
            print(f"{name}: {loss}, {time.process_time() - start:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
