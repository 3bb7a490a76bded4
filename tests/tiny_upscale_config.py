"""The tiny config for super-resolution."""

import dataclasses

from tiny_config import get_config as tiny

from dit_jax.config import VideoRun
from dit_jax.upscale import LowRes


def get_config() -> VideoRun:
    base = tiny()
    model = dataclasses.replace(base.model, conditioners={"low_res": LowRes(factor=2)})
    return dataclasses.replace(base, model=model)
