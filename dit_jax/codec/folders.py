"""Folders of codecs: Diffusers' ``AutoencoderKL`` and ``AutoencoderKLWan``, and our own.

Our folder is laid out as Diffusers' are: ``config.json``, with the fields of
``CausalAutoencoderConfig``, beside safetensors whose keys are the paths of parameters.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dit_jax.codec.autoencoder_kl import AutoencoderKLConfig
from dit_jax.codec.causal_autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.codec.codec import ImageCodec, TileConfig
from dit_jax.codec.kl_weights import autoencoder_from_diffusers, autoencoder_map
from dit_jax.codec.video_codec import VideoCodec
from dit_jax.codec.wan import WAN_CLASS, autoencoder_from_wan, wan_map
from dit_jax.config import from_dict
from dit_jax.files import InputError, local_copy
from dit_jax.interop.folders import read_config, read_weights, weights_hash, write_folder
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map
from dit_jax.types import Params

CLASS = "CausalAutoencoder"
Kind = AutoencoderKLConfig | CausalAutoencoderConfig


def codec_config(folder: Path) -> tuple[Kind, Map]:
    """The autoencoder that a folder's ``config.json`` describes, and the keys of its weights.

    Raises:
        ValueError: where the folder is of no autoencoder that is built here.
    """
    values = read_config(folder)
    where, name = repr(str(folder / "config.json")), values.get("_class_name")
    if name == WAN_CLASS:
        wan = autoencoder_from_wan(values, where)
        return wan, wan_map(wan)
    if name == CLASS:
        ours = _from_values(values, where)
        return ours, causal_map(ours)
    if name != "AutoencoderKL":
        raise ValueError(
            f"{where} is of {name!r}, which is no codec: give a folder of AutoencoderKL or "
            f"AutoencoderKLWan (Diffusers'), or the folder 'codec' of a run that trained one ({CLASS})."
        )
    image = autoencoder_from_diffusers(values, where)
    return image, autoencoder_map(image)


def _from_values(values: dict[str, Any], where: str) -> CausalAutoencoderConfig:
    """Our config of JSON values."""
    fields = {name: value for name, value in values.items() if not name.startswith("_")}
    try:
        return from_dict(CausalAutoencoderConfig, fields)
    except ValueError as error:
        raise InputError(
            f"{where} describes no {CLASS} of this version of dit_jax ({error}): restore the file, or "
            "use the version that wrote it."
        ) from error


def causal_map(config: CausalAutoencoderConfig) -> Map:
    """The keys of our own folder: every parameter under its path."""
    model = CausalAutoencoder(config)
    frame = jnp.zeros((1, 1, *config.stride[1:], config.channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), frame, mutable="params"))
    letters = "abcdefg"
    entries = []
    flat: dict[Any, Any] = traverse_util.flatten_dict(nn.unbox(shapes["params"]))
    for path, leaf in flat.items():
        axes = " ".join(letters[: len(leaf.shape)])
        layout = Layout(f"{axes} -> {axes}", dict(zip(letters, leaf.shape, strict=False)))
        entries.append(Entry(path, ("/".join(path),), layout))
    return Map(f"the {CLASS} of its config.json", tuple(entries))


def causal_hash(config: CausalAutoencoderConfig, params: Params) -> str:
    """Of the parameters and of what their latents are shifted and scaled by, whichever folder they
    came in."""
    meaning = dataclasses.asdict(dataclasses.replace(config, dtype="auto"))
    for name in ("shift", "scale"):
        # Diffusers' folder has the scale's inverse, whose inverse is off by the last bit.
        meaning[name] = [float(np.float32(value)) for value in meaning[name]]
    said = np.frombuffer(json.dumps(meaning, sort_keys=True).encode(), np.uint8)
    flat: dict[Any, Any] = traverse_util.flatten_dict(params["params"], sep="/")
    return weights_hash({**flat, "config.json": said})


def load_codec(path: str | Path, tiles: TileConfig | None = None) -> ImageCodec | VideoCodec:
    """The codec in a folder (safetensors, ``.bin`` or ``.pt``).

    Its hash is of the arrays by their newer names, so both names of a file give one hash; of a codec of
    video by our names, so that its folder and the one it is converted to give one, too.

    Raises:
        ValueError: where the folder or what it holds is not that, or its values are not finite.
    """
    folder = local_copy(path)
    config, table = codec_config(folder)
    arrays, file = read_weights(folder)
    read = table.read(arrays, repr(str(file)))
    params, name = jax.tree.map(jnp.asarray, read), folder.resolve().name
    if isinstance(config, AutoencoderKLConfig):
        digest = weights_hash(table.named(arrays))
        return ImageCodec(name, digest, config, params, tiles or TileConfig())
    return VideoCodec(name, causal_hash(config, read), config, params, tiles or TileConfig())


def write_codec(
    folder: Path, config: CausalAutoencoderConfig, params: Params, dtype: Any = np.float32
) -> None:
    """Writes our folder of a codec of video."""
    values = {"_class_name": CLASS, **dataclasses.asdict(config)}
    write_folder(folder, values, causal_map(config).export(params, dtype))
