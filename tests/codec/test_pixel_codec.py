"""The identity behind the interface of codecs."""

import numpy as np
import pytest

from dit_jax.codec.codec import PixelCodec


def test_gives_pixels_back():
    codec = PixelCodec()
    clip = np.linspace(-1, 1, 2 * 3 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 3)
    assert codec.encode(clip) is clip and codec.decode(clip) is clip
    for video in (clip, np.repeat(clip, 20, 0)):
        parts = list(codec.decode_parts(video))
        assert [len(part) for part in parts] == ([2] if video is clip else [16, 16, 8])
        np.testing.assert_array_equal(np.concatenate(parts), video)
    assert (codec.strides, codec.channels) == ((1, 1, 1), 3)
    with pytest.raises(ValueError, match="give floating point"):
        codec.encode(np.zeros((1, 2, 2, 3), np.uint8))
