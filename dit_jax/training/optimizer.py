"""AdamW or Muon with warm-up, a decay of the learning rate, clipping and no decay of vectors."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import optax
import optax.contrib


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer: AdamW (Loshchilov & Hutter 2017, "Decoupled Weight Decay Regularization"), or
    Muon for the matrices of the blocks (Jordan 2024; Liu et al. 2025, "Muon is Scalable for LLM
    Training", whose scaling of updates lets both share a learning rate) and AdamW with Nesterov
    momentum for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    """Peak, reached after the warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or down to ``final_fraction`` along half a cosine."""
    warmup_steps: int = 100
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    """Applied to matrices and embeddings, never to biases and norm scales."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None leaves them as they are."""
    ema_decay: float = 0.999
    """Of the averaged parameters that sampling uses; lower at the start of a run (see ``ema_rate``)."""
    accumulate: int = 1
    """Parts that the rows of a batch are split in, computed one after another."""

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and (self.clip_norm is None or self.clip_norm > 0)):
            raise ValueError(
                f"optimizer.learning_rate {self.learning_rate} and clip_norm {self.clip_norm} must be "
                "above 0 (1e-4 and 1 are usual)."
            )
        for name in ("b1", "b2", "ema_decay", "final_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: it is in [0, 1).")
        if not (self.warmup_steps >= 0 and self.weight_decay >= 0 and self.accumulate >= 1):
            raise ValueError(
                f"optimizer.warmup_steps {self.warmup_steps} and weight_decay {self.weight_decay} are "
                f"at least 0, accumulate {self.accumulate} at least 1."
            )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of ``steps`` steps: a linear warm-up, then the schedule."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            config.learning_rate, max(steps - warmup, 1), config.final_fraction
        )
    else:
        after = optax.constant_schedule(config.learning_rate)
    if warmup == 0:
        return after
    # The first step already moves: its rate is one part of the warm-up, not zero.
    rise = optax.linear_schedule(
        config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1)
    )
    return optax.join_schedules([rise, after], [warmup])


def decayed(params: Any) -> Any:
    """Which parameters decay: matrices, by name, since scanned layers stack their vectors too."""
    names = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


MUON_LAYERS = ("self_attention", "cross_attention", "mlp")
MUON_RMS = 0.2
"""Size of Muon's updates, matched to AdamW's (Liu et al. 2025, section 2.2)."""


OVER_TIME = 5
"""Axes of the kernels of convolutions over time and space, ``[t, h, w, in, out]``."""


def muon_axes(params: Any) -> Any:
    """Which parameters Muon orthogonalises: the layers' matrices; their last two axes are in and out,
    whether or not a scan has stacked the layers. Of convolutions over time, everything that goes into
    one output is in."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if names[-1] == "kernel" and leaf.ndim == OVER_TIME:
            return optax.contrib.MuonDimensionNumbers((0, 1, 2, 3), 4)
        if names[-1] != "kernel" or not set(names) & set(MUON_LAYERS):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation for a run of ``steps`` steps."""
    rate = learning_rate(config, steps)
    if config.kind == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=MUON_RMS,
        )
    else:
        update = optax.adamw(
            rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
        )
    limit = config.clip_norm
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    return optax.chain(clip, update)


def ema_rate(decay: float, step: jax.Array) -> jax.Array:
    """The decay at ``step``: min(decay, (1 + step) / (10 + step)), so that a short run's average
    forgets its initialisation."""
    return jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
