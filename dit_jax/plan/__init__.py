"""Plans: what a training or sampling step costs on a TPU slice, compiled without one."""

from dit_jax.plan.abstract import CompilerFailed as CompilerFailed
from dit_jax.plan.abstract import DoesNotFit as DoesNotFit
from dit_jax.plan.report import Plan as Plan
from dit_jax.plan.report import plan_step as plan_step
from dit_jax.plan.report import render as render
from dit_jax.plan.sweep import render_sweep as render_sweep
from dit_jax.plan.sweep import run_sweep as run_sweep
