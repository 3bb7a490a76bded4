"""Clips that tests make."""

import numpy as np


def moving(count, height=96, width=128, seed=0, speed=2):
    """A clip uint8 [t, h, w, 3]: smooth random colours that move, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 12 + 2, (width + speed * count) // 12 + 2, 3))
    fine = np.kron(coarse, np.ones((12, 12, 1)))
    frames = [fine[:height, speed * i : speed * i + width] for i in range(count)]
    return (
        np.stack([f + rng.integers(-6, 7, f.shape) for f in frames]).clip(0, 255).astype(np.uint8)
    )
