"""Compilation for small functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Makes XLA compile for CPUs several times as fast; the arrays here are too small to mind."""


@pytest.fixture(scope="session")
def jit() -> Callable[..., Any]:
    """``jax.jit`` that compiles quickly."""
    return functools.partial(jax.jit, compiler_options=QUICK)
