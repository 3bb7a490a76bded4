"""A judge for images of classes, where no published network knows them: one trained on the spot.

A small convolutional network learns the classes from images that the generator never saw. What it makes
of generated images is measured in two ways: how many it takes for the class that was asked for, and the
Fréchet distance between its features of them and of real images, beside that of other real images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from dit_jax.evaluate.distances import frechet_distance
from dit_jax.evaluate.features import NetworkFeatures
from dit_jax.evaluate.moments import feature_statistics
from dit_jax.types import Params

FEATURES = 64
EPOCHS = 8
BATCH = 64
LEARNING_RATE = 2e-3
SHIFT = 2
"""Pixels by which training images are moved at most, in both directions."""
HELD = 5
"""Of the images given, every so-many-th judges the classifier."""
LEAST_CORRECT = 0.5
"""A classifier that is right less often cannot judge."""


class Classifier(nn.Module):
    """Images ``[n, h, w, 3]`` in [-1, 1] to logits ``[n, classes]`` and features ``[n, FEATURES]``."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> tuple[jax.Array, jax.Array]:
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), use_bias=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        features = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(features), features


def _floats(images: Any) -> Any:
    return images.astype(np.float32) / 127.5 - 1


def _moved(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by a few pixels, its edge repeated."""
    h, w = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    at = rng.integers(0, 2 * SHIFT + 1, (len(images), 2))
    return np.stack([x[i : i + h, j : j + w] for x, (i, j) in zip(padded, at, strict=True)])


def train_classifier(images: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0) -> Params:
    """Parameters of a ``Classifier`` that has learned uint8 images ``[n, h, w, 3]``, n >= 1."""
    model, rng = Classifier(classes), np.random.default_rng(seed)
    batch = min(BATCH, len(images))
    steps = EPOCHS * (len(images) // batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply(params, x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, x: jax.Array, y: jax.Array) -> tuple[Params, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(seed), _floats(images[:1]))
    state = optimizer.init(params)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for first in range(0, len(images) - batch + 1, batch):
            chosen = order[first : first + batch]
            x = _floats(_moved(images[chosen], rng))
            params, state = step(params, state, x, labels[chosen])
    return params


def seen_by(params: Params, classes: int) -> NetworkFeatures:
    """The feature function of a trained classifier: uint8 images to its logits and its features."""
    model = Classifier(classes)
    return NetworkFeatures(lambda params, x: model.apply(params, _floats(x)), params, BATCH)


def judge_classes(
    made: np.ndarray,
    asked: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
) -> dict[str, float]:
    """How well made images show their classes. All images are uint8 ``[., h, w, 3]`` of one size.

    Args:
        made, asked: generated images, and the class that was asked for each.
        images, labels: real images for the classifier, that the generator never saw, two at least.
        others: other real images, as many as ``made``, to compare its distance with.

    Returns:
        ``recognised``: the fraction of ``made`` taken for the class asked for; ``frechet``: the
        distance of ``made`` to ``images`` in the classifier's features, which have a variance of 1 on
        average over real images; ``frechet_real``: that of ``others``;
        ``classifier``: the fraction of the real images kept from it that it gets right.

    Raises:
        ValueError: where sizes differ, or the classifier is wrong so often that it cannot judge.
    """
    if not made.shape[1:] == images.shape[1:] == others.shape[1:]:
        raise ValueError(
            f"made images are {made.shape[1:]}, real ones {images.shape[1:]} and {others.shape[1:]}: "
            "make them of one size (sampling.height, width; data.transform.crop)."
        )
    classes = int(max(labels.max(), asked.max())) + 1
    held = np.arange(len(images)) % HELD == HELD - 1
    params = train_classifier(images[~held], labels[~held], classes)
    see = seen_by(params, classes)
    real_logits, real_features = see(images)
    correct = float((real_logits.argmax(-1) == labels)[held].mean())
    if correct < LEAST_CORRECT:
        raise ValueError(
            f"the classifier gets {correct:.1%} of the real images kept from it right, too few to "
            "judge others: give it more images (ClassEvaluator.split), or leave it out."
        )
    logits, features = see(made)
    _, other_features = see(others)
    scale = np.sqrt(real_features.astype(np.float64).var(0).mean())
    real = feature_statistics(real_features / scale)
    return {
        "recognised": float((logits.argmax(-1) == asked).mean()),
        "frechet": frechet_distance(feature_statistics(features / scale), real),
        "frechet_real": frechet_distance(feature_statistics(other_features / scale), real),
        "classifier": correct,
        "count": len(made),
    }
