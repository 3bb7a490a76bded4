"""Codecs from folder to folder, and to runs that fine-tune them: what ``convert`` and ``prepare`` use.

A codec's meaning is its parameters together with the shift and scale of its latents: folders have
both, and of runs the folder that training wrote at its end.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax import interop
from dit_jax.codec.autoencoder_kl import AutoencoderKLConfig
from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.config import LatentCodecConfig as LatentCodecConfig
from dit_jax.codec.config import codec_copies as codec_copies
from dit_jax.codec.crops import CropConfig
from dit_jax.codec.folders import (
    WAN_CLASS,
    Kind,
    autoencoder_map,
    autoencoder_to_wan,
    codec_config,
    wan_map,
    write_codec,
)
from dit_jax.codec.folders import load_codec as load_codec
from dit_jax.codec.run import FOLDER, CodecDataConfig, CodecRun
from dit_jax.data import RecordsConfig
from dit_jax.files import local_copy, refuse_if
from dit_jax.types import Params


def finished_codec(run: Path) -> Path:
    """The folder of the codec that a run trained."""
    folder = run / FOLDER
    message = (
        f"{str(run)!r} is the run of a codec, and its folder {FOLDER!r} is not there: it is "
        "written when training ends. Run the same command again until it does."
    )
    refuse_if([(not (folder / "config.json").exists(), message)])
    return folder


@dataclasses.dataclass(frozen=True)
class CodecFolder:
    """A codec read from a folder: its ``config.json`` as ours and as the file's values, and its
    parameters as NumPy arrays, not shifted or scaled by anything."""

    source: Path
    config: Kind
    values: dict[str, Any]
    params: Params

    @property
    def name(self) -> str:
        return str(self.values["_class_name"])

    def write_diffusers(self, target: Path, dtype: Any, old_names: bool) -> None:
        """Diffusers' folder; ``old_names`` are those of before 0.16, of autoencoders of images."""
        config, values = self.config, self.values
        if isinstance(config, AutoencoderKLConfig):
            table = autoencoder_map(config, old_names)
        else:
            values = values if self.name == WAN_CLASS else autoencoder_to_wan(config)
            table = wan_map(config)
        interop.write_folder(target, values, table.export(self.params, dtype))

    def video(self, kind: str) -> CausalAutoencoderConfig:
        """Its config, unless it is an autoencoder of images, of which ``kind`` cannot be made."""
        message = (
            f"--input {str(self.source)!r} is an autoencoder of images, used from its folder as it is, "
            f"and --to is {kind!r}: --to diffusers writes it again."
        )
        refuse_if([(isinstance(self.config, AutoencoderKLConfig), message)])
        assert isinstance(self.config, CausalAutoencoderConfig)
        return self.config

    def write_codec(self, target: Path, dtype: Any) -> None:
        """Our own folder."""
        write_codec(target, self.video("codec"), self.params, dtype)

    def as_run(self, output: str) -> tuple[CodecRun, Params]:
        """The config and parameters of a run that fine-tunes it."""
        config = run_of_codec(self.video("run"), output)
        autoencoder = jax.tree.map(jnp.asarray, self.params["params"])
        return config, {"params": {"autoencoder": autoencoder}}


def read_codec_folder(folder: Path) -> CodecFolder:
    """A codec with all of its parameters, on the host."""
    folder = local_copy(folder)
    config, table = codec_config(folder)
    arrays, path = interop.read_weights(folder)
    params = table.read(arrays, repr(str(path)))
    return CodecFolder(folder, config, interop.read_config(folder), params)


def run_of_codec(config: CausalAutoencoderConfig, output: str) -> CodecRun:
    """The config of a run that fine-tunes a codec, on data to be named, in windows of 256 pixels or
    more. The latents' shift and scale are measured again when it ends."""
    time, space, _ = config.stride
    side = math.ceil(256 / space) * space
    crop = CropConfig(frames=1 + 4 * time, height=side, width=side)
    return CodecRun(
        output=output,
        data=CodecDataConfig(source=RecordsConfig(path="clips"), crop=crop),
        model=dataclasses.replace(config, shift=(), scale=()),
    )
