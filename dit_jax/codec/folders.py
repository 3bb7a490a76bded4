"""Folders of codecs: Diffusers' ``AutoencoderKL`` (``sd-vae-ft-ema``, ``-mse``) and
``AutoencoderKLWan`` (Wan 2.1, and 2.2 with shortcuts), and our own.

Ours is laid out as Diffusers' are: ``config.json``, with the fields of ``CausalAutoencoderConfig``,
beside safetensors whose keys are the paths of parameters. Tables of Diffusers' keys are made from those
paths by rules, as their modules are ours under other names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dit_jax.codec.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.codec.causal_autoencoder import WAN, CausalAutoencoderConfig, param_shapes
from dit_jax.codec.codec import ImageCodec, TileConfig, VideoCodec
from dit_jax.config import from_dict
from dit_jax.files import checking_input, local_copy, refuse_if
from dit_jax.interop.folders import read_config, read_weights, weights_hash, write_folder
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map
from dit_jax.types import Params, PositiveInt, require

CLASS, KL, WAN_CLASS = "CausalAutoencoder", "AutoencoderKL", "AutoencoderKLWan"
Kind = AutoencoderKLConfig | CausalAutoencoderConfig

# ---------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KLSettings:
    """The settings of ``AutoencoderKL`` that matter, and what leaving one out means."""

    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    block_out_channels: tuple[PositiveInt, ...] = (64,)
    layers_per_block: PositiveInt = 1
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    # Set otherwise, these are of an autoencoder that is not built here.
    act_fn: Literal["silu"] = "silu"
    latents_mean: None = None
    latents_std: None = None
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ()
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ()


@dataclasses.dataclass(frozen=True)
class WanSettings:
    """The same of ``AutoencoderKLWan``."""

    base_dim: PositiveInt = 96
    decoder_base_dim: PositiveInt | None = None
    z_dim: PositiveInt = 16
    dim_mult: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    num_res_blocks: PositiveInt = 2
    attn_scales: tuple[Any, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN.shift
    latents_std: tuple[float, ...] = tuple(1 / scale for scale in WAN.scale)
    is_residual: bool = False
    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    patch_size: PositiveInt | None = None


def _settings(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of the values of a ``config.json``; those that it does not know do not matter."""
    names = {field.name for field in dataclasses.fields(kind)}
    return from_dict(kind, {name: value for name, value in values.items() if name in names})


def autoencoder_from_diffusers(values: Mapping[str, Any]) -> AutoencoderKLConfig:
    """The autoencoder of a ``config.json`` of ``AutoencoderKL``."""
    theirs = _settings(KLSettings, values)
    require("", theirs, ("out_channels", theirs.out_channels == theirs.in_channels, "in_channels"))
    return AutoencoderKLConfig(
        channels=theirs.in_channels,
        latent_channels=theirs.latent_channels,
        widths=theirs.block_out_channels,
        layers=theirs.layers_per_block,
        norm_groups=theirs.norm_num_groups,
        mid_attention=theirs.mid_block_add_attention,
        quant_conv=theirs.use_quant_conv,
        post_quant_conv=theirs.use_post_quant_conv,
        scale=theirs.scaling_factor,
        shift=theirs.shift_factor or 0.0,
    )


def autoencoder_from_wan(values: Mapping[str, Any]) -> CausalAutoencoderConfig:
    """The autoencoder of a ``config.json`` of ``AutoencoderKLWan``."""
    theirs = _settings(WanSettings, values)
    mult, halved, patch = theirs.dim_mult, theirs.temperal_downsample, theirs.patch_size or 1
    require(
        "",
        theirs,
        ("attn_scales", not theirs.attn_scales, "empty"),
        ("in_channels", theirs.in_channels % patch**2 == 0, f"a multiple of {patch} ** 2"),
        ("out_channels", theirs.out_channels == theirs.in_channels, "in_channels"),
        (
            "dim_mult",
            mult[:1] == (1,) and len(mult) == len(halved) + 1,
            "1 and one for each halving",
        ),
        ("latents_std", 0 not in theirs.latents_std, "other than 0"),
    )
    widths = tuple(theirs.base_dim * m for m in mult)
    of_decoder = tuple((theirs.decoder_base_dim or theirs.base_dim) * m for m in mult)
    return CausalAutoencoderConfig(
        channels=theirs.in_channels // patch**2,
        latent_channels=theirs.z_dim,
        widths=widths,
        strides=tuple((2 if half else 1, 2) for half in halved),
        layers=theirs.num_res_blocks,
        decoder_widths=() if of_decoder == widths else of_decoder,
        patch=patch,
        shortcuts=theirs.is_residual,
        shift=tuple(map(float, theirs.latents_mean)),
        scale=tuple(1 / std for std in theirs.latents_std),
    )


