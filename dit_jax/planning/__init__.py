"""Plans: what a training or sampling step costs on a TPU slice, compiled without one."""

from dit_jax.planning.lowering import CompilerFailed as CompilerFailed
from dit_jax.planning.lowering import DoesNotFit as DoesNotFit
from dit_jax.planning.planner import plan_step as plan_step
from dit_jax.planning.report import Plan as Plan
from dit_jax.planning.sweep import run_sweep as run_sweep
from dit_jax.planning.text import render as render
from dit_jax.planning.text import render_sweep as render_sweep
from dit_jax.planning.text import render_trial as render_trial
