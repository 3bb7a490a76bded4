"""The variances of ancestral sampling, by name."""

from typing import Literal

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
