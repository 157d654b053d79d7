"""How often the host waits for the device in a training step, phase by phase; see `test_host_waits.py`.

`python -m tests.device.waits` prints the table of all stages and tiers.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.device import cases, features, sim
from tests.device.cases import config_of, tier_section
from tests.engine.runs import engine_of, on_device
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share, total_loss

WARM_STEPS = 3
"""Steps before the one that is counted: plans are known then, and states exist."""

Sites = dict[str, list[str]]


def count(rank: int, world_size: int, config: dict[str, Any]) -> Sites:
    """The waits of the last step, by phase, with their places."""
    model = build("gpt_tied")
    batches = make_batches(
        model, num_steps=WARM_STEPS + 1, accumulation=config["gradient_accumulation_steps"], samples=6
    )
    sites: Sites = {}
    with engine_of(model, config) as engine:
        for micro_batches in batches:
            sites = {"forward": [], "backward": [], "step": []}
            for batch in micro_batches:
                share = on_device(rank_share(batch, rank, world_size), engine.device)
                with sim.watched() as seen:
                    loss = total_loss(engine(*share))
                sites["forward"] += seen.sites
                with sim.watched() as seen:
                    engine.backward(loss)
                sites["backward"] += seen.sites
                with sim.watched() as seen:
                    engine.step()
                sites["step"] += seen.sites
    return sites


def count_on_ranks(stage: int, optimizer: str = "none", param: str = "none", **extra: Any) -> Sites:
    """`count` of the first of two ranks, with bytes on these tiers."""
    with tempfile.TemporaryDirectory() as folder:
        zero = tier_section(optimizer, param, Path(folder))
        sites: Sites = run_ranks(2, count, config_of(stage, zero=zero, **extra), device=sim.NAME)[0]
    return sites


def _count_run(rank: int, world_size: int, name: str, stage: int, num_steps: int) -> collections.Counter[str]:
    with mock.patch.object(cases, "STEPS", num_steps), sim.watched() as seen:
        features.FEATURES[name][0](rank, world_size, stage)
    ours = [site for site in seen.sites if not site.endswith("in the caller")]
    return collections.Counter(site.partition(":")[0] for site in ours)


def count_feature(name: str, stage: int) -> dict[str, int]:
    """Waits of a step of a run of `features.FEATURES`, by file: those that one step more makes."""
    short, long = (run_ranks(2, _count_run, name, stage, n, device=sim.NAME)[0] for n in (WARM_STEPS, WARM_STEPS + 1))
    return dict(long - short)


if __name__ == "__main__":
    for name in ("tensor", "sequence", "experts"):
        print(name, count_feature(name, 3))
    for case in [(0,), (1,), (2,), (3,), (2, "cpu"), (3, "cpu", "cpu"), (3, "nvme", "nvme")]:
        found = count_on_ranks(*case)
        print(case, {phase: len(where) for phase, where in found.items()})
        if "-v" in sys.argv:
            for phase, where in found.items():
                for site in sorted(set(where)):
                    print(f"    {phase}: {where.count(site)} x {site}")
