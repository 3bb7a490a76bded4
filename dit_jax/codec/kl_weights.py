"""Diffusers' folder of ``AutoencoderKL`` (``sd-vae-ft-ema``, ``-mse``): its keys, both ways.

The attention layer has two sets of names: ``to_q`` and its kin, and in files from before Diffusers
0.16, as the published ones are, ``query``, ``key``, ``value`` and ``proj_attn``, whose weights may be
1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dit_jax.codec.autoencoder_kl import AutoencoderKLConfig
from dit_jax.interop.folders import check_sizes
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map

CLASS = "AutoencoderKL"
CONV = "o i h w -> h w i o"
LINEAR = "o i -> i o"
VECTOR = "o -> o"
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""What a ``config.json`` means by leaving a setting out."""
SIZES = ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups")
FLAGS = ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")


def autoencoder_from_diffusers(config: dict[str, Any], where: str) -> AutoencoderKLConfig:
    """The autoencoder of a ``config.json``.

    Raises:
        ValueError: where it is another class, or set to what is not built here.
    """
    if config.get("_class_name") != CLASS:
        raise ValueError(f"{where} is of {config.get('_class_name')!r}, not {CLASS!r}.")
    given = DEFAULTS | config
    _check_types(given, where)
    levels = len(given["block_out_channels"])
    wanted = {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "out_channels": given["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    other = [f"{n} is {plain[n]!r}" for n, v in wanted.items() if plain.get(n, v) != v]
    if other:
        raise ValueError(f"{where} is an autoencoder that is not built here: {'; '.join(other)}.")
    return AutoencoderKLConfig(
        channels=given["in_channels"],
        latent_channels=given["latent_channels"],
        widths=tuple(given["block_out_channels"]),
        layers=given["layers_per_block"],
        norm_groups=given["norm_num_groups"],
        mid_attention=given["mid_block_add_attention"],
        quant_conv=given["use_quant_conv"],
        post_quant_conv=given["use_post_quant_conv"],
        scale=given["scaling_factor"],
        shift=given["shift_factor"] or 0.0,
    )


def _check_types(given: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` where settings are not of the types that they have in Diffusers."""
    check_sizes({name: given[name] for name in SIZES}, where)
    widths = given["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths:
        raise ValueError(
            f"{where} has block_out_channels {widths!r}: these are a list of at least one, such as "
            "[128, 256]."
        )
    check_sizes({f"block_out_channels[{i}]": w for i, w in enumerate(widths)}, where)
    for name in ("scaling_factor", "shift_factor"):
        optional = name == "shift_factor" and given[name] is None
        if not optional and type(given[name]) not in (int, float):
            raise ValueError(f"{where} has {name} {given[name]!r}: it is a number.")
    for name in FLAGS:
        if type(given[name]) is not bool:
            raise ValueError(f"{where} has {name} {given[name]!r}: it is true or false.")


class _Table:
    """Collects entries: our path and their key of every layer, a kernel and a bias each."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, path: str, key: str, pattern: str, squeezed: bool = False, **sizes: int) -> None:
        """One array."""
        layout = Layout(pattern, sizes)
        self.entries.append(Entry(tuple(path.split("/")), (key,), layout, squeezed=squeezed))

    def conv(self, path: str, key: str, i: int, o: int, size: int = 3) -> None:
        self.add(f"{path}/kernel", f"{key}.weight", CONV, o=o, i=i, h=size, w=size)
        self.add(f"{path}/bias", f"{key}.bias", VECTOR, o=o)

    def norm(self, path: str, key: str, width: int) -> None:
        self.add(f"{path}/scale", f"{key}.weight", VECTOR, o=width)
        self.add(f"{path}/bias", f"{key}.bias", VECTOR, o=width)

    def resnet(self, path: str, key: str, i: int, o: int) -> None:
        self.norm(f"{path}/norm1", f"{key}.norm1", i)
        self.conv(f"{path}/conv1", f"{key}.conv1", i, o)
        self.norm(f"{path}/norm2", f"{key}.norm2", o)
        self.conv(f"{path}/conv2", f"{key}.conv2", o, o)
        if i != o:
            self.conv(f"{path}/shortcut", f"{key}.conv_shortcut", i, o, 1)

    def middle(self, path: str, key: str, width: int, attention: bool) -> None:
        for j in range(2):
            self.resnet(f"{path}/resnet_{j}", f"{key}.resnets.{j}", width, width)
        if attention:
            attn = f"{key}.attentions.0"
            self.norm(f"{path}/attention/norm", f"{attn}.group_norm", width)
            for ours, name in ATTENTION.items():
                here = f"{path}/attention/{ours}"
                self.add(f"{here}/kernel", f"{attn}.{name}.weight", LINEAR, True, o=width, i=width)
                self.add(f"{here}/bias", f"{attn}.{name}.bias", VECTOR, o=width)


def _aliases(half: str) -> Iterator[tuple[str, str]]:
    attn = f"{half}.mid_block.attentions.0"
    for ours, old in OLD_ATTENTION.items():
        for kind in ("weight", "bias"):
            yield f"{attn}.{old}.{kind}", f"{attn}.{ATTENTION[ours]}.{kind}"


def autoencoder_map(config: AutoencoderKLConfig, old_names: bool = False) -> Map:
    """The keys of the folder's weights; written by the old names of attention if asked for."""
    table = _Table()
    widths, z = config.widths, config.latent_channels
    table.conv("encoder/conv_in", "encoder.conv_in", config.channels, widths[0])
    width = widths[0]
    for i, o in enumerate(widths):
        for j in range(config.layers):
            key = f"encoder.down_blocks.{i}.resnets.{j}"
            table.resnet(f"encoder/level_{i}_resnet_{j}", key, width, o)
            width = o
        if i < len(widths) - 1:
            key = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            table.conv(f"encoder/level_{i}_down", key, o, o)
    table.middle("encoder/mid", "encoder.mid_block", width, config.mid_attention)
    table.norm("encoder/norm_out", "encoder.conv_norm_out", width)
    table.conv("encoder/conv_out", "encoder.conv_out", width, 2 * z)
    if config.quant_conv:
        table.conv("encoder/quant", "quant_conv", 2 * z, 2 * z, 1)
    if config.post_quant_conv:
        table.conv("decoder/post_quant", "post_quant_conv", z, z, 1)
    table.conv("decoder/conv_in", "decoder.conv_in", z, width)
    table.middle("decoder/mid", "decoder.mid_block", width, config.mid_attention)
    for i, o in enumerate(reversed(widths)):
        for j in range(config.layers + 1):
            key = f"decoder.up_blocks.{i}.resnets.{j}"
            table.resnet(f"decoder/level_{i}_resnet_{j}", key, width, o)
            width = o
        if i < len(widths) - 1:
            table.conv(f"decoder/level_{i}_up", f"decoder.up_blocks.{i}.upsamplers.0.conv", o, o)
    table.norm("decoder/norm_out", "decoder.conv_norm_out", width)
    table.conv("decoder/conv_out", "decoder.conv_out", width, config.channels)
    aliases = dict(pair for half in ("encoder", "decoder") for pair in _aliases(half))
    written = {new: old for old, new in aliases.items()} if old_names else {}
    return Map(f"an {CLASS} of its config.json", tuple(table.entries), (), aliases, written)
