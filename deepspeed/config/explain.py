"""Read a section, and say in our words what is wrong with it.

`read_section` is the one door from a dict to a typed section: called by `root.load_config`, and by whoever has a
single section in hand. `unknown.py` takes out what means nothing here, pydantic finds the faults, and this file turns
them into the sentences a user reads: the key with its full dotted path, the value as it was written, the rule, and on
the next line the cure.

Invariant: one bad configuration raises one `DeepSpeedConfigError`, with every fault that can be known at once. A rule
about several keys is checked even where other keys are wrong, unless it speaks about a wrong one.
"""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_origin

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from deepspeed.config.base import BROKEN_RULES, Problem, Section
from deepspeed.config.schema import field_of, inner_section, names_of
from deepspeed.config.unknown import NEAR, take_known
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError

SectionT = TypeVar("SectionT", bound=Section)
Loc = tuple[int | str, ...]

_LONGEST_VALUE = 80
_LONGEST_KEY_LIST = 12

_FAULTS: dict[str, tuple[str, str]] = {
    "int": ("is not a whole number", "Use a whole number"),
    "float": ("is not a number", "Use a number"),
    "bool": ("is neither true nor false", "Use true or false"),
    "string_too_short": ("is too short", "It needs at least {min_length} character(s)"),
    "string": ("is not a string", "Use a string"),
    "path": ("is not a path", "Use a path, as a string"),
    "tuple": ("is not a list", "Use a list"),
    "list": ("is not a list", "Use a list"),
    "dict": ("is not a section", "Write a section, {{...}}, or remove the key"),
    "model": ("is not a section", "Write a section, {{...}}, or remove the key"),
    "literal": ("is not one of its values", "Use {expected}"),
    "greater_than_equal": ("is too small", "It must be at least {ge}"),
    "greater_than": ("is too small", "It must be greater than {gt}"),
    "less_than_equal": ("is too large", "It must be at most {le}"),
    "less_than": ("is too large", "It must be less than {lt}"),
    "none": ("is not null", "Remove the key"),
    "finite": ("is not a finite number", "Use a number"),
}
"""pydantic's error types, by the longest prefix: the rule and the cure."""


class Fault(NamedTuple):
    """One thing wrong."""

    broken: str | None
    """The top-level key whose value cannot be used; None for a rule between top-level keys."""
    about: frozenset[str]
    """The top-level keys it speaks about."""
    text: str
    path: str = ""
    """The one key at fault, dotted; "" for a rule."""


def read_section(section: type[SectionT], data: Mapping[str, Any], origin: str = "the configuration") -> SectionT:
    """Build `section` from a dict. `origin` names the source in errors, for example a file.

    Raises DeepSpeedConfigError, listing everything wrong. A key without effect is left out, after one warning.
    """
    data = take_known(section, data)
    try:
        return section.model_validate(data)
    except ValidationError as error:
        faults = _faults(section, error)
    broken = {fault.broken for fault in faults} - {None}
    broken |= {name for name, names in names_of(section).items() if broken.intersection(names)}
    if broken:
        sound = {key: value for key, value in section.adapt(dict(data)).items() if key not in broken}
        try:
            section.model_validate(sound)
        except ValidationError as error:
            faults += [fault for fault in _faults(section, error) if not broken & fault.about]
    raise _report(faults, origin)


def show(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    if isinstance(value, torch.dtype):
        value = dtype_name(value)
    elif isinstance(value, enum.Enum):
        value = value.value
    text = json.dumps(value, default=lambda odd: odd.model_dump() if isinstance(odd, Section) else str(odd))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 4] + " ..."


def _report(faults: Sequence[Fault], origin: str) -> DeepSpeedConfigError:
    texts = [fault.text for fault in faults]
    where = "" if origin == "the configuration" else f"in {origin}: "
    if len(texts) == 1:
        return DeepSpeedConfigError(where + texts[0])
    items = [f"- {text}".replace("\n", "\n  ") for text in texts]
    return DeepSpeedConfigError("\n".join([f"{where}{len(texts)} things in the configuration are wrong.", *items]))


def _faults(section: type[Section], error: ValidationError) -> list[Fault]:
    """Every fault, in pydantic's order. A field of several types gives an error for each; the last one stands."""
    found: dict[Any, Fault] = {}
    for details in error.errors(include_url=False):
        for fault in _explain(section, details):
            found[fault.path or fault.text] = fault
    return list(found.values())


