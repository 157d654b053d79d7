"""The promised surface: every documented key, with its documented default, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

import deepspeed.config as config_package
from deepspeed.config import Config, load_config
from deepspeed.config.base import Section
from deepspeed.config.schema import all_paths, inner_section
from tests.config.keys import KEYS, OFF_UNLESS_GIVEN, nest


def at(dumped: Any, path: str) -> Any:
    for key in path.split("."):
        dumped = dumped[key]
    return dumped


def given(path: str, value: Any) -> dict[str, Any]:
    return nest(path.replace("quantize_algo", "quantize-algo"), value)


def with_parent(path: str) -> dict[str, Any]:
    parent = path.rpartition(".")[0]
    return nest(parent, {}) if parent else {}


def test_every_key_has_its_documented_default() -> None:
    actual = {path: at(load_config(with_parent(path)).model_dump(mode="json"), path) for path in KEYS}
    assert actual == KEYS


def test_every_key_accepts_its_default() -> None:
    actual = {path: at(load_config(given(path, KEYS[path])).model_dump(mode="json"), path) for path in KEYS}
    assert actual == KEYS


def test_auto_at_any_key_means_the_default() -> None:
    actual = {path: at(load_config(given(path, "auto")).model_dump(mode="json"), path) for path in KEYS}
    assert actual == KEYS


@pytest.mark.parametrize("section", sorted(OFF_UNLESS_GIVEN))
def test_a_section_is_off_unless_given(section: str) -> None:
    parent, _, key = section.rpartition(".")
    dumped = load_config({}).model_dump(mode="json")
    assert (at(dumped, parent) if parent else dumped)[key] is None


def test_there_is_no_key_that_is_not_documented() -> None:
    open_tables = ("different_groups", "curriculum_metrics", "layer_specs", "post_init_quant", "quantized_init")
    documented = set(KEYS) | {path.rpartition(".")[0] for path in KEYS}
    undocumented = [
        path
        for path in all_paths(Config)
        if path not in documented
        and not any(name in path for name in open_tables)
        and not any(key.startswith(path + ".") for key in KEYS)
    ]
    assert undocumented == []


def sections() -> list[type[Section]]:
    """Every section but the generic ones, whose texts stand in their source only."""
    found: dict[type[Section], None] = {}

    def visit(section: type[Section]) -> None:
        found[section] = None
        for field in section.model_fields.values():
            inner = inner_section(field.annotation)
            if inner is not None and inner not in found:
                visit(inner)

    visit(Config)
    return [section for section in found if not section.__pydantic_generic_metadata__["origin"]]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_says_what_it_is(section: type[Section]) -> None:
    silent = [name for name, field in section.model_fields.items() if not field.description]
    assert silent == []
    assert section.__doc__


def test_every_section_is_frozen() -> None:
    config = load_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.zero_optimization.stage = 3  # type: ignore[misc]


def test_the_package_exports_what_it_names() -> None:
    assert [name for name in config_package.__all__ if not hasattr(config_package, name)] == []
