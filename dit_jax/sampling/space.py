"""Which frames of a clip share a token, and clips as the latents that are given of them.

With ``s`` frames to a token (the codec's stride in time by the patch's), token 0 holds frame 0, and
token ``j`` frames ``s (j - 1) + 1`` to ``s j``. A clip that begins elsewhere than at a frame 0 can
therefore not be cut out of the tokens of another: a tail is encoded as a clip of its own, and so is a
head that comes to stand at the end of a new clip, whose own frame 0 is then left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dit_jax.codec.codec import Codec
from dit_jax.model import PatchConfig
from dit_jax.sampling.media import to_float


def filled(clip: np.ndarray, stride: int) -> np.ndarray:
    """A clip ``[t, ...]`` whose last frame stands still until its token has ``stride`` frames."""
    return np.concatenate([clip, np.repeat(clip[-1:], (1 - len(clip)) % stride, 0)])


@dataclasses.dataclass(frozen=True)
class Space:
    """Between the pixels of clips and what a model makes."""

    codec: Codec
    """``PixelCodec()`` for a model of pixels."""
    patch: PatchConfig

    @property
    def stride(self) -> int:
        """Frames of a token, but for the first, which holds one."""
        return self.codec.strides[0] * self.patch.t

    @property
    def multiple(self) -> tuple[int, int]:
        """Heights and widths in pixels are multiples of these."""
        _, h, w = self.codec.strides
        return h * self.patch.h, w * self.patch.w

    def frames(self, latents: int) -> int:
        """Frames of so many latent frames, the first of which holds one."""
        return 1 + (latents - 1) * self.codec.strides[0]

    def latents(self, frames: int) -> int:
        """Latent frames of ``1 + n stride`` frames.

        Raises:
            ValueError: for another number, with the nearest.
        """
        if frames < 1 or (frames - 1) % self.stride:
            low = 1 + max(frames - 1, 0) // self.stride * self.stride
            raise ValueError(
                f"{frames} frames: the first has a token of its own and the others share one by "
                f"{self.stride}, so give 1 + {self.stride}n. The nearest are {low} and "
                f"{low + self.stride}."
            )
        return 1 + (frames - 1) // self.codec.strides[0]

    def whole(self, seconds: float, fps: float) -> int:
        """Frames ``1 + n stride`` that last about so long."""
        return 1 + round(max(seconds * fps - 1, 0) / self.stride) * self.stride

    def new(self, seconds: float, fps: float) -> int:
        """Frames ``n stride`` (at least one token) that last about so long: what is added to a clip."""
        return max(round(seconds * fps / self.stride), 1) * self.stride

    def gap(self, seconds: float, fps: float) -> int:
        """Frames ``n stride - 1`` (at least 1) that last about so long: what lies between two clips."""
        least = 2 if self.stride == 1 else 1
        return max(round((seconds * fps + 1) / self.stride), least) * self.stride - 1

    def encode(self, clip: np.ndarray) -> np.ndarray:
        """Latents float32 of uint8 ``[t, h, w, 3]``."""
        return np.asarray(self.codec.encode(to_float(clip)), np.float32)

    def still(self, image: np.ndarray) -> np.ndarray:
        """The latents of one token that shows an image ``[h, w, 3]`` and is not a clip's first."""
        return self.encode(np.repeat(image[None], 1 + self.stride, 0))[-self.patch.t :]

    def stands_still(self, head: np.ndarray) -> bool:
        """Whether a head is a single frame that fills a token at the end of another clip."""
        return len(head) == 1 and self.codec.strides[0] > 1

    def at_end(self, head: np.ndarray) -> np.ndarray:
        """The latents that hold a head of ``1 + n stride`` frames at the end of another clip.

        Of a causal codec those behind its first, for that is a first frame's and no other's: frame 0 is
        then held by none. A single frame stands still, as in ``still``.
        """
        if self.stands_still(head):
            return self.still(head[0])
        latents = self.encode(head)
        return latents[1:] if self.codec.strides[0] > 1 else latents