def _explain(root: type[Section], details: ErrorDetails) -> Iterator[Fault]:
    kind, loc, value = details["type"], details["loc"], details["input"]
    if kind == BROKEN_RULES:
        for problem, values in details["ctx"]["problems"]:
            yield _rule_fault(loc, problem, values)
        return
    section, field, path = _locate(root, loc)
    top = str(path[0]) if path else None
    if kind == "extra_forbidden":
        text = _unknown_key(section, path)
    elif kind == "missing":
        text = f"{_dotted(path)} is missing.\n  {_section_name(path)} needs it."
    else:
        rule, cure = _rule_and_cure(details)
        text = f"{_dotted(path) or 'the configuration'} = {show(value)} {rule}.\n  {cure}{_default(field)}."
    yield Fault(top, frozenset({top} if top else ()), text, _dotted(path))


def _rule_fault(loc: Loc, problem: Problem, values: Sequence[Any]) -> Fault:
    paths = [".".join([*map(str, loc), key]) for key in problem.keys]
    subject = " and ".join(f"{path} = {show(value)}" for path, value in zip(paths, values, strict=True))
    return Fault(
        broken=str(loc[0]) if loc else None,
        about=frozenset(path.partition(".")[0] for path in paths),
        text=f"{subject}: {problem.rule}.\n  {problem.cure}",
    )


def _rule_and_cure(details: ErrorDetails) -> tuple[str, str]:
    context = details.get("ctx", {})
    if details["type"] == "value_error":
        rule, _, cure = str(context["error"]).rstrip(".").partition(". ")
        return rule.removeprefix(f"{details['input']!r} "), cure
    for prefix in sorted(_FAULTS, key=len, reverse=True):
        if details["type"].startswith(prefix):
            rule, cure = _FAULTS[prefix]
            return rule, cure.format(**{name: _quote(text) for name, text in context.items()})
    return f"is refused ({details['msg']})", "Change it or leave the key out"


def _quote(value: Any) -> str:
    """A bound or a list of values, as JSON would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", '"')


def _default(field: FieldInfo | None) -> str:
    if field is None or field.is_required() or not isinstance(field.default, (bool, int, float, str)):
        return ""
    return f" (default {show(field.default)})"


def _unknown_key(section: type[Section], path: Loc) -> str:
    key, place, full = str(path[-1]), _dotted(path[:-1]), _dotted(path)
    if key in section.old_keys:
        return f"{full} is an old name of {section.old_keys[key].new}, which is given too.\n  Keep the new one only."
    same = [name for name, names in names_of(section).items() if key in names]
    if same:
        others = " or ".join(other for other in names_of(section)[same[0]] if other != key)
        return f"{full} and {others} are the same setting, given twice.\n  Keep one."
    return f"{full} is not a configuration key.\n  {_nearest(section, place, key)}"


def _nearest(section: type[Section], place: str, key: str) -> str:
    prefix = f"{place}." if place else ""
    known = [*(name for names in names_of(section).values() for name in names), *section.old_keys]
    near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR)
    near = near or difflib.get_close_matches(key, known, n=1)
    if near:
        return f"Did you mean {prefix}{near[0]}?"
    if len(known) <= _LONGEST_KEY_LIST:
        return f"Its keys are {', '.join(known)}."
    return "Remove it."


def _locate(root: type[Section], loc: Loc) -> tuple[type[Section], FieldInfo | None, Loc]:
    """The section that holds the last key of `loc`, that key's field, and `loc` without pydantic's own marks.

    A name the user chose (a key of an open table) and a list index belong to no section and are passed over.
    """
    section, field = root, None
    for place, key in enumerate(loc):
        holder, field = field, field_of(section, key)
        if field is not None and place < len(loc) - 1:
            section = inner_section(field.annotation) or section
        elif field is None and holder is not None and isinstance(key, str) and _is_plain(holder):
            return section, holder, loc[:place]
    return section, field, loc


def _is_plain(field: FieldInfo) -> bool:
    """Whether the field holds neither a section nor an open table, so that no key of the user's can be below it."""
    return inner_section(field.annotation) is None and get_origin(field.annotation) is not dict


def _dotted(path: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _section_name(path: Loc) -> str:
    return _dotted(path[:-1]) or "The configuration"
