"""Codecs from folder to folder, and to runs that fine-tune them.

A codec's meaning is its parameters together with the shift and scale of its latents: folders have
both, and of runs the folder that training wrote at its end.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import interop
from dit_jax.codec import kl_weights, wan
from dit_jax.codec.autoencoder_kl import AutoencoderKLConfig
from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.config import LatentCodecConfig as LatentCodecConfig
from dit_jax.codec.config import codec_copies as codec_copies
from dit_jax.codec.crops import CropConfig
from dit_jax.codec.folders import codec_config, write_codec
from dit_jax.codec.folders import load_codec as load_codec
from dit_jax.codec.run import CodecDataConfig, CodecRun
from dit_jax.codec.train import FOLDER
from dit_jax.data import RecordsConfig
from dit_jax.files import local_copy
from dit_jax.types import Params

SIDE = 256
"""Pixels of the windows, about, that a converted codec's run is to be trained on."""


def finished_codec(run: Path) -> Path:
    """The folder of the codec that a run trained.

    Raises:
        ValueError: where the run has not come to its end.
    """
    folder = run / FOLDER
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{str(run)!r} is the run of a codec, and its folder {FOLDER!r} is not there: it is "
            "written when training ends. Run the same command again until it does."
        )
    return folder


@dataclasses.dataclass(frozen=True)
class CodecFolder:
    """A codec read from a folder."""

    source: Path
    config: AutoencoderKLConfig | CausalAutoencoderConfig
    values: dict[str, Any]
    """Of its ``config.json``."""
    params: Params
    """NumPy arrays, not shifted or scaled by anything."""

    @property
    def name(self) -> str:
        return str(self.values["_class_name"])

    def write_diffusers(self, target: Path, dtype: Any, old_names: bool) -> None:
        """Diffusers' folder; ``old_names`` are those of before 0.16, of autoencoders of images.

        Raises:
            ValueError: where Diffusers has no class that could hold it.
        """
        config, values = self.config, self.values
        if isinstance(config, AutoencoderKLConfig):
            table = kl_weights.autoencoder_map(config, old_names)
        else:
            theirs = self.name == wan.WAN_CLASS
            values = values if theirs else wan.autoencoder_to_wan(config)
            table = wan.wan_map(config)
        interop.write_folder(target, values, table.export(self.params, dtype))

    def video(self, kind: str) -> CausalAutoencoderConfig:
        """Its config; raises ``ValueError`` for an autoencoder of images, naming what was asked for."""
        if isinstance(self.config, AutoencoderKLConfig):
            raise ValueError(
                f"--input {str(self.source)!r} is an autoencoder of images, which is used from its "
                f"folder as it is, and --to is {kind!r}: --to diffusers writes it again (as "
                "safetensors, with the newer names)."
            )
        return self.config

    def write_codec(self, target: Path, dtype: Any) -> None:
        """Our own folder. Raises ``ValueError`` for an autoencoder of images."""
        write_codec(target, self.video("codec"), self.params, dtype)

    def as_run(self, output: str) -> tuple[CodecRun, Params]:
        """The config and parameters of a run that fine-tunes it."""
        config = run_of_codec(self.video("run"), output)
        autoencoder = jax.tree.map(jnp.asarray, self.params["params"])
        return config, {"params": {"autoencoder": autoencoder}}


def read_codec_folder(folder: Path) -> CodecFolder:
    """A codec with all of its parameters, on the host.

    Raises:
        ValueError: where the folder is of no codec, or is damaged.
    """
    folder = local_copy(folder)
    config, table = codec_config(folder)
    arrays, path = interop.read_weights(folder)
    params = table.read(arrays, repr(str(path)))
    return CodecFolder(folder, config, interop.read_config(folder), params)


def run_of_codec(config: CausalAutoencoderConfig, output: str) -> CodecRun:
    """The config of a run that fine-tunes a codec. The data are to be named where it is trained on, and
    the latents' shift and scale are measured again when that ends."""
    time, space, _ = config.stride
    side = int(np.ceil(SIDE / space)) * space
    return CodecRun(
        output=output,
        data=CodecDataConfig(
            source=RecordsConfig(path="clips"),
            crop=CropConfig(frames=1 + 4 * time, height=side, width=side),
        ),
        model=dataclasses.replace(config, shift=(), scale=()),
    )
