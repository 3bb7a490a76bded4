"""Super-resolution: the first user of a token field."""

from dit_jax.upscale.low_res import LowRes as LowRes
from dit_jax.upscale.super_resolution import SuperResolutionEvaluator as SuperResolutionEvaluator
