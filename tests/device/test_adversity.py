"""Nothing depends on when asynchronous work happens, and a wait that is missing shows. All seeds: `make test-adversarial`."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from tests.device.adversity import CASES, check_case, run_late
from tests.device.mutations import Site, noticed
from tests.harness import run_ranks

SEEDS = [0, 2, 3]


@pytest.mark.parametrize("case", CASES)
def test_late_and_reordered_work_gives_the_same_numbers(case: str) -> None:
    check_case(case, SEEDS)


@functools.lru_cache(maxsize=None)
def in_order(case: str) -> Any:
    """The numbers of time in order."""
    return run_ranks(2, run_late, case, [None], device=CASES[case][0])[0][0]


@pytest.mark.parametrize(
    ("case", "site", "told"),
    [
        ("stage 0", Site("Work.wait", "comm/collective.py:_finish"), "race: .*all_reduce"),
        ("exchanges, stage 1", Site("Pending.wait", "zero/optimizer.py:_publish"), "losses"),
    ],
)
def test_a_wait_taken_away_is_noticed(case: str, site: Site, told: str) -> None:

    assert re.search(told, noticed(case, site, in_order(case)))
