"""Diffusers' folder of ``AutoencoderKLWan`` (Wan 2.1, and 2.2 with shortcuts): its keys, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_jax.codec.causal_autoencoder import WAN, CausalAutoencoderConfig
from dit_jax.interop.folders import check_sizes
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map

WAN_CLASS = "AutoencoderKLWan"
CONV = "o i t h w -> t h w i o"
FLAT = "o i (t h) w -> t h w i o"
"""Of a convolution of frames."""
VECTOR = "o -> o"
GAMMA = "o (t h w) x y -> (o t h w x y)"

DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),
    "dropout": 0.0,
    "latents_mean": WAN.shift,
    "latents_std": tuple(1 / scale for scale in WAN.scale),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
}
"""What a ``config.json`` means by leaving a setting out."""
SIZES = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels")
LISTS = ("dim_mult", "temperal_downsample", "latents_mean", "latents_std", "attn_scales")


def autoencoder_from_wan(config: Mapping[str, Any], where: str) -> CausalAutoencoderConfig:
    """The autoencoder of a ``config.json``.

    Raises:
        ValueError: where it is another class, or set to what is not built here.
    """
    if config.get("_class_name") != WAN_CLASS:
        raise ValueError(f"{where} is of {config.get('_class_name')!r}, not {WAN_CLASS!r}.")
    given = DEFAULTS | dict(config)
    check_sizes({name: given[name] for name in SIZES}, where)
    odd = [name for name in LISTS if not isinstance(given[name], list | tuple)]
    if odd:
        raise ValueError(f"{where} has {odd[0]} {given[odd[0]]!r}: it is a list.")
    mult, halved, patch = given["dim_mult"], given["temperal_downsample"], given["patch_size"] or 1
    check_sizes({f"dim_mult[{i}]": m for i, m in enumerate(mult)}, where)
    check_sizes({"patch_size": patch}, where)
    of_decoder = given["decoder_base_dim"] or given["base_dim"]
    check_sizes({"decoder_base_dim": of_decoder}, where)
    other = [f"attn_scales is {list(given['attn_scales'])!r}"] * bool(given["attn_scales"])
    if given["out_channels"] != given["in_channels"] or given["in_channels"] % patch**2:
        other.append(
            f"in_channels is {given['in_channels']}, out_channels {given['out_channels']}, "
            f"patch_size {patch}"
        )
    if not mult or mult[0] != 1 or len(halved) != len(mult) - 1:
        other.append(f"dim_mult is {list(mult)!r} with temperal_downsample {list(halved)!r}")
    if other:
        raise ValueError(f"{where} is an autoencoder that is not built here: {'; '.join(other)}.")
    widths, of_decoder = (tuple(base * m for m in mult) for base in (given["base_dim"], of_decoder))
    try:
        return CausalAutoencoderConfig(
            channels=given["in_channels"] // patch**2,
            latent_channels=given["z_dim"],
            widths=widths,
            strides=tuple((2 if half else 1, 2) for half in halved),
            layers=given["num_res_blocks"],
            decoder_widths=() if of_decoder == widths else of_decoder,
            patch=patch,
            shortcuts=bool(given["is_residual"]),
            shift=tuple(map(float, given["latents_mean"])),
            scale=tuple(1 / float(std) for std in given["latents_std"]),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where} is no {WAN_CLASS} that can be: {error}") from error


def autoencoder_to_wan(config: CausalAutoencoderConfig) -> dict[str, Any]:
    """The ``config.json`` of an autoencoder.

    Raises:
        ValueError: where the class has none like it.
    """
    widths, decoder = config.widths, config.decoder_widths or config.widths
    wrong = [
        name
        for name, is_so in (
            ("mid_attention", not config.mid_attention),
            ("variational", not config.variational),
            ("linear", config.linear),
            ("strides", any(space != 2 for _, space in config.strides)),
            ("strides", config.stride[0] != 4),
            ("widths", any(w % widths[0] for w in widths)),
            (
                "decoder_widths",
                [w * widths[0] for w in decoder] != [w * decoder[0] for w in widths],
            ),
        )
        if is_so
    ]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the autoencoder has {name} {getattr(config, name)}, for which {WAN_CLASS} has no "
            "setting: keep it in the folder that the run wrote."
        )
    z, p = config.latent_channels, config.patch
    return {
        "_class_name": WAN_CLASS,
        "_diffusers_version": "0.36.0",
        "attn_scales": [],
        "base_dim": widths[0],
        "decoder_base_dim": decoder[0] if config.decoder_widths else None,
        "dim_mult": [w // widths[0] for w in widths],
        "dropout": 0.0,
        "in_channels": config.channels * p * p,
        "is_residual": config.shortcuts,
        "latents_mean": list(config.shift or (0.0,) * z),
        "latents_std": [1 / scale for scale in config.scale or (1.0,) * z],
        "num_res_blocks": config.layers,
        "out_channels": config.channels * p * p,
        "patch_size": p if p > 1 else None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": [time == 2 for time, _ in config.strides],
        "z_dim": z,
    }


class _Table:
    """Collects entries: our path and their key of every layer."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, path: str, key: str, pattern: str, **sizes: int) -> None:
        self.entries.append(Entry(tuple(path.split("/")), (key,), Layout(pattern, sizes)))

    def conv(
        self, path: str, key: str, i: int, o: int, size: tuple[int, int, int] = (3, 3, 3)
    ) -> None:
        """A convolution; of frames, whose kernel has no axis of time, where its size has 0 there."""
        t, h, w = size
        pattern = CONV if t else FLAT
        self.add(f"{path}/kernel", f"{key}.weight", pattern, o=o, i=i, t=t or 1, h=h, w=w)
        self.add(f"{path}/bias", f"{key}.bias", VECTOR, o=o)

    def norm(self, path: str, key: str, width: int, axes: int = 3) -> None:
        pattern = GAMMA if axes == 3 else "o x y -> (o x y)"
        sizes = {"t": 1, "h": 1, "w": 1} if axes == 3 else {}
        self.add(f"{path}/scale", f"{key}.gamma", pattern, o=width, x=1, y=1, **sizes)

    def resnet(self, path: str, key: str, i: int, o: int) -> None:
        self.norm(f"{path}/norm1", f"{key}.norm1", i)
        self.conv(f"{path}/conv1", f"{key}.conv1", i, o)
        self.norm(f"{path}/norm2", f"{key}.norm2", o)
        self.conv(f"{path}/conv2", f"{key}.conv2", o, o)
        if i != o:
            self.conv(f"{path}/shortcut", f"{key}.conv_shortcut", i, o, (1, 1, 1))

    def middle(self, path: str, key: str, width: int) -> None:
        self.resnet(f"{path}/resnet_0", f"{key}.resnets.0", width, width)
        here, attn = f"{path}/attention", f"{key}.attentions.0"
        self.norm(f"{here}/norm", f"{attn}.norm", width, 2)
        self.conv(f"{here}/qkv", f"{attn}.to_qkv", width, 3 * width, (0, 1, 1))
        self.conv(f"{here}/out", f"{attn}.proj", width, width, (0, 1, 1))
        self.resnet(f"{path}/resnet_1", f"{key}.resnets.1", width, width)

    def resample(self, path: str, key: str, i: int, o: int, time: int) -> None:
        self.conv(f"{path}/space", f"{key}.resample.1", i, o, (0, 3, 3))
        if time:
            self.conv(f"{path}/time", f"{key}.time_conv", i, time, (3, 1, 1))


