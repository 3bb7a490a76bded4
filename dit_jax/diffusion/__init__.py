"""Diffusion: paths, noise ceilings, the objective, solvers and guidance, as functions of arrays."""

from dit_jax.diffusion.ceilings import CeilingConfig as CeilingConfig
from dit_jax.diffusion.guidance import classifier_free as classifier_free
from dit_jax.diffusion.objective import GROUPS_PER_SEGMENT as GROUPS_PER_SEGMENT
from dit_jax.diffusion.objective import DiffusionConfig as DiffusionConfig
from dit_jax.diffusion.objective import drop_captions as drop_captions
from dit_jax.diffusion.objective import noise_batch as noise_batch
from dit_jax.diffusion.objective import predicted_velocity as predicted_velocity
from dit_jax.diffusion.objective import token_noise as token_noise
from dit_jax.diffusion.objective import velocity_loss as velocity_loss
from dit_jax.diffusion.paths import TimeConfig as TimeConfig
from dit_jax.diffusion.paths import resolution_shift as resolution_shift
from dit_jax.diffusion.solvers import EVALUATIONS as EVALUATIONS
from dit_jax.diffusion.solvers import SOLVERS as SOLVERS
from dit_jax.diffusion.solvers import sigma_schedule as sigma_schedule
from dit_jax.diffusion.solvers import solve as solve
from dit_jax.diffusion.solvers import start as start
