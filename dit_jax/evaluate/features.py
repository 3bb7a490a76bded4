"""Feature functions: images in, features out, run over all local devices.

A *feature function* takes uint8 images ``[n, h, w, 3]`` (or clips ``[n, t, h, w, 3]``), any n, and
gives features ``[n, f]``, or a NamedTuple or dict of several kinds. Whatever does that can stand in
for the networks here: a classifier of digits, for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.types import Params

FeatureFunction = Callable[[np.ndarray], Any]

BATCH = 64


class NetworkFeatures:
    """A network over this process's devices, in batches of one size: it compiles once for a shape."""

    def __init__(
        self,
        apply: Callable[[Params, jax.Array], Any],
        params: Params,
        batch: int = BATCH,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        devices = jax.local_devices() if devices is None else devices
        mesh = Mesh(np.array(devices), ("images",))
        self.batch = -(-batch // len(devices)) * len(devices)
        """Images in a step, a multiple of the devices."""
        self._rows = NamedSharding(mesh, PartitionSpec("images"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._apply = jax.jit(apply)

    def __call__(self, images: np.ndarray) -> Any:
        """Features of uint8 images, as NumPy arrays with an entry for each image."""
        if images.dtype != np.uint8:
            raise ValueError(f"images have dtype {images.dtype}: give uint8 in 0..255.")
        parts = []
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            missing = self.batch - len(part)
            full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            features = self._apply(self._params, jax.device_put(full, self._rows))
            parts.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *parts)


def named_features(features: Any, name: str) -> Mapping[str, np.ndarray]:
    """What a feature function gave, by name; a single array is called ``name``."""
    if isinstance(features, Mapping):
        return features
    if hasattr(features, "_asdict"):
        return features._asdict()
    return {name: np.asarray(features)}
