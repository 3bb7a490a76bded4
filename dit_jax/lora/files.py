"""Adapters as others keep them, read and written by the key tables of ``interop``.

    layout     keys of a linear layer                                      scale
    diffusers  transformer.MODULE.lora_A.weight, lora_B.weight             1; read: metadata, or 1
    comfyui    diffusion_model.MODULE.lora_down.weight, lora_up.weight     .alpha / rank
    own        dit_jax:OUR/PATH.lora_a, .lora_b, layers stacked            metadata

A [r, in] and B [out, r] there. MODULE is Diffusers' name of the layer, or its authors'. Also read:
PEFT's folders (adapter_config.json), keys without a prefix, and the names of kohya's and musubi's
trainers (lora_unet_blocks_0_...). Where our kernel joins several of theirs (queries, keys, values),
their A's stand side by side in ours and each B has rows of its own, zeros elsewhere; one A of ours is
written to each of theirs. Both are exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from einops import rearrange

from dit_jax import interop
from dit_jax.config import VideoRun
from dit_jax.files import InputError, atomic_path, local_copy, read_json, refuse_if
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map
from dit_jax.lora.adapters import Adapter, layers_of
from dit_jax.training.video_task import init_params, make_model

FileLayout = Literal["diffusers", "comfyui", "own"]
KINDS = {"diffusers": "diffusers", "comfyui": "safetensors"}
"""The published layouts whose modules each layout names."""
PREFIXES: dict[str, str] = {
    "transformer.": "diffusers",
    "base_model.model.": "diffusers",
    "diffusion_model.": "comfyui",
    "lora_unet_": "kohya",
    "dit_jax:": "own",
}
"""How keys begin, the first that fits; those of no other layout may begin with a module's name."""
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora_a": "a",
    ".lora_b": "b",
    ".alpha": "alpha",
}
METADATA = "lora_adapter_metadata"  # Of Diffusers.
OWN_SCALE = "dit_jax_lora_scale"
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of theirs: key number ``at`` of a kernel of ours."""

    entry: Entry
    at: int

    @property
    def layer(self) -> str:
        return "/".join(self.entry.path[:-1])


Pairs = Mapping[str, Mapping[str, np.ndarray]]
"""By module: its arrays a, b and alpha."""


# --- Which layers a layout has ---


def linear_modules(table: Map) -> dict[str, Module]:
    """The linear layers of a table by their names, as far as an adapter fits them: matrices, whose
    inputs are theirs, if in another order."""
    out = {}
    for entry in table.entries:
        theirs, ours = entry.layout.theirs, entry.layout.ours
        matrix = entry.path[-1] == "kernel" and len(entry.layout.their_shape) == 2
        inputs = {frozenset(one.split()) for one in (_groups(theirs)[-1], _groups(ours)[0])}
        if matrix and not entry.tied and len(inputs) == 1:
            for at, key in enumerate(entry.keys):
                out[key.removesuffix(".weight")] = Module(entry, at)
    return out


def published_modules(config: VideoRun) -> dict[str, dict[str, Module]]:
    """The linear layers of a run's model in each published layout that can hold it."""
    out = {}
    for layout, kind in KINDS.items():
        with contextlib.suppress(InputError):
            out[layout] = linear_modules(interop.transformer_of_run(config, kind).table(kind))
    return out


def _groups(side: str) -> list[str]:
    return [a or b for a, b in re.findall(r"\(([^()]*)\)|(\w+)", side)]


def _order(entry: Entry) -> np.ndarray:
    """Which of their inputs each of ours is: rotary pairs lie apart here, and side by side there."""
    layout = entry.layout
    theirs, ours = _groups(layout.theirs)[-1], _groups(layout.ours)[0]
    sizes = {axis: layout.sizes[axis] for axis in theirs.split()}
    places = np.arange(math.prod(sizes.values()))
    return rearrange(places, f"({theirs}) -> ({ours})", **sizes)


def _of_rank(entry: Entry, rank: int) -> Entry:
    """The entry of B: the kernel's, with ``rank`` inputs."""
    layout = entry.layout
    first, *others = _groups(layout.ours)[0].split()
    sizes = {**layout.sizes, first: rank, **dict.fromkeys(others, 1)}
    return dataclasses.replace(entry, layout=Layout(layout.pattern, sizes, layout.joined))


# --- Reading ---


