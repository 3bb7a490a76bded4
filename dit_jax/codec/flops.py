"""How many floating-point operations the causal autoencoder takes, counted from its shapes.

A multiplication and an addition count as two; norms and activations are left out.
"""

from __future__ import annotations

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig

Size = tuple[int, int, int]


def autoencoder_flops(
    config: CausalAutoencoderConfig, frames: int, height: int, width: int
) -> tuple[float, float]:
    """Of encoding a clip of so many frames of pixels, and of decoding what it is encoded to."""
    sizes: list[Size] = [(frames, height // config.patch, width // config.patch)]
    for time, space in config.strides:
        t, h, w = sizes[-1]
        sizes.append((1 + (t - 1) // time, h // space, w // space))
    linear = config.linear * _linear(config, sizes[-1])
    return _encode(config, sizes) + linear, _decode(config, sizes) + linear


def _linear(config: CausalAutoencoderConfig, size: Size) -> float:
    (time, rows, columns), (t, h, w) = config.stride, size
    frames = 1 + (t - 1) * time
    return _conv((frames, h, w), rows * columns * config.channels, config.latent_channels, 1)


def _conv(size: Size, i: int, o: int, taps: int) -> float:
    return 2.0 * size[0] * size[1] * size[2] * i * o * taps


def _resnet(size: Size, i: int, o: int) -> float:
    return _conv(size, i, o, 27) + _conv(size, o, o, 27) + (i != o) * _conv(size, i, o, 1)


def _middle(config: CausalAutoencoderConfig, size: Size, c: int) -> float:
    t, h, w = size
    attention = 4 * _conv(size, c, c, 1) + 4.0 * c * (h * w) ** 2 * t
    return 2 * _resnet(size, c, c) + config.mid_attention * attention


def _encode(config: CausalAutoencoderConfig, sizes: list[Size]) -> float:
    pixels, before = config.channels * config.patch**2, config.widths[0]
    total = _conv(sizes[0], pixels, before, 27)
    for i, width in enumerate(config.widths):
        for _ in range(config.layers):
            total += _resnet(sizes[i], before, width)
            before = width
        if i < len(config.strides):
            (time, space), (t, h, w) = config.strides[i], sizes[i + 1]
            total += (space == 2) * _conv((sizes[i][0], h, w), width, width, 9)
            total += (time == 2) * _conv((t - 1, h, w), width, width, 3)
    moments = config.latent_channels * (2 if config.variational else 1)
    ends = _conv(sizes[-1], before, moments, 27) + _conv(sizes[-1], moments, moments, 1)
    return total + _middle(config, sizes[-1], before) + ends


def _decode(config: CausalAutoencoderConfig, sizes: list[Size]) -> float:
    widths = (config.decoder_widths or config.widths)[::-1]
    pixels, z, before = config.channels * config.patch**2, config.latent_channels, widths[0]
    total = _conv(sizes[-1], z, z, 1) + _conv(sizes[-1], z, before, 27)
    total += _middle(config, sizes[-1], before)
    for i, width in enumerate(widths):
        size = sizes[-1 - i]
        for _ in range(config.layers + 1):
            total += _resnet(size, before, width)
            before = width
        if i < len(config.strides):
            (time, _), (t, h, w) = config.strides[-1 - i], size
            total += (time == 2) * _conv((t - 1, h, w), width, 2 * width, 3)
            before = width if config.shortcuts else width // 2
            total += _conv(sizes[-2 - i], width, before, 9)
    return total + _conv(sizes[0], before, pixels, 27)
