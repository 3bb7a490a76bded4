"""Diffusion: paths, masks, the objective, solvers and guidance, as functions of arrays."""

from dit_jax.diffusion.masks import MaskConfig as MaskConfig
from dit_jax.diffusion.objective import DiffusionConfig as DiffusionConfig
from dit_jax.diffusion.objective import noise_batch as noise_batch
from dit_jax.diffusion.objective import sample_keys as sample_keys
from dit_jax.diffusion.objective import token_loss as token_loss
from dit_jax.diffusion.paths import PathConfig as PathConfig
from dit_jax.diffusion.paths import TimeConfig as TimeConfig