def read_adapter(path: Path, config: VideoRun) -> Adapter:
    """The adapter of a file, or of a folder of PEFT's, for the model of a config; NumPy arrays.
    Refused, with the keys, if it is no such file or of another model."""
    arrays, settings, where = _open(path)
    layout, pairs = _pairs(arrays, where)
    if layout == "own":
        scale = float(settings.get(OWN_SCALE, 1.0))
        return Adapter({name: (pair["a"], pair["b"]) for name, pair in pairs.items()}, scale)
    known = published_modules(config)
    message = f"{where} is of a published model, and the run's is none that interop knows."
    refuse_if([(not known, message)])
    if layout == "kohya":
        known = {
            name: {key.replace(".", "_"): one for key, one in some.items()}
            for name, some in known.items()
        }
    # Keys without a prefix tell their layout by the modules that they name.
    modules = max(known.values(), key=lambda some: len(some.keys() & pairs.keys()))
    faults = [f"{name}: no such layer" for name in pairs if name not in modules]
    for name, pair in pairs.items():
        if name in modules:
            out, d = modules[name].entry.layout.their_shape
            a, b = pair["a"], pair["b"]
            if (a.shape, b.shape) != ((len(a), d), (out, len(a))):
                faults.append(f"{name}: A {a.shape}, B {b.shape} of a layer [{out}, {d}]")
    _refuse(faults, f"{where} is of another model:")
    scales = {name: _scale(name, pair, settings) for name, pair in pairs.items()}
    # One scale for all is kept; several go into B.
    one = scales[next(iter(scales))] if len(set(scales.values())) == 1 else 1.0
    of_entry: dict[tuple[str, ...], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for name, pair in pairs.items():
        a, b = (np.asarray(pair[key], np.float32) for key in "ab")
        module, factor = modules[name], np.float32(scales[name] / one)
        of_entry.setdefault(module.entry.path, {})[module.at] = a, b * factor
    entries = {module.entry.path: module.entry for module in modules.values()}
    layers = {"/".join(path[:-1]): _ours(entries[path], some) for path, some in of_entry.items()}
    return Adapter(layers, one)


def _open(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Arrays, settings, and the file's name for messages."""
    path, settings = local_copy(path), {}
    if path.is_dir():
        settings = read_json(path / "adapter_config.json", "the adapter's config")
        path = path / "adapter_model.safetensors"
    else:
        message = f"--lora {str(path)!r}: give a run, a .safetensors file, or a folder of PEFT's."
        refuse_if([(path.suffix != ".safetensors", message)])
    where, arrays = repr(str(path)), interop.read_safetensors(path)
    metadata = interop.read_metadata(path)
    if METADATA in metadata:
        with contextlib.suppress(ValueError, AttributeError):
            packed = json.loads(metadata[METADATA])
            settings = {key.removeprefix("transformer."): one for key, one in packed.items()}
    kinds = [name for name in ("use_dora",) if settings.get(name)]
    refuse_if([(bool(kinds), f"{where} has {', '.join(kinds)}: DoRA is not read.")])
    return arrays, {**metadata, **settings}, where


def _pairs(arrays: Mapping[str, np.ndarray], where: str) -> tuple[str, Pairs]:
    """The layout of a file, and its arrays by module."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    layouts, unknown = set(), []
    for key, array in arrays.items():
        end = next((one for one in ENDS if key.endswith(one)), None)
        prefix = next((one for one in PREFIXES if key.startswith(one)), "")
        if end is None:
            unknown.append(f"{key}: unknown")
            continue
        layouts.add(PREFIXES.get(prefix, "plain"))
        name = key[len(prefix) : -len(end)].removeprefix("transformer.")
        if array.ndim > 2 and array.shape[2:] == (1,) * (array.ndim - 2):
            array = array.reshape(array.shape[:2])  # A 1 x 1 convolution is a linear layer.
        pairs.setdefault(name, {})[ENDS[end]] = array
    several = f"{where} mixes keys of the layouts {', '.join(sorted(layouts))}: split it."
    refuse_if([(len(layouts) > 1, several)])
    halves = {"a": "A (lora_A, lora_down)", "b": "B (lora_B, lora_up)"}
    for name, pair in pairs.items():
        unknown += [f"{name}: no {what}" for half, what in halves.items() if half not in pair]
    _refuse(unknown or ([] if pairs else ["it is empty"]), f"{where} is no LoRA that is read:")
    return layouts.pop(), pairs


def _scale(name: str, pair: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> float:
    """The scale of a module: of its own alpha, of the settings of PEFT, or 1."""
    rank = len(pair["a"])
    if "alpha" in pair:
        return float(np.asarray(pair["alpha"], np.float32).reshape(-1)[0]) / rank
    if "lora_alpha" not in settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    own = [x for key, x in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
    alpha = float((own or [settings["lora_alpha"]])[0])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _ours(
    entry: Entry, theirs: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a kernel of ours, of those (scaled) of its modules, by their numbers."""
    parts, count = entry.layout.arrays, len(entry.keys)
    rank = max(len(a) for a, _ in theirs.values())
    groups = [[theirs.get(i + j) for j in range(parts)] for i in range(0, count, parts)]

    def same(group: Sequence[Any]) -> bool:
        first, *others = (one[0] for one in group if one is not None)
        return all(np.array_equal(first, one) for one in others)

    # One A for all parts, as we write it, is one of ours.
    shared = parts == 1 or all(same(group) for group in groups if any(x is not None for x in group))
    blocks = 1 if shared else parts
    a = np.zeros((count // parts, entry.layout.their_shape[1], blocks * rank), np.float32)
    of_b: dict[str, np.ndarray] = {}
    for at, key in enumerate(entry.keys):
        layer, part = divmod(at, parts)
        full = np.zeros((entry.layout.their_shape[0], blocks * rank), np.float32)
        if at in theirs:
            one, other = theirs[at]
            start = 0 if shared else part * rank
            a[layer, :, start : start + len(one)] = one.T[_order(entry)]
            full[:, start : start + len(one)] = other
        of_b[key] = full
    ranked = _of_rank(entry, blocks * rank)
    b = ranked.read(of_b, (slice(None),) * len(ranked.shape), np.float32)
    return (a if entry.stacked else a[0]), b


def check_adapter(adapter: Adapter, config: VideoRun, mesh: Any, where: str) -> None:
    """Refuses an adapter whose layers are not those of a config's model."""
    init = partial(init_params, make_model(config.model, mesh))
    layers, faults = layers_of(tree := jax.eval_shape(init, jax.random.key(0))), []
    for name, (a, b) in adapter.layers.items():
        leaf: Any = tree
        for part in (*layers[name], "kernel") if name in layers else ():
            leaf = leaf[part]
        if name not in layers:
            faults.append(f"{name}: no such layer")
        elif (*a.shape[:-1], b.shape[-1]) != leaf.value.shape or a.shape[-1] != b.shape[-2]:
            shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
            faults.append(f"{name}: {shapes} of a kernel {leaf.value.shape}")
    _refuse(faults, f"{where} is of another model:")


def _refuse(faults: Sequence[str], message: str) -> None:
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    refuse_if([(bool(faults), "\n  ".join([message, *faults[:SHOWN], *more]))])


# --- Writing ---


def write_adapter(
    path: Path, adapter: Adapter, config: VideoRun, layout: FileLayout, dtype: Any = np.float32
) -> int:
    """Writes an adapter of the model of a config; returns how many arrays. Refused if the layout has no
    place for a layer."""
    layers = {k: (np.asarray(a), np.asarray(b)) for k, (a, b) in adapter.layers.items()}
    arrays: dict[str, np.ndarray] = {}
    if layout == "own":
        metadata = {OWN_SCALE: repr(float(adapter.scale))}
        for name, (a, b) in layers.items():
            arrays |= {f"dit_jax:{name}.lora_a": a, f"dit_jax:{name}.lora_b": b}
    else:
        file = interop.transformer_of_run(config, KINDS[layout])
        modules = linear_modules(file.table(KINDS[layout]))
        absent = layers.keys() - {module.layer for module in modules.values()}
        _refuse(sorted(absent), f"--layout {layout} has no place for these layers (take own):")
        theirs = dict(_theirs(modules, layers))
        metadata = {}
        if layout == "diffusers":
            # The scale goes into B: not every reader of this layout looks into the metadata.
            for name, (a, b) in theirs.items():
                arrays[f"transformer.{name}.lora_A.weight"] = a
                arrays[f"transformer.{name}.lora_B.weight"] = b * np.float32(adapter.scale)
            ranks = {len(a) for a, _ in theirs.values()}
            if len(ranks) == 1:  # Else readers find them in the shapes.
                (rank,) = ranks
                about = {"r": rank, "lora_alpha": rank, "target_modules": sorted(theirs)}
                about = {f"transformer.{key}": one for key, one in about.items()}
                metadata = {METADATA: json.dumps(about, indent=2, sort_keys=True)}
        else:
            for name, (a, b) in theirs.items():
                arrays[f"diffusion_model.{name}.lora_down.weight"] = a
                arrays[f"diffusion_model.{name}.lora_up.weight"] = b
                alpha = np.asarray(adapter.scale * len(a), np.float32)
                arrays[f"diffusion_model.{name}.alpha"] = alpha
    arrays = {
        key: array if array.ndim == 0 else array.astype(dtype) for key, array in arrays.items()
    }
    with atomic_path(path) as fresh:
        interop.write_safetensors(fresh, arrays, metadata)
    return len(arrays)


def _theirs(
    modules: Mapping[str, Module], layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Iterable[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """A [r, in] and B [out, r] of every module whose kernel is adapted."""
    apart: dict[str, bool] = {}
    for name, module in modules.items():
        if (layer := module.layer) not in layers:
            continue
        (a, b), entry = layers[layer], module.entry
        rank, parts = a.shape[-1], entry.layout.arrays
        ranked, each = _of_rank(entry, rank), rank // parts
        if layer not in apart:
            wholes = [ranked.write(b, at, np.float32) for at in range(len(entry.keys))]
            apart[layer] = parts > 1 and rank % parts == 0 and _in_blocks(wholes, parts, each)
        number, part = divmod(module.at, parts)
        one = (a[number] if entry.stacked else a)[np.argsort(_order(entry))].T
        other = ranked.write(b, module.at, np.float32)
        if apart[layer]:  # As it was read of a file with an A for each part.
            own = slice(part * each, (part + 1) * each)
            one, other = one[own], other[:, own]
        yield name, (np.ascontiguousarray(one, np.float32), np.ascontiguousarray(other))


def _in_blocks(wholes: Sequence[np.ndarray], parts: int, each: int) -> bool:
    """Whether the B of every part is zero but for its own block, and not all are."""
    for at, whole in enumerate(wholes):
        part = at % parts
        others = np.delete(whole, slice(part * each, (part + 1) * each), 1)
        if others.any():
            return False
    return any(whole.any() for whole in wholes)
