"""Values at dotted keys of a plain configuration dict: read, set, listed. Pure.

Used where configurations are made from others: by the autotuner, whose candidates are a user's dict with some keys changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any


def get_at(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at "a.b.c"; `default` where a section or the key is absent."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy with values at dotted keys; None takes a key away, and a section that is not a dict is replaced."""
    made = copy.deepcopy(dict(config))
    for path, value in values.items():
        *sections, last = path.split(".")
        place = made
        for name in sections:
            if not isinstance(place.get(name), dict):
                if value is None:
                    break
                place[name] = {}
            place = place[name]
        else:
            if value is None:
                place.pop(last, None)
            else:
                place[last] = copy.deepcopy(value)
    return made


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
