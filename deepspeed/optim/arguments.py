"""Settings from the configuration, checked against the constructor they are for.

Used by `optim.build` and `optim.schedules`, which turn a "type" and its "params" into an object. Every complaint names
the key as the user wrote it, the class, and what the class accepts. Pure.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

T = TypeVar("T")


def construct(kind: Callable[..., T], first: object, params: Mapping[str, Any], where: str) -> T:
    """`kind(first, **params)`. `where` is the path of `params` in the configuration, for errors.

    Raises DeepSpeedConfigError for unknown and missing keys and for values that the constructor refuses.
    """
    others = list(inspect.signature(kind).parameters.values())[1:]
    named = [p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in others):
        check_keys(params, [p.name for p in named], kind.__name__, where)
    missing = [p.name for p in named if p.default is p.empty and p.name not in params]
    if missing:
        raise DeepSpeedConfigError(
            f"{where} = {dict(params)}: {kind.__name__} needs {_listing(missing)}.\n  Add {_listing(missing)} there."
        )
    try:
        return kind(first, **params)
    except DeepSpeedError:
        raise
    except (TypeError, ValueError) as error:
        raise DeepSpeedConfigError(f"{where} = {dict(params)}: {kind.__name__} refuses it: {error}") from error


def check_keys(params: Mapping[str, Any], accepted: Collection[str], name: str, where: str) -> None:
    """Raise DeepSpeedConfigError for the first key of `params` that `name` does not take."""
    for key, value in params.items():
        if key not in accepted:
            raise DeepSpeedConfigError(
                f"{where}.{key} = {value!r}: {name} has no setting {key!r}.\n"
                f"  {did_you_mean(key, accepted)}It takes {_listing(sorted(accepted))}."
            )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """'Did you mean "..."? ' with the nearest of `known`, letter case aside; empty where none is near."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(by_lower[name]) for name in found)}? " if found else ""


def read_numbers(params: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `params` in which strings that spell a number are numbers, and lists (betas) are tuples."""
    return {key: _read(value) for key, value in params.items()}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(item) for item in value)
    if isinstance(value, str):
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                continue
    return value


def _listing(names: Collection[str]) -> str:
    return ", ".join(names)
