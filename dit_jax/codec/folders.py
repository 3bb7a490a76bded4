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
from flax import traverse_util

from dit_jax.codec.causal_autoencoder import WAN, CausalAutoencoderConfig, param_shapes
from dit_jax.codec.codec import ImageCodec, TileConfig, VideoCodec
from dit_jax.config import from_dict
from dit_jax.files import checking_input, local_copy, refuse_if
from dit_jax.interop.folders import (
    read_config,
    read_settings,
    read_weights,
    weights_hash,
    write_folder,
)
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map
from dit_jax.types import Params, PositiveInt, require

CLASS, KL, WAN_CLASS = "CausalAutoencoder", "AutoencoderKL", "AutoencoderKLWan"

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


def _ours(values: Mapping[str, Any]) -> CausalAutoencoderConfig:
    fields = {name: value for name, value in values.items() if not name.startswith("_")}
    return from_dict(CausalAutoencoderConfig, fields)


def autoencoder_from_diffusers(values: Mapping[str, Any]) -> CausalAutoencoderConfig:
    """The autoencoder of a ``config.json`` of ``AutoencoderKL``."""
    theirs = read_settings(KLSettings, values)
    widths, z = theirs.block_out_channels, theirs.latent_channels
    require("", theirs, ("out_channels", theirs.out_channels == theirs.in_channels, "in_channels"))
    return CausalAutoencoderConfig(
        channels=theirs.in_channels,
        latent_channels=z,
        widths=widths,
        strides=((1, 2),) * (len(widths) - 1),
        layers=theirs.layers_per_block,
        norm_groups=theirs.norm_num_groups,
        quant=theirs.use_quant_conv,
        post_quant=theirs.use_post_quant_conv,
        mid_attention=theirs.mid_block_add_attention,
        shift=(theirs.shift_factor or 0.0,) * z,
        scale=(theirs.scaling_factor,) * z,
        dtype="float32",
    )


