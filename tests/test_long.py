"""The quick run leaves out variants, never a behaviour, and a target of the Makefile runs all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import long

ROOT = Path(__file__).resolve().parents[1]


class Variant:
    """As much of pytest's item as is asked for."""

    def __init__(self, name: str, *patterns: str) -> None:
        self.nodeid = f"tests/test_some.py::test_it[{name}]"
        self.patterns = patterns
        self.is_skipped = False

    def get_closest_marker(self, name: str) -> Any:
        return pytest.mark.quick(*self.patterns).mark if self.patterns else None

    def add_marker(self, marker: Any) -> None:
        self.is_skipped = marker.name == "skip"


def test_variants_that_a_pattern_names_run_and_others_are_left_to_the_long_targets() -> None:
    marked = [Variant(name, "3-*", "0-fp32") for name in ("3-fp32", "3-bf16", "0-fp32", "0-bf16")]
    plain = Variant("0-bf16")
    long.skip_variants([*marked, plain])  # type: ignore[list-item]
    assert [item.is_skipped for item in [*marked, plain]] == [False, False, False, True, False]


def test_a_pattern_that_names_nothing_is_an_error_where_all_variants_are_there() -> None:
    items = [Variant(name, "3-*") for name in ("0-fp32", "0-bf16")]
    with pytest.raises(pytest.UsageError, match=r"test_it: quick names \['3-\*'\]"):
        long.skip_variants(items)  # type: ignore[arg-type]
    long.skip_variants(items, is_whole=False)  # type: ignore[arg-type]


def test_every_file_with_variants_is_run_by_a_long_target() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    commands = [line for line in makefile.splitlines() if "DS_TEST_LONG=1" in line or "--matrix" in line]
    run = {path for command in commands for path in re.findall(r"tests(?:/\w+)+(?:\.py)?", command)}
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.quick(" in path.read_text()]
    assert len(marked) > 10
    for path in marked:
        name = path.relative_to(ROOT).as_posix()
        assert path.name == Path(__file__).name or any(name == each or name.startswith(f"{each}/") for each in run), (
            f"{name} has variants that no target of the Makefile runs"
        )
