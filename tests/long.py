"""Which variants of a test the quick run has: `@pytest.mark.quick("3-*-2", "0-none-1")` names them by the words in its brackets.

The others run where `DS_TEST_LONG=1` or `--matrix` is given, as the long targets of the Makefile do. `conftest.py` calls `skip_variants`.

Invariant: every marked test is run whole by a long target (`test_long.py`), and no pattern is left that names nothing.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest

IS_LONG = os.environ.get("DS_TEST_LONG") == "1"
_SKIP = pytest.mark.skip(reason="a variant: DS_TEST_LONG=1")


def skip_variants(items: Sequence[pytest.Item], *, is_whole: bool = True) -> None:
    """Skip what the quick run leaves out. `is_whole`: all variants of each test are there, and pytest.UsageError is raised for a
    pattern that names none of them."""
    tests: dict[str, list[tuple[str, pytest.Item]]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick"):
            test, _, variant = item.nodeid.partition("[")
            tests[test].append((variant.removesuffix("]"), item))
    for test, variants in tests.items():
        patterns, names = _patterns(variants[0][1]), [name for name, _ in variants]
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if is_whole and idle:
            raise pytest.UsageError(f"{test}: quick names {idle}, and its variants are {names}")
        for name, item in variants:
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                item.add_marker(_SKIP)


def _patterns(item: pytest.Item) -> tuple[str, ...]:
    marker = item.get_closest_marker("quick")
    return marker.args if marker else ()
