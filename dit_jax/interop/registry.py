"""Which module reads and writes which published model. Modules are named, and not imported: a converter
of one model needs none of the others, and satellites do not import each other."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_jax.files import InputError, refuse_if
from dit_jax.interop.folders import read_config

if TYPE_CHECKING:
    from dit_jax.config import VideoRun

TRANSFORMERS = {
    "DiTTransformer2DModel": "dit_jax.interop.dit",
    "Transformer2DModel": "dit_jax.interop.dit",
    "WanTransformer3DModel": "dit_jax.wan.transformer",
    "WanModel": "dit_jax.wan.transformer",
}
"""By the class that a folder's ``config.json`` names. A module has ``from_arrays``, ``from_folder`` and
``from_run``, which give a file's ``DiTFile`` or a like: what can be said of it, and its ``model``,
``table``, ``config_json`` and ``run``. It may have ``from_pipeline``, which gives a ``Pipeline``."""
KEYS = {
    "x_embedder.proj.weight": "dit_jax.interop.dit",
    "text_embedding.0.weight": "dit_jax.wan.transformer",
}
"""The same by how a key ends that only one layout of files has."""
FOLDERS = ("transformer", "high_noise_model")
"""Of the (first) transformer in the folder of a pipeline."""
CODECS: dict[str, str] = dict.fromkeys(
    ("AutoencoderKL", "AutoencoderKLWan", "CausalAutoencoder"), "dit_jax.codec.converting"
)
TEXT_ENCODERS = "dit_jax.text.config"


def transformer_of_class(name: Any, where: str) -> Any:
    """The module of a transformer by the class of its folder."""
    message = f"{where} is of {name!r}: known transformers are {', '.join(TRANSFORMERS)}."
    refuse_if([(name not in TRANSFORMERS, message)])
    return importlib.import_module(TRANSFORMERS[name])


def transformer_of_keys(keys: Iterable[str], where: str) -> Any:
    """The module of a transformer by the keys of its file."""
    found = {KEYS[end] for end in KEYS for key in keys if key.endswith(end)}
    message = (
        f"{where} has none of the keys {', '.join(KEYS)}: known transformers are "
        f"{', '.join(TRANSFORMERS)}."
    )
    refuse_if([(not found, message)])
    return importlib.import_module(found.pop())


def transformer_of_run(config: VideoRun, kind: str) -> Any:
    """The published transformer that the model of a run is, to be written as ``kind``; refused if it
    is none."""
    refusals = []
    for name in dict.fromkeys(TRANSFORMERS.values()):
        try:
            return importlib.import_module(name).from_run(config, kind)
        except InputError as error:
            refusals.append(str(error))
    raise InputError("\n".join(refusals))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What is in the folder of a whole pipeline."""

    transformers: Mapping[str, Path]
    """Folders of transformers, by where in the run each is put: "" is the run itself."""
    codec: str | None = None
    """Folder of the codec."""
    configure: Callable[[str, VideoRun], VideoRun] = lambda name, config: config
    """What the pipeline says of the run that is put there."""


def pipeline_of(folder: Path, place: str) -> Pipeline | None:
    """The pipeline in a folder, which lies at ``place``; None if there is none."""
    found = [folder / name for name in FOLDERS if (folder / name / "config.json").exists()]
    if not found:
        return None
    where = repr(str(found[0] / "config.json"))
    tools = transformer_of_class(read_config(found[0]).get("_class_name"), where)
    return (
        tools.from_pipeline(folder, place)
        if hasattr(tools, "from_pipeline")
        else Pipeline({"": found[0]})
    )


def text_tools() -> Any:
    """The module that reads folders of text encoders."""
    return importlib.import_module(TEXT_ENCODERS)


def codec_tools(name: str = "CausalAutoencoder") -> Any:
    """The module that reads and writes folders of a class of codecs."""
    return importlib.import_module(CODECS[name])
