"""What a run may measure of its generated clips (``Run.evaluators``), if its data knows the truth.

Classes of images that no published network knows are judged by a small classifier, trained on the spot
on images that the generator never saw: how many generated images it takes for the class that was asked
for, and the Fréchet distance of its features of them to those of real images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dit_jax.data import RecordsConfig, RecordsSource, ShapesConfig, crop, held_out_scenes
from dit_jax.evaluate.distances import feature_statistics, frechet_distance
from dit_jax.evaluate.judge import prompt_following
from dit_jax.evaluate.networks import NetworkFeatures
from dit_jax.files import refuse_if
from dit_jax.sampling import Request
from dit_jax.sampling.media import mean_psnr
from dit_jax.training import ClipsEvaluator
from dit_jax.types import Params

EPOCHS, BATCH, LEARNING_RATE = 8, 64, 2e-3
SHIFT = 2  # Pixels by which training images are moved at most, in both directions.
HELD_OUT = 5  # Every fifth image is kept from the classifier, to measure it.
MIN_CORRECT = 0.5  # A classifier that is right less often cannot judge.

Measure = Callable[[Sequence[np.ndarray]], Mapping[str, float]]


def _shown(config: Any) -> Any:
    """The config of the source that pictures and reports are about: of a mixture, one of its sets."""
    return getattr(config.data.source, "shown_set", config.data.source)


@dataclasses.dataclass(frozen=True)
class ShapeEvaluator(ClipsEvaluator):
    """The share of clips of moving shapes that show what their prompts say (``judge``)."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        other = not isinstance(_shown(config), ShapesConfig)
        refuse_if([(other, "evaluators has a ShapeEvaluator, and the data are no moving shapes.")])
        size = config.sampling.frames, config.sampling.height, config.sampling.width
        scenes = held_out_scenes(len(requests), config.seed, *size)  # Those of the requests.
        return lambda clips: prompt_following(clips, scenes)


@dataclasses.dataclass(frozen=True)
class RecordsEvaluator(ClipsEvaluator):
    """PSNR to the recorded clips of ``data.eval_split`` whose captions are the prompts."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        split = config.data.eval_split
        absent = isinstance(_shown(config), RecordsConfig) and split is None
        message = "evaluators has a RecordsEvaluator, which compares with pixels"
        faults = (
            (absent, f"{message}: give data.eval_split, its clips."),
            (len(true) < len(requests), f"{message}: data.eval_split {split!r} has latents."),
        )
        refuse_if(faults)
        return lambda clips: {"psnr": mean_psnr(clips, true), "count": len(clips)}


@dataclasses.dataclass(frozen=True)
class ClassEvaluator(ClipsEvaluator):
    """How many images a small classifier takes for the class that was asked for, and the distance of
    its features of them to those of real images (``judge_classes``)."""

    split: str = "test"
    """Of the records, what the classifier is trained on; a fifth of it measures the classifier."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        source, size = _shown(config), (1, config.sampling.height, config.sampling.width, 3)
        labelled = isinstance(source, RecordsConfig) and source.label_key is not None
        message = "evaluators has a ClassEvaluator: give data.source.label_key."
        refuse_if([(not labelled, message)])

        def images(split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
            """Pictures and labels, transformed as in training; evenly spaced if limited."""
            records = RecordsSource(dataclasses.replace(source, split=split))
            count = len(records) if limit is None else min(limit, len(records))
            samples = [records[i * len(records) // count] for i in range(count)]
            labels = np.array([s.get("segment_fields", {}).get("label", 0) for s in samples])
            videos = [crop(config.data.transform, s["video"]) for s in samples]
            return np.concatenate(videos), labels

        for split in (self.split, source.split):
            shape = images(split, 1)[0].shape
            message = (
                f"evaluators' ClassEvaluator: generated images are {size}, and those of split "
                f"{split!r} {shape}. Give pixels of one size (sampling.height, width, frames; "
                "data.transform.crop), or leave it out."
            )
            refuse_if([(shape != size or config.sampling.frames != 1, message)])
        labels = np.array([request.segment_fields["label"] for request in requests])

        def measure(clips: Sequence[np.ndarray]) -> Mapping[str, float]:
            real, _ = images(source.split, len(clips))
            return judge_classes(np.concatenate(clips), labels, *images(self.split), real)

        return measure


class Classifier(nn.Module):
    """uint8 images ``[n, h, w, 3]`` to logits ``[n, classes]`` and features ``[n, 64]``."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32) / 127.5 - 1
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), use_bias=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(features), features


def _train(model: Classifier, images: np.ndarray, labels: np.ndarray) -> Params:
    """Parameters of a classifier that has learned uint8 images ``[n, h, w, 3]``, moved a little."""
    rng, batch, (n, h, w, _) = np.random.default_rng(0), min(BATCH, len(images)), images.shape
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * (n // batch)))

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply(params, x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Params, state: Any, x: jax.Array, y: jax.Array) -> tuple[Params, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = optimizer.init(params)
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    for _ in range(EPOCHS):
        order = rng.permutation(n)
        for first in range(0, n - batch + 1, batch):
            chosen = order[first : first + batch]
            places = zip(chosen, rng.integers(0, 2 * SHIFT + 1, (batch, 2)), strict=True)
            x = np.stack([padded[k, i : i + h, j : j + w] for k, (i, j) in places])
            params, state = step(params, state, x, labels[chosen])
    return params


def judge_classes(
    out: np.ndarray, asked: np.ndarray, images: np.ndarray, labels: np.ndarray, others: np.ndarray
) -> dict[str, float]:
    """How well generated images show their classes. All images are uint8 ``[., h, w, 3]`` of one size.

    Args:
        out, asked: generated images, and the class that was asked for each.
        images, labels: real images for the classifier, that the generator never saw, two at least.
        others: other real images, as many as ``out``, to compare its distance with.

    Returns:
        ``recognised``: the fraction of ``out`` taken for the class asked for; ``frechet``: the distance
        of ``out`` to ``images`` in the classifier's features, which are of variance 1 on average over
        ``images``; ``frechet_real``: that of ``others``; ``classifier``: the fraction of the images
        kept from it that it gets right.
    """
    model = Classifier(int(max(labels.max(), asked.max())) + 1)
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    params = _train(model, images[~held_out], labels[~held_out])
    classify = NetworkFeatures(model.apply, params, BATCH)
    real_logits, real = classify(images)
    correct = float((real_logits.argmax(-1) == labels)[held_out].mean())
    message = (
        f"the classifier gets {correct:.1%} of the real images kept from it right, too few to judge "
        "others: give it more images (ClassEvaluator.split), or leave it out."
    )
    refuse_if([(correct < MIN_CORRECT, message)])
    logits, features = classify(out)
    scale = np.sqrt(real.astype(np.float64).var(0).mean())
    kinds = real, features, classify(others)[1]
    true, ours, theirs = (feature_statistics(x / scale) for x in kinds)
    return {
        "recognised": float((logits.argmax(-1) == asked).mean()),
        "frechet": frechet_distance(ours, true),
        "frechet_real": frechet_distance(theirs, true),
        "classifier": correct,
        "count": len(out),
    }
