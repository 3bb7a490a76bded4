"""What tests of sampling share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quickly():
    """The arrays here are too small to mind how well they are compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
