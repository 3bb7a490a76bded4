"""Codecs from folder to folder, and to runs that fine-tune them: what ``convert`` and ``prepare`` use.

A codec's meaning is its parameters together with the shift and scale of its latents: folders have
both, and of runs the folder that training wrote at its end.
"""

from pathlib import Path

from dit_jax.codec.config import LatentCodecConfig as LatentCodecConfig
from dit_jax.codec.config import codec_copies as codec_copies
from dit_jax.codec.folders import codec_config as codec_config
from dit_jax.codec.folders import load_codec as load_codec
from dit_jax.codec.folders import read_codec_folder as read_codec_folder
from dit_jax.codec.run import FOLDER
from dit_jax.codec.run import run_of_codec as run_of_codec
from dit_jax.files import refuse_if


def finished_codec(run: Path) -> Path:
    """The folder of the codec that a run trained."""
    folder = run / FOLDER
    message = (
        f"{str(run)!r} is the run of a codec, and its folder {FOLDER!r} is not there: it is "
        "written when training ends. Run the same command again until it does."
    )
    refuse_if([(not (folder / "config.json").exists(), message)])
    return folder
