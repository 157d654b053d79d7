"""What follows from where bytes rest is decided in one place."""

from __future__ import annotations

from pathlib import Path

import deepspeed
from deepspeed.tiers import Tier

PACKAGE = Path(deepspeed.__file__).parent
MAY_NAME_IT = {"tiers/tier.py", "memory/cli.py"}
"""Where the name is made, and a table with a column for each tier."""


def test_bytes_of_one_tier_are_files() -> None:
    assert [tier for tier in Tier if tier.is_on_disk] == [Tier("nvme")]


def test_nobody_else_asks_for_the_nvme_tier_by_its_name() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "Tier.NVME" in path.read_text(encoding="utf-8")
    }
    assert found == MAY_NAME_IT
