"""Configs as they are stored, one value changed."""

import json

from dit_jax.config import to_dict


def with_value(config, name, value):
    """The JSON values of a config, with another one in the field of this dotted name."""
    values = json.loads(json.dumps(to_dict(config)))
    *way, last = name.split(".")
    inner = values
    for part in way:
        inner = inner[int(part) if part.isdigit() else part]
    inner[last] = value
    return values
