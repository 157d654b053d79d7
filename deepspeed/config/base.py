"""What every section of the JSON configuration has in common.

`Section` is the base of each section's model; the section files (`zero.py`, `precision.py`, ...) fill it with fields
and `root.py` joins them into `Config`, and `explain.py` reads one and words what is wrong with it.

One value passes four doors, in this order: `"auto"` is dropped, so the default holds; an old key moves to its new name
with one warning (`old_keys`); pydantic checks the type and the range of each field; `rules` checks what several fields
say together.

Invariant: a section is frozen and strict. A key no field names is an error, at every level, unless `unknown.py` left
it out with a warning before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from deepspeed.utils.dtypes import dtype_name, parse_dtype
from deepspeed.utils.logging import warn_once

AUTO: Literal["auto"] = "auto"
"""The value that means "the default" wherever it stands, until an integration puts a number there."""


BROKEN_RULES = "broken_rules"
"""The pydantic error type that carries the problems `rules` found."""


class Problem(NamedTuple):
    """Several keys, each right by itself, that do not go together."""

    keys: tuple[str, ...]
    """The keys it is about, dotted, relative to the section whose rule this is."""
    rule: str
    """What must hold, as the rest of a sentence that starts with the keys and their values."""
    cure: str
    """The way out, as a sentence."""


class OldKey(NamedTuple):
    """Where the value of a key that older configurations use goes now."""

    new: str | None
    """The key that takes the value; None where nothing does."""
    convert: Callable[[Any], Any] = lambda value: value
    """From the old key's value to the new key's."""


class Section(BaseModel):
    """A JSON section: typed, strict, frozen."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        defer_build=True,
    )

    old_keys: ClassVar[Mapping[str, OldKey]] = {}
    """Keys that other versions knew under another name."""
    strict_sections: ClassVar[frozenset[str] | None] = None
    """The sections in which every unknown key is an error; None: this one and all below (see `unknown.py`)."""

    def rules(self) -> Iterator[Problem]:
        """What the fields, each right by itself, get wrong together. Keys are relative to this section."""
        return iter(())

    def notes(self) -> Iterator[str]:
        """Warnings, each shown once: keys that are allowed here and change nothing."""
        return iter(())

    @classmethod
    def adapt(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Other shapes that mean the same section, brought into the one the fields describe."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = cls.adapt({key: value for key, value in data.items() if not _is_auto(value)})
        for old in given.keys() & cls.old_keys.keys():
            new, convert = cls.old_keys[old]
            if new in given:
                continue
            value = given.pop(old)
            if new is None:
                warn_once(f"{old} is an old configuration key and has no effect.")
            else:
                warn_once(f"{old} is an old configuration key; use {new}.")
                given[new] = convert(value)
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(self.rules())
        if problems:
            seen = [(problem, [value_at(self, key) for key in problem.keys]) for problem in problems]
            raise PydanticCustomError(BROKEN_RULES, "{problems}", {"problems": seen})
        for note in self.notes():
            warn_once(note)
        return self


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def value_at(section: Any, path: str) -> Any:
    """The value at a dotted path below a section; None where a section or key on the way is absent."""
    for key in path.split("."):
        section = section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)
    return section


def _number(value: Any) -> Any:
    """A numeric string as a number; everything else as it is."""
    if not isinstance(value, str):
        return value
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            continue
    return value


def _floored(value: Any) -> Any:
    number = _number(value)
    return math.floor(number) if isinstance(number, float) and math.isfinite(number) else number


def _float_dtype(value: Any) -> torch.dtype:
    dtype = parse_dtype(value)
    if not dtype.is_floating_point:
        raise ValueError(f"{value!r} is not a floating-point dtype. Use fp32, fp16 or bf16.")
    return dtype


def also(*names: str) -> Any:
    """The names a field may have in the JSON, its own first; for use in Annotated."""
    return Field(validation_alias=AliasChoices(*names))


def one_or_many(value: Any) -> Any:
    """A lone string as a list of one; duplicates of a list removed, first place kept."""
    if isinstance(value, str):
        return [value]
    return list(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else value


def any_case(*choices: str) -> BeforeValidator:
    """Accept the choices in upper and lower case; for use in Annotated."""
    spelling = {choice.lower(): choice for choice in choices}
    return BeforeValidator(lambda value: spelling.get(value.lower(), value) if isinstance(value, str) else value)


Int = Annotated[int, BeforeValidator(_number)]
"""A whole number; 5e8, "8" and "5e8" are whole numbers too."""
PositiveInt = Annotated[Int, Ge(1)]
NonNegativeInt = Annotated[Int, Ge(0)]
Size = Annotated[int, BeforeValidator(_floored), Ge(0)]
"""A number of elements or bytes. Integrations compute these (0.9 * hidden * hidden), so a fraction is cut off."""
PositiveSize = Annotated[int, BeforeValidator(_floored), Ge(1)]
NonNegativeFloat = Annotated[float, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
"""A share, from 0 to 1."""
Dtype = Annotated[torch.dtype, BeforeValidator(parse_dtype), PlainSerializer(dtype_name)]
FloatDtype = Annotated[torch.dtype, BeforeValidator(_float_dtype), PlainSerializer(dtype_name)]
Names = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]
"""A list of names; a lone string is a list of one."""
