"""Nothing depends on when asynchronous work happens, and a wait that is missing shows. All seeds: `make test-adversarial`."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import pytest

from tests.device.adversity import CASES, SPLIT, check_case, device_of, ranks_of, run_late
from tests.device.mutations import Site, noticed
from tests.device.scenes import SCENES
from tests.harness import run_ranks

IS_WHOLE = bool(os.environ.get("DS_TEST_DEVICE"))
"""Whether to run every case; see conftest.py."""
SOME_CASES = [*SCENES, *CASES, *SPLIT] if IS_WHOLE else [*SCENES, "stage 3, all on cpu", "exchanges, stage 3"]
SEEDS = [0, 2, 3] if IS_WHOLE else [0, 3]


@pytest.mark.parametrize("case", SOME_CASES)
def test_late_and_reordered_work_gives_the_same_numbers(case: str) -> None:
    check_case(case, SEEDS)


@functools.lru_cache(maxsize=None)
def in_order(case: str) -> Any:
    """The numbers of time in order."""
    return run_ranks(ranks_of(case), run_late, case, [None], device=device_of(case))[0][0]


@pytest.mark.parametrize(
    ("case", "site", "told"),
    [
        ("stage 0", Site("Work.wait", "comm/collective.py:_finish"), "race: .*all_reduce"),
        ("exchanges, stage 1", Site("Pending.wait", "zero/optimizer.py:publish"), "losses"),
        (next(iter(SCENES)), Site("Ordered.wait", "zero/delivery.py:_finish_oldest"), "race: .*fill_"),
    ],
)
def test_a_wait_taken_away_is_noticed(case: str, site: Site, told: str) -> None:
    assert re.search(told, noticed(case, site, in_order(case)))