def autoencoder_from_wan(values: Mapping[str, Any]) -> CausalAutoencoderConfig:
    """The autoencoder of a ``config.json`` of ``AutoencoderKLWan``."""
    theirs = read_settings(WanSettings, values)
    mult, halved, patch = theirs.dim_mult, theirs.temperal_downsample, theirs.patch_size or 1
    levels = mult[:1] == (1,) and len(mult) == len(halved) + 1
    require(
        "",
        theirs,
        ("attn_scales", not theirs.attn_scales, "empty"),
        ("in_channels", theirs.in_channels % patch**2 == 0, f"a multiple of {patch} ** 2"),
        ("out_channels", theirs.out_channels == theirs.in_channels, "in_channels"),
        ("dim_mult", levels, "1 and one for each halving"),
        ("latents_std", 0 not in theirs.latents_std, "other than 0"),
    )
    encoder, decoder = (
        tuple(base * m for m in mult)
        for base in (theirs.base_dim, theirs.decoder_base_dim or theirs.base_dim)
    )
    return CausalAutoencoderConfig(
        channels=theirs.in_channels // patch**2,
        latent_channels=theirs.z_dim,
        widths=encoder,
        strides=tuple((2 if half else 1, 2) for half in halved),
        layers=theirs.num_res_blocks,
        decoder_widths=() if decoder == encoder else decoder,
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
    fixed = dict(mid_attention=True, variational=True, quant=True, post_quant=True)
    fixed |= dict(linear=False, norm_groups=0)
    require(
        f"{WAN_CLASS} has no setting for the autoencoder, whose ",
        config,
        *((name, getattr(config, name) == value, repr(value)) for name, value in fixed.items()),
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
    (r"^decoder\.body\.", "decoder."),
    (r"^(encoder|decoder)\.(quant|post_quant)\.", r"\2_conv."),
    (r"^encoder\.level_(\d+)_resnet_(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^decoder\.level_(\d+)_resnet_(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"\.mid\.resnet_", ".mid_block.resnets."),
    (r"\.mid\.attention\.", ".mid_block.attentions.0."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.kernel$", ".weight"),
)
KL_RULES = (
    (r"^encoder\.level_(\d+)_down\.space", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"^decoder\.level_(\d+)_up\.space", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"attentions\.0\.norm\.", "attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"attentions\.0\.out\.", "attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.scale$", ".weight"),
)
WAN_RULES = (
    (r"^encoder\.level_(\d+)_down\.", r"encoder.down_blocks.\1.downsampler."),
    (r"^decoder\.level_(\d+)_up\.", r"decoder.up_blocks.\1.upsampler."),
    (r"sampler\.space\.", "sampler.resample.1."),
    (r"sampler\.time\.", "sampler.time_conv."),
    (r"attentions\.0\.qkv\.", "attentions.0.to_qkv."),
    (r"attentions\.0\.out\.", "attentions.0.proj."),
    (r"\.scale$", ".gamma"),
)
FRAMES = "o i (t h) w -> t h w i o"
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of before Diffusers 0.16, as published files have; their weights may be 1x1 convolutions."""


def _table(
    name: str,
    config: CausalAutoencoderConfig,
    rules: tuple[tuple[str, Any], ...],
    kernel: Callable[[str], str],
) -> Map:
    """A table with an entry for every parameter: its key by rules, the layout of kernels by key."""
    entries = []
    flat: dict[Any, Any] = traverse_util.flatten_dict(param_shapes(config)["params"])
    for path, leaf in flat.items():
        key = ".".join(path)
        for ours, theirs in rules:
            key = re.sub(ours, theirs, key)
        # Axes that only they have are of size 1.
        sizes, layout = {**dict.fromkeys("xyz", 1), "o": leaf.shape[0]}, "o -> o"
        if leaf.ndim > 1:
            sizes = dict(zip("thwio"[-leaf.ndim :], leaf.shape, strict=True))
            layout = kernel(key) if leaf.ndim > 2 else "o i -> i o"
        elif key.endswith(".gamma"):
            layout = "o x y -> (o x y)" if "attentions" in key else "o x y z -> (o x y z)"
        # Linear layers are 1x1 convolutions in old files.
        entries.append(Entry(path, (key,), Layout(layout, sizes), squeezed=leaf.ndim == 2))
    return Map(f"{name} of its config.json", tuple(entries))


def autoencoder_map(config: CausalAutoencoderConfig, old_names: bool = False) -> Map:
    """The keys of ``AutoencoderKL``; written by the old names of attention if asked for."""
    attention = "{}.mid_block.attentions.0.{}.{}"
    aliases = {
        attention.format(half, old, kind): attention.format(half, new, kind)
        for half in ("encoder", "decoder")
        for new, old in OLD_ATTENTION.items()
        for kind in ("weight", "bias")
    }
    written = {new: old for old, new in aliases.items()} if old_names else {}
    table = _table(f"an {KL}", config, RULES + KL_RULES, lambda _: FRAMES)
    return dataclasses.replace(table, aliases=aliases, written=written)


def wan_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of ``AutoencoderKLWan``."""

    def flat(match: re.Match[str]) -> str:
        level, kind, block = match.groups()
        place = int(block) if kind == "resnets" else config.layers
        return f"encoder.down_blocks.{int(level) * (config.layers + 1) + place}"

    # Wan 2.1's encoder numbers blocks and downsamplers in one row.
    blocks = r"^encoder\.down_blocks\.(\d+)\.(resnets|downsampler)(?:\.(\d+))?"
    older = ((r"\.upsampler\.", ".upsamplers.0."), (blocks, flat))
    rules = RULES + WAN_RULES + (() if config.shortcuts else older)
    # Kernels of convolutions of frames have no axis of time.
    return _table(
        f"an {WAN_CLASS}",
        config,
        rules,
        lambda key: FRAMES if re.search("resample|attentions", key) else "o i t h w -> t h w i o",
    )


def causal_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of our own folder: every parameter under its path."""
    return _table(f"the {CLASS}", config, ((r"\.", "/"),), lambda _: "t h w i o -> t h w i o")


# ---------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------


SETTINGS = {KL: autoencoder_from_diffusers, WAN_CLASS: autoencoder_from_wan, CLASS: _ours}
TABLES = {KL: autoencoder_map, WAN_CLASS: wan_map, CLASS: causal_map}


def codec_config(folder: Path) -> tuple[CausalAutoencoderConfig, Map]:
    """The autoencoder that a folder's ``config.json`` describes, and the keys of its weights."""
    values = read_config(folder)
    where, name = repr(str(folder / "config.json")), values.get("_class_name")
    unknown = (
        f"{where} is of {name!r}, which is no codec: give a folder of {KL} or {WAN_CLASS} "
        f"(Diffusers'), or the folder 'codec' of a run that trained one ({CLASS})."
    )
    refuse_if([(name not in TABLES, unknown)])
    remedy = "restore the file, or use the version that wrote it"
    with checking_input(f"{where} describes no {name} that is built here", remedy):
        config = SETTINGS[str(name)](values)
        return config, TABLES[str(name)](config)


def _fields(config: CausalAutoencoderConfig) -> dict[str, Any]:
    """The config as folders have it: without what is younger than the first, if it is not set."""
    younger = {"norm_groups": 0, "quant": True, "post_quant": True}
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if younger.get(name) != value}


def causal_hash(config: CausalAutoencoderConfig, params: Params) -> str:
    """Of the parameters and of what their latents are shifted and scaled by, whichever folder they
    came in."""
    meaning = _fields(dataclasses.replace(config, dtype="auto"))
    for name in ("shift", "scale"):
        # Diffusers' folder has the scale's inverse, whose inverse is off by the last bit.
        meaning[name] = [float(np.float32(value)) for value in meaning[name]]
    text = np.frombuffer(json.dumps(meaning, sort_keys=True).encode(), np.uint8)
    flat: dict[Any, Any] = traverse_util.flatten_dict(params["params"], sep="/")
    return weights_hash({**flat, "config.json": text})


@dataclasses.dataclass(frozen=True)
class CodecFolder:
    """A codec read from a folder: its ``config.json`` as ours and as the file's values, and its
    parameters as NumPy arrays, not shifted or scaled by anything."""

    source: Path
    config: CausalAutoencoderConfig
    values: dict[str, Any]
    params: Params
    hash: str
    """Of the arrays by their newer names, so that old and new files give one hash; of a codec of video
    by our names, so that its folder and the one it is converted to give one, too."""

    @property
    def name(self) -> str:
        return str(self.values["_class_name"])

    def write_diffusers(self, target: Path, dtype: Any, old_names: bool) -> None:
        """Diffusers' folder; ``old_names`` are those of before 0.16, of autoencoders of images."""
        images, config = self.name == KL, self.config
        values = autoencoder_to_wan(config) if self.name == CLASS else self.values
        table = autoencoder_map(config, old_names) if images else wan_map(config)
        write_folder(target, values, table.export(self.params, dtype))

    def write_codec(self, target: Path, dtype: Any) -> None:
        """Our own folder."""
        self._refuse_images("codec")
        write_codec(target, self.config, self.params, dtype)

    def as_run(self, output: str) -> tuple[Any, Params]:
        """The config and parameters of a run that fine-tunes it."""
        from dit_jax.codec.run import run_of_codec  # It imports this module.

        self._refuse_images("run")
        autoencoder = jax.tree.map(jnp.asarray, self.params["params"])
        return run_of_codec(self.config, output), {"params": {"autoencoder": autoencoder}}

    def _refuse_images(self, kind: str) -> None:
        message = (
            f"--input {str(self.source)!r} is an autoencoder of images, used from its folder as it is, "
            f"and --to is {kind!r}: --to diffusers writes it again."
        )
        refuse_if([(self.name == KL, message)])


def read_codec_folder(path: str | Path) -> CodecFolder:
    """The codec in a folder (safetensors, ``.bin`` or ``.pt``), on the host."""
    folder = local_copy(path)
    config, table = codec_config(folder)
    arrays, file = read_weights(folder)
    params = table.read(arrays, repr(str(file)))
    values = read_config(folder)
    images = values["_class_name"] == KL
    digest = weights_hash(table.named(arrays)) if images else causal_hash(config, params)
    return CodecFolder(folder, config, values, params, digest)


def load_codec(path: str | Path, tiles: TileConfig | None = None) -> ImageCodec | VideoCodec:
    """The codec in a folder, ready to encode and decode."""
    read = read_codec_folder(path)
    kind = ImageCodec if read.name == KL else VideoCodec
    params, name = jax.tree.map(jnp.asarray, read.params), read.source.resolve().name
    return kind(name, read.hash, read.config, params, tiles or TileConfig())


def write_codec(
    folder: Path, config: CausalAutoencoderConfig, params: Params, dtype: Any = np.float32
) -> None:
    """Writes our folder of a codec of video."""
    values = {"_class_name": CLASS, **_fields(config)}
    write_folder(folder, values, causal_map(config).export(params, dtype))
