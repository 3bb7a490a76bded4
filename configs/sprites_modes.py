"""Game characters for every mode of sampling: what they do is a cycle, and the truth is known.

    python scripts/sprites_to_records.py --input sprites.npz --output data --cycles
    python -m dit_jax.train --config configs/sprites_modes.py
    python benchmarks/sprites.py --checkpoint runs/sprites_modes

The clips of ``configs/sprites.py``, each beginning anywhere in its cycle. Every frame has tokens of its
own, which a loop of eight frames needs, and half of the clips have some of their frames given. There is
no report at the end: what the prompt leaves open, where in its cycle a clip begins, the benchmark
knows how to compare.

Measured (``docs/modes.md``): of 96 clips of characters that training never sees all are judged right,
from text, from a first frame, extended, restyled, and as loops; frames that are made between or beside
given ones have 28.3 to 29.7 dB. The training took 15.8 minutes on two idle cores
like those of ``configs/modes.py``.
"""

import dataclasses

from sprites import get_config as sprites

from dit_jax.config import VideoRun
from dit_jax.data import RecordsConfig
from dit_jax.diffusion import MaskConfig
from dit_jax.training import HeldOutLoss


def get_config() -> VideoRun:
    base = sprites()
    masks = MaskConfig.only(
        none=0.5,
        first=0.12,
        head=0.1,
        tail=0.08,
        ends=0.06,
        every=0.05,
        keyframes=0.03,
        window=0.06,
    )
    packing = dataclasses.replace(base.data.packing, row_text=64, row_segments=1)
    source = RecordsConfig(path="data/sprites_cycles/1.0.0")
    return dataclasses.replace(
        base,
        output="runs/sprites_modes",
        steps=1600,
        data=dataclasses.replace(base.data, source=source, packing=packing),
        model=dataclasses.replace(base.model, patch=dataclasses.replace(base.model.patch, t=1)),
        diffusion=dataclasses.replace(base.diffusion, masks=masks),
        evaluators=(HeldOutLoss(),),
    )