def autoencoder_to_wan(config: CausalAutoencoderConfig) -> dict[str, Any]:
    """The ``config.json`` of an autoencoder; ``InputError`` if Diffusers' class has none like it."""
    widths, decoder = config.widths, config.decoder_widths or config.widths
    z, pixels = config.latent_channels, config.channels * config.patch**2
    strides = config.stride[0] == 4 and all(space == 2 for _, space in config.strides)
    alike = [w * widths[0] for w in decoder] == [w * decoder[0] for w in widths]
    require(
        f"{WAN_CLASS} has no setting for the autoencoder, whose ",
        config,
        ("mid_attention", config.mid_attention, "True"),
        ("variational", config.variational, "True"),
        ("linear", not config.linear, "False"),
        ("strides", strides, "4 in time together, and 2 each in space"),
        ("widths", not any(w % widths[0] for w in widths), "multiples of the first"),
        ("decoder_widths", alike, "in the proportions of widths"),
    )
    return {
        "_class_name": WAN_CLASS,
        "_diffusers_version": "0.36.0",
        "attn_scales": [],
        "base_dim": widths[0],
        "decoder_base_dim": decoder[0] if config.decoder_widths else None,
        "dim_mult": [w // widths[0] for w in widths],
        "dropout": 0.0,
        "in_channels": pixels,
        "is_residual": config.shortcuts,
        "latents_mean": list(config.shift or (0.0,) * z),
        "latents_std": [1 / scale for scale in config.scale or (1.0,) * z],
        "num_res_blocks": config.layers,
        "out_channels": pixels,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": [time == 2 for time, _ in config.strides],
        "z_dim": z,
    }


# ---------------------------------------------------------------------------------------------------
# Keys of the weights
# ---------------------------------------------------------------------------------------------------

# Of both classes, as (our path, their key); slashes of paths have become dots.
RULES = (
    (r"^(encoder|decoder)\.(quant|post_quant)\.", r"\2_conv."),
    (r"^encoder\.level_(\d+)_resnet_(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^decoder\.level_(\d+)_resnet_(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"\.mid\.resnet_", ".mid_block.resnets."),
    (r"\.mid\.attention\.", ".mid_block.attentions.0."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.kernel$", ".weight"),
)
KL_RULES = (
    (r"^encoder\.level_(\d+)_down", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"^decoder\.level_(\d+)_up", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"attentions\.0\.norm\.", "attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"attentions\.0\.out\.", "attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.scale$", ".weight"),
)
WAN_RULES = (
    (r"^decoder\.body\.", "decoder."),
    (r"^encoder\.level_(\d+)_down\.", r"encoder.down_blocks.\1.downsampler."),
    (r"^decoder\.level_(\d+)_up\.", r"decoder.up_blocks.\1.upsampler."),
    (r"sampler\.space\.", "sampler.resample.1."),
    (r"sampler\.time\.", "sampler.time_conv."),
    (r"attentions\.0\.qkv\.", "attentions.0.to_qkv."),
    (r"attentions\.0\.out\.", "attentions.0.proj."),
    (r"\.scale$", ".gamma"),
)
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of before Diffusers 0.16, as published files have; their weights may be 1x1 convolutions."""


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


def _table(
    name: str,
    shapes: Params,
    key: Callable[[str], str],
    pattern: Callable[[str, int], str],
    **more: Any,
) -> Map:
    """A table with an entry for every parameter: its key, and its layout by key and number of axes."""
    entries = []
    flat: dict[Any, Any] = traverse_util.flatten_dict(shapes["params"])
    for path, leaf in flat.items():
        theirs = key(".".join(path))
        layout = pattern(theirs, leaf.ndim)
        # Axes that only they have are of size 1.
        letters = layout.split("->")[1].strip().split() if leaf.ndim > 1 else ["o"]
        sizes = dict.fromkeys("thwxyz", 1) | dict(zip(letters, leaf.shape, strict=True))
        squeezed = layout == "o i -> i o"
        entries.append(Entry(path, (theirs,), Layout(layout, sizes), squeezed=squeezed))
    return Map(f"{name} of its config.json", tuple(entries), **more)


def autoencoder_map(config: AutoencoderKLConfig, old_names: bool = False) -> Map:
    """The keys of ``AutoencoderKL``; written by the old names of attention if asked for."""
    image = jnp.zeros((1, *config.stride[1:], config.channels))
    shapes = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)
    aliases = {
        f"{half}.mid_block.attentions.0.{old}.{kind}": f"{half}.mid_block.attentions.0.{new}.{kind}"
        for half in ("encoder", "decoder")
        for new, old in OLD_ATTENTION.items()
        for kind in ("weight", "bias")
    }
    layouts = {1: "o -> o", 2: "o i -> i o", 4: "o i h w -> h w i o"}
    return _table(
        f"an {KL}",
        nn.unbox(shapes),
        lambda path: _renamed(path, RULES + KL_RULES),
        lambda _, ndim: layouts[ndim],
        aliases=aliases,
        written={new: old for old, new in aliases.items()} if old_names else {},
    )


def wan_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of ``AutoencoderKLWan``."""
    blocks = config.layers + 1

    def flat(match: re.Match[str]) -> str:
        """Wan 2.1's encoder numbers blocks and downsamplers in one row."""
        level, kind, block = match.groups()
        at = int(level) * blocks + int(block if kind == "resnets" else config.layers)
        return f"encoder.down_blocks.{at}"

    def key(path: str) -> str:
        name = _renamed(_renamed(path, WAN_RULES[:1] + RULES), WAN_RULES[1:])
        if config.shortcuts:
            return name
        name = name.replace(".upsampler.", ".upsamplers.0.")
        return re.sub(
            r"^encoder\.down_blocks\.(\d+)\.(resnets|downsampler)(?:\.(\d+))?", flat, name
        )

    def pattern(name: str, ndim: int) -> str:
        if name.endswith(".gamma"):
            return "o x y -> (o x y)" if "attentions" in name else "o x y z -> (o x y z)"
        # Kernels of convolutions of frames have no axis of time.
        of_frames = re.search(r"resample|attentions", name)
        return "o -> o" if ndim == 1 else f"o i {'(t h)' if of_frames else 't h'} w -> t h w i o"

    return _table(f"an {WAN_CLASS}", param_shapes(config), key, pattern)


def causal_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of our own folder: every parameter under its path."""

    def pattern(_: str, ndim: int) -> str:
        return "o -> o" if ndim == 1 else "t h w i o -> t h w i o"

    return _table(
        f"the {CLASS}", param_shapes(config), lambda path: path.replace(".", "/"), pattern
    )


# ---------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------


def codec_config(folder: Path) -> tuple[Kind, Map]:
    """The autoencoder that a folder's ``config.json`` describes, and the keys of its weights."""
    values = read_config(folder)
    where, name = repr(str(folder / "config.json")), values.get("_class_name")
    unknown = (
        f"{where} is of {name!r}, which is no codec: give a folder of {KL} or {WAN_CLASS} "
        f"(Diffusers'), or the folder 'codec' of a run that trained one ({CLASS})."
    )
    refuse_if([(name not in (KL, WAN_CLASS, CLASS), unknown)])
    remedy = "restore the file, or use the version that wrote it"
    with checking_input(f"{where} describes no {name} that is built here", remedy):
        if name == KL:
            image = autoencoder_from_diffusers(values)
            return image, autoencoder_map(image)
        if name == WAN_CLASS:
            wan = autoencoder_from_wan(values)
            return wan, wan_map(wan)
        fields = {name: value for name, value in values.items() if not name.startswith("_")}
        ours = from_dict(CausalAutoencoderConfig, fields)
        return ours, causal_map(ours)


def causal_hash(config: CausalAutoencoderConfig, params: Params) -> str:
    """Of the parameters and of what their latents are shifted and scaled by, whichever folder they
    came in."""
    meaning = dataclasses.asdict(dataclasses.replace(config, dtype="auto"))
    for name in ("shift", "scale"):
        # Diffusers' folder has the scale's inverse, whose inverse is off by the last bit.
        meaning[name] = [float(np.float32(value)) for value in meaning[name]]
    text = np.frombuffer(json.dumps(meaning, sort_keys=True).encode(), np.uint8)
    flat: dict[Any, Any] = traverse_util.flatten_dict(params["params"], sep="/")
    return weights_hash({**flat, "config.json": text})


def load_codec(path: str | Path, tiles: TileConfig | None = None) -> ImageCodec | VideoCodec:
    """The codec in a folder (safetensors, ``.bin`` or ``.pt``).

    Its hash is of the arrays by their newer names, so that old and new files give one hash; of a codec
    of video by our names, so that its folder and the one it is converted to give one, too.
    """
    folder, tiles = local_copy(path), tiles or TileConfig()
    config, table = codec_config(folder)
    arrays, file = read_weights(folder)
    read = table.read(arrays, repr(str(file)))
    params, name = jax.tree.map(jnp.asarray, read), folder.resolve().name
    if isinstance(config, AutoencoderKLConfig):
        return ImageCodec(name, weights_hash(table.named(arrays)), config, params, tiles)
    return VideoCodec(name, causal_hash(config, read), config, params, tiles)


def write_codec(
    folder: Path, config: CausalAutoencoderConfig, params: Params, dtype: Any = np.float32
) -> None:
    """Writes our folder of a codec of video."""
    values = {"_class_name": CLASS, **dataclasses.asdict(config)}
    write_folder(folder, values, causal_map(config).export(params, dtype))
