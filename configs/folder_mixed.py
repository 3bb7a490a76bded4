"""Images with captions and clips without, mixed: looks come from the ones, motion from the others.

    python -m dit_jax.prepare --input images --output data --name images \\
        --examine.clips.area 1024 --examine.clips.multiple 8
    python -m dit_jax.prepare --input videos --output data --name motion --examine.clips.fps 8 \\
        --examine.clips.max-seconds 2 --examine.clips.area 1024 --examine.clips.multiple 8
    python -m dit_jax.train --config configs/folder_mixed.py --data.source.sets.0.weight 2

Two of three samples are then images. A set is any builder that ``data.source`` takes, and
``captioned=False`` leaves out what it says of text.

Not measured: no number is made of its clips.
"""

import dataclasses

from folder import get_config as of_folder

from dit_jax.config import VideoRun
from dit_jax.data import MixedSetConfig, MixtureConfig


def get_config() -> VideoRun:
    config = of_folder()
    source = MixtureConfig(
        (
            MixedSetConfig("data/images/1.0.0"),
            MixedSetConfig("data/motion/1.0.0", captioned=False),
        )
    )
    data = dataclasses.replace(config.data, source=source)
    return dataclasses.replace(config, output="runs/folder_mixed", data=data)
