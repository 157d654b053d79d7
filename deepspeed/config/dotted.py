"""Values at dotted keys of a plain configuration dict: read, set, listed. Pure.

Used where configurations are made from others: by the autotuner, whose candidates are a user's dict with some keys changed.
The last two search every level; scripts of the original's autotuner import them from `deepspeed.autotuning.utils`.
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


def get_val_by_key(config: Mapping[str, Any], key: str) -> Any:
    """The value of the first `key` at any level, outer levels of a section before its own sections; None where there is none."""
    if key in config:
        return config[key]
    sections = (value for value in config.values() if isinstance(value, Mapping))
    return next((found for found in (get_val_by_key(section, key) for section in sections) if found is not None), None)


def set_val_by_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set, in place, every `key` that the configuration has, at any level; none is added."""
    for own in config:
        if own == key:
            config[own] = value
        elif isinstance(config[own], dict):
            set_val_by_key(config[own], key, value)
