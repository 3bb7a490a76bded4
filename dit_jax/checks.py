"""The values of a config's fields, checked against their types: Python itself checks none.

A config file is Python and a stored config is JSON, so ``steps=1e1`` or ``scan="False"`` would be
noticed late or never. The command line is read by ``tyro``, which takes ``nan`` for a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from dit_jax.files import InputError

_repr = reprlib.Repr()  # Cut: values may be large or deeply nested.
_repr.maxstring = _repr.maxother = 200
SCALARS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text in quotes",
}


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _options(hint: Any) -> tuple[Any, ...]:
    """What a union may be; the type itself if it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _item_types(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the items of a tuple that has ``count`` of them."""
    args = typing.get_args(hint)
    return args[:1] * count if args[-1] is Ellipsis else args


def _describe(hint: Any) -> str:
    """What a type takes, for readers of an error."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        inner = dict.fromkeys(_describe(one) for one in args if one is not Ellipsis)
        count = "any number" if args[-1] is Ellipsis else str(len(args))
        return f"a tuple of {count}, each {' or '.join(inner)}"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if len(_options(hint)) > 1:
        return ", or ".join(_describe(one) for one in _options(hint))
    if hint is types.NoneType:
        return "None"
    return SCALARS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as can be seen without looking into it."""
    if typing.get_origin(hint) is typing.Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(hint))
    if hint is Any:
        return True
    if hint is float:
        # NaN compares false, and a whole number of any size can be compared.
        return (_is(value, int) or isinstance(value, float)) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Raises ``InputError`` if a value, or one inside it, is not of its type, or not finite.

    A whole number may stand for a float. ``name`` is the dotted name of the field that holds it.
    """
    own = next((one for one in _options(hint) if _is(value, one)), None)
    if (
        own is None
        or typing.get_origin(own) is tuple
        and len(_item_types(own, len(value))) != len(value)
    ):
        choices = [str(one) for kind in _options(hint) for one in typing.get_args(kind)]
        near = isinstance(value, str) and difflib.get_close_matches(value, choices, 1, 0.5)
        raise InputError(
            f"{name} is {_repr.repr(value)}: it is {_describe(hint)}."
            + (f" Perhaps {near[0]!r} was meant." if near else "")
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} is {_repr.repr(value)}, which is no text in UTF-8: rename it."
            ) from error
    if typing.get_origin(own) is tuple:
        for i, (item, kind) in enumerate(zip(value, _item_types(own, len(value)), strict=True)):
            check_value(item, kind, f"{name}[{i}]")
    if dataclasses.is_dataclass(value):
        check_types(value, name)


def check_types(config: Any, name: str = "") -> None:
    """Raises ``InputError`` for a field, however deep, whose value is not of its type, or not finite.

    Call it where a user's values enter: on a config or on the arguments of a command. ``name`` is the
    dotted name of the config itself.
    """
    for field, hint in _field_types(type(config)).items():
        check_value(getattr(config, field), hint, f"{name}.{field}" if name else field)


def from_dict(kind: Any, values: Any, name: str = "") -> Any:
    """The dataclass that JSON values describe: objects for dataclasses, lists for tuples.

    An object whose field may be one of several dataclasses names its own by ``type``. ``name`` is the
    dotted name of the field that holds the values.

    Raises:
        InputError: for unknown fields and values of wrong types, by their dotted names.
    """
    classes = (one for one in _options(kind) if isinstance(one, type))
    choices = {one.__name__: one for one in classes if dataclasses.is_dataclass(one)}
    if choices and isinstance(values, dict):
        tag = values.get("type", next(iter(choices)))
        if not isinstance(tag, str) or tag not in choices:
            raise InputError(
                f"{name}.type is {_repr.repr(tag)}: it is one of {', '.join(choices)}."
            )
        kind = choices[tag]
        values = {field: value for field, value in values.items() if field != "type"}
        known = _field_types(kind)
        if unknown := sorted(set(values) - set(known)):
            raise InputError(
                f"the stored config has {unknown[0]!r}, which {kind.__name__} does not: the run was "
                "made by another version of dit_jax; use that version to read it."
            )
        fields = {
            field: from_dict(known[field], value, f"{name}.{field}" if name else field)
            for field, value in values.items()
        }
        return kind(**fields)
    if typing.get_origin(kind) is tuple and isinstance(values, list):
        kinds = _item_types(kind, len(values))
        values = tuple(
            from_dict(kinds[min(i, len(kinds) - 1)], value, f"{name}[{i}]")
            for i, value in enumerate(values)
        )
    check_value(values, kind, name or "the config")
    return values


def culprits(error: BaseException) -> Iterator[Any]:
    """The dataclasses whose ``__post_init__`` an error passed through, the innermost last.

    The comparisons there fail for values of a wrong type before anything could check these.
    """
    trace = error.__traceback__
    while trace is not None:
        this = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "__post_init__" and dataclasses.is_dataclass(this):
            yield this
        trace = trace.tb_next
