"""Multistep solvers in lambda = log(alpha / sigma), with the network's x0: DPM-Solver++ and UniPC.

The exact solution over h = lambda_next - lambda is (Lu et al. 2022b, eq. 9)::

    x_next = sigma_next / sigma x + alpha_next int_0^h e^(s - h) x0(lambda + s) ds

DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) puts a line through the estimates at this level and the
one before. UniPC-2 with B_2(h) (Zhao et al. 2023, algorithms 5 and 6) predicts by the same line, and
corrects each point by a parabola through the estimate made at it, which costs no evaluation.

The steps to data and from no signal at all have an infinite h, and are of order 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.problem import Denoiser, Interval, Noise, Problem, interval


class OneBefore(NamedTuple):
    """The level before this one, and what was estimated there."""

    t: Float[Array, ""]
    x0: Float[Array, "b l p"]


class TwoBefore(NamedTuple):
    """The two levels before this one; x is where the last step began."""

    t: Float[Array, ""]
    x0: Float[Array, "b l p"]
    x: Float[Array, "b l p"]
    t_earlier: Float[Array, ""]
    x0_earlier: Float[Array, "b l p"]


def begin_dpmpp(x: Float[Array, "b l p"], t: Float[Array, ""]) -> OneBefore:
    """No history: no token has moved."""
    return OneBefore(t, 0 * x)


def begin_unipc(x: Float[Array, "b l p"], t: Float[Array, ""]) -> TwoBefore:
    """No history: no token has moved."""
    # A product, unlike a constant, is laid out over devices as x is.
    empty = 0 * x
    return TwoBefore(t, empty, empty, t, empty)


def _slope(
    step: Interval, before: Interval, x0: Float[Array, "b l p"], x0_before: Float[Array, "b l p"]
) -> Float[Array, "b l p"]:
    """Change of x0 over the step if it goes on as before; 0 where the history does not cover it."""
    known = before.moves & jnp.isfinite(step.h)
    return jnp.where(known, (x0 - x0_before) * jnp.where(known, step.h / before.h, 0), 0)


def _first_order(
    step: Interval, x: Float[Array, "b l p"], x0: Float[Array, "b l p"]
) -> Float[Array, "b l p"]:
    ratio = step.next.sigma / jnp.where(step.moves, step.now.sigma, 1)
    return ratio * x - step.next.alpha * jnp.expm1(-step.h) * x0


def dpmpp_2m_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: OneBefore,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> tuple[Float[Array, "b l p"], OneBefore]:
    """One evaluation, order 2."""
    step, before = interval(problem, t, t_next), interval(problem, history.t, t)
    x0 = denoiser(x, t).x0
    line = x0 + 0.5 * _slope(step, before, x0, history.x0)
    return step.take(_first_order(step, x, line), x), OneBefore(t, x0)


def _phi(z: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """phi_2 and phi_3, of phi_1 = (e^z - 1) / z and phi_(k+1) = (phi_k - 1 / k!) / z."""
    near = jnp.abs(z) < 0.25
    far = jnp.where(near, 1, z)
    two = (jnp.expm1(far) / far - 1) / far
    three = (two - 0.5) / far
    # Their series, for the differences above lose all digits near 0: next terms below 1e-12.
    small = jnp.where(near, z, 0)
    series2 = jnp.zeros_like(small)
    for k in (10, 9, 8, 7, 6, 5, 4, 3, 2):
        series2 = (series2 * small + 1) / k
    series3 = jnp.zeros_like(small)
    for k in (11, 10, 9, 8, 7, 6, 5, 4, 3):
        series3 = (series3 * small + 1) / k
    return jnp.where(near, series2, two), jnp.where(near, series3 / 2, three)


def _corrected(
    last: Interval,
    earlier: Interval,
    history: TwoBefore,
    x0: Float[Array, "b l p"],
    x: Float[Array, "b l p"],
) -> Float[Array, "b l p"]:
    """The point that the last step reached, given what was estimated there.

    With two estimates the correction is half their difference (UniC-1); with three the parabola's
    weights (UniC-2): those of B_2(h) solve a system of two equations.
    """
    base = _first_order(last, history.x, history.x0)
    weight = jnp.expm1(-last.h)
    known = earlier.moves & jnp.isfinite(last.h)
    h = jnp.where(known, last.h, 1)
    two, three = _phi(-h)
    scale = jnp.expm1(-h)
    b_one, b_two = -h * two / scale, -2 * h * three / scale
    ratio = jnp.where(known, -earlier.h / h, -1)
    back = (b_one - b_two) / (1 - ratio)
    change = x0 - history.x0
    bent = back * (history.x0_earlier - history.x0) / ratio + (b_one - back) * change
    after = base - last.next.alpha * weight * jnp.where(known, bent, 0.5 * change)
    return last.take(after, x)


def unipc_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: TwoBefore,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> tuple[Float[Array, "b l p"], TwoBefore]:
    """One evaluation: corrects where the last step arrived, and predicts where this one does."""
    step, last = interval(problem, t, t_next), interval(problem, history.t, t)
    earlier = interval(problem, history.t_earlier, history.t)
    x0 = denoiser(x, t).x0
    x = _corrected(last, earlier, history, x0, x)
    line = x0 + 0.5 * _slope(step, last, x0, history.x0)
    after = step.take(_first_order(step, x, line), x)
    return after, TwoBefore(t, x0, x, history.t, history.x0)