def wan_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of the folder's weights."""
    table = _Table()
    z, pixels = config.latent_channels, config.channels * config.patch**2
    _encoder(table, config, pixels)
    table.conv("encoder/quant", "quant_conv", 2 * z, 2 * z, (1, 1, 1))
    table.conv("decoder/body/post_quant", "post_quant_conv", z, z, (1, 1, 1))
    _decoder(table, config, pixels)
    return Map(f"an {WAN_CLASS} of its config.json", tuple(table.entries))


def _encoder(table: _Table, config: CausalAutoencoderConfig, pixels: int) -> None:
    width = config.widths[0]
    table.conv("encoder/conv_in", "encoder.conv_in", pixels, width)
    number = 0
    for i, o in enumerate(config.widths):
        block = f"encoder.down_blocks.{i}"
        for j in range(config.layers):
            key = f"{block}.resnets.{j}" if config.shortcuts else f"encoder.down_blocks.{number}"
            table.resnet(f"encoder/level_{i}_resnet_{j}", key, width, o)
            width, number = o, number + 1
        if i < len(config.strides):
            key = f"{block}.downsampler" if config.shortcuts else f"encoder.down_blocks.{number}"
            time = o if config.strides[i][0] == 2 else 0
            table.resample(f"encoder/level_{i}_down", key, o, o, time)
            number += 1
    table.middle("encoder/mid", "encoder.mid_block", width)
    table.norm("encoder/norm_out", "encoder.norm_out", width)
    table.conv("encoder/conv_out", "encoder.conv_out", width, 2 * config.latent_channels)


def _decoder(table: _Table, config: CausalAutoencoderConfig, pixels: int) -> None:
    widths = (config.decoder_widths or config.widths)[::-1]
    width = widths[0]
    table.conv("decoder/body/conv_in", "decoder.conv_in", config.latent_channels, width)
    table.middle("decoder/body/mid", "decoder.mid_block", width)
    for i, o in enumerate(widths):
        block = f"decoder.up_blocks.{i}"
        for j in range(config.layers + 1):
            table.resnet(f"decoder/body/level_{i}_resnet_{j}", f"{block}.resnets.{j}", width, o)
            width = o
        if i < len(config.strides):
            key = f"{block}.upsampler" if config.shortcuts else f"{block}.upsamplers.0"
            time = 2 * o if config.strides[-1 - i][0] == 2 else 0
            width = o if config.shortcuts else o // 2
            table.resample(f"decoder/body/level_{i}_up", key, o, width, time)
    table.norm("decoder/body/norm_out", "decoder.norm_out", width)
    table.conv("decoder/conv_out", "decoder.conv_out", width, pixels)
