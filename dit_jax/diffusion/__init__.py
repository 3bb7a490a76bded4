"""Diffusion: paths, masks, the objective, solvers and guidance, as functions of arrays."""

from dit_jax.diffusion.masks import MaskConfig as MaskConfig
from dit_jax.diffusion.objective import DiffusionConfig as DiffusionConfig
from dit_jax.diffusion.objective import estimate as estimate
from dit_jax.diffusion.objective import noise_batch as noise_batch
from dit_jax.diffusion.objective import sample_keys as sample_keys
from dit_jax.diffusion.objective import split_output as split_output
from dit_jax.diffusion.objective import token_loss as token_loss
from dit_jax.diffusion.objective import token_noise as token_noise
from dit_jax.diffusion.paths import Estimate as Estimate
from dit_jax.diffusion.paths import PathConfig as PathConfig
from dit_jax.diffusion.paths import TimeConfig as TimeConfig
from dit_jax.diffusion.paths import interpolate as interpolate
from dit_jax.diffusion.paths import resolution_shift as resolution_shift
from dit_jax.diffusion.paths import velocity_of as velocity_of
from dit_jax.diffusion.solvers import SOLVERS as SOLVERS
from dit_jax.diffusion.solvers import GuidanceConfig as GuidanceConfig
from dit_jax.diffusion.solvers import SolverConfig as SolverConfig
from dit_jax.diffusion.solvers import Spacing as Spacing
from dit_jax.diffusion.solvers import guide as guide
from dit_jax.diffusion.solvers import noise_levels as noise_levels
from dit_jax.diffusion.solvers import start as start
