"""Parameter maps: a table that names, for each of our parameters, what it is called elsewhere.

A table is strict in both directions: every one of our parameters has an entry, every key of a
published file is named by one, and every shape is what the table says. What is wrong is listed whole,
not the first of it. Arrays are read from mapped files straight into their shards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.files import refuse_if
from dit_jax.interop.layouts import Layout
from dit_jax.types import Params

Arrays = Mapping[str, np.ndarray]
"""Published arrays by key, as ``read_torch`` or ``read_safetensors`` maps them."""
SHOWN = 40
"""Mismatches that an error lists; the rest are counted."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the published keys that make it."""

    path: tuple[str, ...]
    """Ours, below "params"."""
    keys: tuple[str, ...]
    """Theirs: as many as the layout joins, times the layers (``stacked``) or copies (``tied``)."""
    layout: Layout
    stacked: bool = False
    """Whether the keys are of layers, along an axis of ours before those of the layout."""
    tied: bool = False
    """Whether the keys are copies of one array: equal when read, repeated when written."""
    negative: bool = False
    """Whether theirs is ours with the other sign."""
    squeezed: bool = False
    """Whether theirs may have axes of size 1 behind: a 1 x 1 convolution for a linear layer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our parameter."""
        layers = (len(self.keys) // self.layout.arrays,) if self.stacked else ()
        return layers + self.layout.our_shape

    def read(self, arrays: Arrays, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The rectangle ``index`` of our parameter."""
        if not self.stacked:
            return self._read(arrays, 0, index, dtype)
        layers = range(*index[0].indices(self.shape[0]))
        parts = (self._read(arrays, layer, index[1:], dtype) for layer in layers)
        first = next(parts)
        out = np.empty(
            (len(layers), *first.shape), dtype
        )  # Not a stack: that holds all of it twice.
        for at, part in enumerate(itertools.chain([first], parts)):
            out[at] = part
        return out

    def _read(self, arrays: Arrays, layer: int, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        start = layer * self.layout.arrays
        keys = self.keys[start : start + self.layout.arrays]
        theirs = [arrays[key].reshape(self.layout.their_shape) for key in keys]
        part = self.layout.read(theirs, index)
        return np.asarray(-part if self.negative else part, dtype)

    def write(self, ours: Any, at: int, dtype: Any) -> np.ndarray:
        """The array of key number ``at``, made of our parameter."""
        layer, part = divmod(at, self.layout.arrays)
        whole = np.asarray(ours[layer] if self.stacked else ours).astype(dtype)
        made = self.layout.write(-whole if self.negative else whole)
        return made[0 if self.tied else part]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a published array of that shape is one that the entry reads."""
        wanted, shape = self.layout.their_shape, tuple(shape)
        if self.squeezed:
            extra = len(shape) - len(wanted)
            return extra >= 0 and shape == wanted + (1,) * extra
        return shape == wanted


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A published buffer that is no parameter: computed here, checked when read."""

    key: str
    value: np.ndarray
    tolerance: float = 1e-5
    optional: bool = False
    """Whether files may lack it; then none is written."""


def rest_of(key: str, at: int) -> str:
    """What a table calls the second part of an array (``Map.parts``)."""
    return f"{key}[:, {at}:]"


@dataclasses.dataclass(frozen=True)
class Map:
    """All entries of a layout."""

    name: str
    """Of the layout, in messages."""
    entries: tuple[Entry, ...]
    fixed: tuple[Fixed, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names that files have for keys: ``{theirs: the table's}``."""
    written: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names to write in place of keys: ``{the table's: theirs}``."""
    ignored: tuple[str, ...] = ()
    """How keys begin that files may have of another model beside this one: they are not read."""
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Keys whose array is two of the table's, split along its second axis, and where: a key itself has
    the first of them, and ``rest_of`` names the other."""

    @cached_property
    def _of_key(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in self.entries:
            for key in entry.keys:
                assert key not in found, key
                found[key] = entry
        return found

    def named(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The arrays by the table's names, without those that are ignored."""
        named: dict[str, np.ndarray] = {}
        for key, array in arrays.items():
            if not key.startswith(self.ignored):
                name = self.aliases.get(key, key)
                message = f"the file has both {key!r} and {name!r}, which are one."
                refuse_if([(name in named, message)])
                named[name] = array
        for key, at in self.parts.items():
            if key in named and named[key].ndim > 1:
                named[key], named[rest_of(key, at)] = named[key][:, :at], named[key][:, at:]
        return named

    def check(self, arrays: Arrays, where: str) -> None:
        """Refuses arrays of which keys are absent, unknown, misshapen or not as tied, and names all."""
        fixed = {entry.key: entry for entry in self.fixed}
        needed = set(self._of_key) | {key for key, entry in fixed.items() if not entry.optional}
        faults = [f"{key}: absent" for key in sorted(needed - set(arrays))]
        for key, array in sorted(arrays.items()):
            if key in fixed:
                faults += _fixed_faults(fixed[key], array)
            elif key not in self._of_key:
                faults.append(f"{key}: {tuple(array.shape)}, which {self.name} does not have")
            elif not (entry := self._of_key[key]).fits(array.shape):
                wanted = entry.layout.their_shape
                faults.append(f"{key}: shape {tuple(array.shape)}, wanted {wanted}")
        if not faults:
            faults = list(self._untied(arrays))
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        listed = "\n  ".join([f"{where} is not {self.name}:", *faults[:SHOWN], *more])
        refuse_if([(bool(faults), listed)])

    def _untied(self, arrays: Arrays) -> Iterator[str]:
        for entry in self.entries:
            first, *others = entry.keys if entry.tied else ("",)
            for key in others:
                if not np.array_equal(arrays[key], arrays[first]):
                    yield f"{key}: not equal to {first}, of which it is a copy in published files"

    def check_params(self, params: Params) -> None:
        """Refuses parameters of ours that are not those of the table."""
        ours = {path: tuple(leaf.shape) for path, leaf in _leaves(params)}
        table = {entry.path: entry.shape for entry in self.entries}
        faults = [
            f"{'/'.join(path)}: {ours.get(path, 'absent')} here, {table.get(path, 'absent')} there"
            for path in sorted(ours.keys() | table.keys())
            if ours.get(path) != table.get(path)
        ]
        listed = "\n  ".join([f"the model is none that {self.name} can hold:", *faults[:SHOWN]])
        refuse_if([(bool(faults), listed)])

    def load(self, arrays: Arrays, where: str, shapes: Params, shardings: Params) -> Params:
        """Our parameters, ``{"params": ...}``, laid out by ``shardings`` and in the dtypes of
        ``shapes``; every process reads the slices of its own devices only. Refused if the file and
        the table, or the table and the model, disagree, or if values are not finite."""
        arrays = self.named(arrays)
        self.check(arrays, where)
        self.check_params(shapes)
        of_path = {entry.path: entry for entry in self.entries}
        layout = dict(_leaves(shardings))
        loaded: dict[str, Any] = {}
        faults: list[Entry] = []
        for path, leaf in _leaves(shapes):
            _put(loaded, path, _array(of_path[path], arrays, leaf, layout[path], faults))
        _check_finite(faults, arrays, where)
        return {"params": loaded}

    def read(self, arrays: Arrays, where: str) -> Params:
        """Our parameters as NumPy arrays, whole; float32. Refused as by ``load``."""
        arrays = self.named(arrays)
        self.check(arrays, where)
        made: dict[str, Any] = {}
        faults: list[Entry] = []
        for entry in self.entries:
            index = (slice(None),) * len(entry.shape)
            whole = entry.read(arrays, index, np.float32)
            faults += [] if np.isfinite(whole).all() else [entry]
            _put(made, entry.path, whole)
        _check_finite(faults, arrays, where)
        return {"params": made}

    def export(self, params: Params, dtype: Any = np.float32) -> Written:
        """Published arrays of our parameters; each is made when it is asked for."""
        self.check_params(params)
        return Written(self, dict(_leaves(params)), np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Pending:
    """An array that is made by ``np.asarray``."""

    shape: tuple[int, ...]
    dtype: np.dtype
    entry: Entry | Fixed
    ours: Any = None
    at: int = 0
    rest: Pending | None = None
    """What follows it along the second axis."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        if isinstance(self.entry, Fixed):
            made = self.entry.value.astype(self.dtype)
        else:
            made = self.entry.write(self.ours, self.at, self.dtype)
        if self.rest is not None:
            made = np.concatenate([made, np.asarray(self.rest)], 1)
        return made if dtype is None else made.astype(dtype)


class Written(Mapping[str, Pending]):
    """Published arrays by key, in the table's order, made one at a time."""

    def __init__(self, table: Map, leaves: dict[tuple[str, ...], Any], dtype: np.dtype) -> None:
        self._made: dict[str, Pending] = {}
        for fixed in table.fixed:
            if not fixed.optional:
                self._made[fixed.key] = Pending(fixed.value.shape, dtype, fixed)
        for stacked, group in itertools.groupby(table.entries, lambda entry: entry.stacked):
            entries = list(group)
            # Of layers: all of the first, then all of the second, as published files have them.
            each = [entry.layout.arrays if stacked else len(entry.keys) for entry in entries]
            for layer in range(entries[0].shape[0] if stacked else 1):
                for entry, count in zip(entries, each, strict=True):
                    for at in range(layer * count, (layer + 1) * count):
                        name = table.written.get(entry.keys[at], entry.keys[at])
                        ours, shape = leaves[entry.path], entry.layout.their_shape
                        self._made[name] = Pending(shape, dtype, entry, ours, at)
        for key, at in table.parts.items():
            first, rest = self._made[key], self._made.pop(rest_of(key, at))
            shape = (first.shape[0], at + rest.shape[1], *first.shape[2:])
            self._made[key] = dataclasses.replace(first, shape=shape, rest=rest)

    def __getitem__(self, key: str) -> Pending:
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _fixed_faults(fixed: Fixed, array: np.ndarray) -> list[str]:
    if array.shape != fixed.value.shape:
        return [f"{fixed.key}: shape {tuple(array.shape)}, wanted {fixed.value.shape}"]
    off = float(np.abs(np.asarray(array, np.float32) - fixed.value).max(initial=0))
    # Half precision has its own rounding, which is coarser in bfloat16 than in float16.
    rounded = jnp.issubdtype(array.dtype, jnp.floating)
    allowed = max(fixed.tolerance, float(jnp.finfo(array.dtype).eps) if rounded else 0.0)
    if not off <= allowed:
        return [f"{fixed.key}: differs by {off:.3g} from what the model computes in its place"]
    return []


def shape_of(arrays: Arrays, key: str, axes: int) -> tuple[Any, ...]:
    """The shape of a published array, from which a config is read; refused if it has other axes."""
    found = arrays.get(key)
    what = "absent" if found is None else f"of shape {tuple(found.shape)}"
    message = f"{key!r} is {what}, and the config is read from its {axes} dimensions."
    refuse_if([(found is None or found.ndim != axes, message)])
    assert found is not None
    return tuple(found.shape)


def _leaves(params: Params) -> list[tuple[tuple[str, ...], Any]]:
    """Every leaf and its path below "params"."""
    leaves = jax.tree_util.tree_flatten_with_path(params["params"])[0]
    return [(tuple(str(key.key) for key in path), leaf) for path, leaf in leaves]


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _check_finite(faults: Sequence[Entry], arrays: Arrays, where: str) -> None:
    """Names the keys of entries whose values are not all finite."""
    found = (key for entry in faults for key in entry.keys)
    keys = [key for key in found if not np.isfinite(np.asarray(arrays[key], np.float32)).all()]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    message = (
        f"{where} holds NaN or infinite values in {', '.join(keys[:SHOWN])}{more}: get it again, or "
        "take an earlier one."
    )
    refuse_if([(bool(faults), message)])


def _array(
    entry: Entry, arrays: Arrays, leaf: Any, sharding: Any, faults: list[Entry]
) -> jax.Array:
    """A parameter on its devices; equal slices (of replicas) are read once. An entry that is not
    finite is put in ``faults``."""
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        place = tuple(s.indices(size) for s, size in zip(index, leaf.shape, strict=True))
        if place not in parts:
            parts[place] = entry.read(arrays, index, leaf.dtype)
            if not np.isfinite(parts[place]).all() and entry not in faults:
                faults.append(entry)
        return parts[place]

    return jax.make_array_from_callback(leaf.shape, sharding, part)
