"""Which module reads and writes which published model. Modules are named, and not imported: a converter
of one model needs none of the others, and satellites do not import each other."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dit_jax.files import InputError, refuse_if

if TYPE_CHECKING:
    from dit_jax.config import VideoRun

TRANSFORMERS = {
    "DiTTransformer2DModel": "dit_jax.interop.dit",
    "Transformer2DModel": "dit_jax.interop.dit",
}
"""By the class that a folder's ``config.json`` names. A module has ``from_arrays``, ``from_folder`` and
``from_run``, which give a file's ``DiTFile`` or a like: what can be said of it, and its ``model``,
``table``, ``config_json`` and ``run``."""
KEYS = {"x_embedder.proj.weight": "dit_jax.interop.dit"}
"""The same by how a key ends that only one layout of files has."""
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
    modules = list(dict.fromkeys(TRANSFORMERS.values()))
    for name in modules[:-1]:
        with contextlib.suppress(InputError):
            return importlib.import_module(name).from_run(config, kind)
    return importlib.import_module(modules[-1]).from_run(config, kind)


def text_tools() -> Any:
    """The module that reads folders of text encoders."""
    return importlib.import_module(TEXT_ENCODERS)


def codec_tools(name: str = "CausalAutoencoder") -> Any:
    """The module that reads and writes folders of a class of codecs."""
    return importlib.import_module(CODECS[name])
