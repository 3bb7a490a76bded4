"""Clips that tests make, and what files show."""

import numpy as np

from dit_jax.prepare.media import DecodingLog, pictures, sampled


def moving(count, height=96, width=128, seed=0, speed=2):
    """A clip uint8 [t, h, w, 3]: smooth random colours that move, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 12 + 2, (width + speed * count) // 12 + 2, 3))
    fine = np.kron(coarse, np.ones((12, 12, 1)))
    frames = [fine[:height, speed * i : speed * i + width] for i in range(count)]
    noisy = np.stack([f + rng.integers(-6, 7, f.shape) for f in frames])
    return noisy.clip(0, 255).astype(np.uint8)


def probe(path, config=None):
    """What a file is."""
    log = DecodingLog()
    next(pictures(path, config, log))
    return log.probe


def displayed(path, config=None):
    """The seconds and pixels of a file's displayed frames."""
    return [(picture.time, picture.pixels()) for _, picture in sampled(path, config=config)]


def cropped(frames, crop):
    """The part of frames that a clip shows."""
    rows, columns = (
        slice(crop.top, crop.top + crop.height),
        slice(crop.left, crop.left + crop.width),
    )
    return np.stack(list(frames))[:, rows, columns]
