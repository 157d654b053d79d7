"""Questions about the shape of a section: its keys, what is below a key, every path.

Used by `explain.py`, which words faults, and `unknown.py`, which sifts what a user wrote. Pure; reads pydantic's models.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from deepspeed.config.base import Section


def names_of(section: type[Section]) -> dict[str, tuple[str, ...]]:
    """Each field's accepted names, its own first."""
    return {
        name: tuple(str(choice) for choice in field.validation_alias.choices)
        if isinstance(field.validation_alias, AliasChoices)
        else (name,)
        for name, field in section.model_fields.items()
    }


def field_of(section: type[Section], key: int | str) -> FieldInfo | None:
    """The field that a key of the JSON fills; None where there is none."""
    for name, names in names_of(section).items():
        if key in names:
            return section.model_fields[name]
    return None


def inner_section(annotation: Any) -> type[Section] | None:
    """The section inside `X`, `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for argument in get_args(annotation) if (found := inner_section(argument))), None)


@cache
def all_paths(section: type[Section], prefix: str = "", *, aliases: bool = False) -> tuple[str, ...]:
    """Every key below a section, dotted; with `aliases`, under each of its names."""
    paths: list[str] = []
    for name, names in names_of(section).items():
        paths += [prefix + each for each in (names if aliases else (name,))]
        inner = inner_section(section.model_fields[name].annotation)
        if inner is not None:
            paths += all_paths(inner, f"{prefix}{name}.", aliases=aliases)
    return tuple(paths)
