"""Training in adversarial time: what is asynchronous happens as late as the rules allow, or in another legal order; see `sim.reset`.

On the device its streams do it. On the CPU `late_exchanges` puts a `LateExchange` around every exchange between ranks: its results
are poison until the wait, and what is sent is taken late. `python -m tests.device.adversity --seeds 200` runs them all.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from deepspeed.comm.choose import make_exchange
from deepspeed.comm.exchange import Exchange, Pending
from tests.device import sim
from tests.device.cases import config_of, tier_section
from tests.device.features import FEATURES, NUM_RANKS
from tests.device.scenes import SCENES
from tests.engine.runs import Run, train
from tests.harness import run_ranks

CASES: dict[str, tuple[str, int, str, str, dict[str, Any]]] = {
    "stage 0": ("sim", 0, "none", "none", {}),
    "stage 1": ("sim", 1, "none", "none", {}),
    "stage 2": ("sim", 2, "none", "none", {}),
    "stage 3": ("sim", 3, "none", "none", {}),
    "stage 3, nothing kept": ("sim", 3, "none", "none", {"stage3_max_reuse_distance": 0}),
    "stage 2, optimizer on cpu": ("sim", 2, "cpu", "none", {}),
    "stage 3, all on cpu": ("sim", 3, "cpu", "cpu", {}),
    "stage 3, parameters on cpu": ("sim", 3, "none", "cpu", {}),
    "stage 3, all on nvme": ("sim", 3, "nvme", "nvme", {}),
    "exchanges, stage 0": ("cpu", 0, "none", "none", {}),
    "exchanges, stage 1": ("cpu", 1, "none", "none", {}),
    "exchanges, stage 2": ("cpu", 2, "none", "none", {}),
    "exchanges, stage 3": ("cpu", 3, "none", "none", {"stage3_max_reuse_distance": 0}),
}
"""By name: device, stage, tier of the optimizer, tier of parameters, other keys of `zero_optimization`."""

SPLIT = {
    f"{name}, stage {stages[-1]}": (run, stages[-1], NUM_RANKS.get(name, 2)) for name, (run, stages) in FEATURES.items()
}
"""Models that are split, and bytes that are compressed, on the simulated device."""


def device_of(case: str) -> str:
    """Where a case or a scene runs."""
    return CASES[case][0] if case in CASES else sim.NAME


def ranks_of(case: str) -> int:
    """How many ranks a case or a scene has."""
    return SPLIT[case][2] if case in SPLIT else 2


class LateExchange:
    """Another exchange, whose results arrive in the wait, or before it as a seed says; poison until then."""

    def __init__(self, inner: Exchange, seed: int) -> None:
        self.inner = inner
        self.group, self.rank, self.world_size = inner.group, inner.rank, inner.world_size
        self._chance = random.Random(seed)
        self._late = [1.0, 0.9, 0.6, 0.3][seed % 4]
        self._flying: list[tuple[Tensor, ...]] = []

    @property
    def needs_shard(self) -> bool:
        """See Exchange."""
        return self.inner.needs_shard

    def invalidate(self) -> None:
        """See Exchange."""
        self.inner.invalidate()

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        scratch = full.clone()
        pending = self.inner.start_all_gather(scratch, shard)
        return self._late_copy(pending, scratch, full)

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        sent, result = full.clone(), torch.zeros_like(out)
        pending = self.inner.start_reduce_scatter(sent, result, divide_by=divide_by, accumulate=False)
        full.fill_(torch.nan)  # scratch from now on
        is_inside = _overlap(full, out)
        return self._late_copy(pending, result, out, accumulate=accumulate, is_poisoned=not accumulate or is_inside)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        scratch = full.clone()
        return self._late_copy(self.inner.start_all_reduce(scratch, divide_by), scratch, full)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        self.inner.broadcast(full, source)

    def _late_copy(
        self, pending: Pending, result: Tensor, out: Tensor, *, accumulate: bool = False, is_poisoned: bool = True
    ) -> Pending:
        if is_poisoned:
            out.fill_(torch.nan)
        is_late = self._chance.random() < self._late

        def finish() -> None:
            pending.wait()
            if not out.untyped_storage().nbytes():  # given up meanwhile: nobody waited
                return
            _ = out.add_(result) if accumulate else out.copy_(result)

        late = Pending(finish)
        # What is added up is added in the wait, in the order of waits: only what is written may be there sooner.
        if not is_late and not accumulate and pending.is_done:
            late.wait()
        return late


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@contextlib.contextmanager
def late_exchanges(seed: int) -> Iterator[None]:
    """In the block every new exchange between ranks is late."""

    def make(group: Any, device: torch.device, **options: bool) -> Any:
        inner = make_exchange(group, device, **options)
        return LateExchange(inner, seed) if inner.world_size > 1 else inner

    with mock.patch("deepspeed.mesh.mesh.make_exchange", make):
        yield


Around = Callable[[], contextlib.AbstractContextManager[Any]]


def run_late(rank: int, world_size: int, case: str, seeds: list[int | None], around: Around | None = None) -> list[Run]:
    """A case or a scene under each of the seeds (None: in order); `around` makes a context to run it in."""
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, (around or contextlib.nullcontext)():
            if device_of(case) == "cpu":
                with late_exchanges(seed) if seed is not None else contextlib.nullcontext():
                    runs.append(_run(rank, world_size, case, folder))
                continue
            sim.reset(seed)
            try:
                runs.append(_run(rank, world_size, case, folder))
                sim.check()
            finally:
                sim.reset()
    return runs


def _run(rank: int, world_size: int, case: str, folder: str) -> Run:
    if case in SCENES:
        return Run(weights=SCENES[case]())
    if case in SPLIT:
        run, stage, _ = SPLIT[case]
        losses, weights = run(rank, world_size, stage)
        return Run(losses=losses, weights=weights)
    _, stage, optimizer, param, zero = CASES[case]
    config = config_of(stage, zero={**tier_section(optimizer, param, Path(folder)), **zero})
    return train(rank, world_size, "gpt_tied", config, num_steps=3)


def differences(run: Run, expected: Run) -> list[str]:
    """What differs, by name."""
    found = [name for name in ("losses", "grad_norms") if getattr(run, name) != getattr(expected, name)]
    return found + [name for name, value in expected.weights.items() if not torch.equal(run.weights[name], value)]


def check_case(case: str, seeds: list[int]) -> None:
    """Raise AssertionError where a seed gives other numbers than time in order."""
    timeout = 60 + 20 * len(seeds)
    expected, *runs = run_ranks(
        ranks_of(case), run_late, case, [None, *seeds], device=device_of(case), timeout=timeout
    )[0]
    wrong = {seed: found for seed, run in zip(seeds, runs, strict=True) if (found := differences(run, expected))}
    assert wrong == {}, f"{case}: other numbers under seeds {wrong}"


def main() -> None:
    """Every case under every seed, some seeds at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed, for runs in portions")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--cases", nargs="*", default=[*SCENES, *CASES, *SPLIT])
    args = parser.parse_args()
    for case in args.cases:
        last = args.first + args.seeds
        for first in range(args.first, last, 20):
            check_case(case, list(range(first, min(first + 20, last))))
        print(f"{case}: seeds {args.first} to {last - 1}, no difference", flush=True)


if __name__ == "__main__":
    from tests.harness import close_pools

    main()
    close_pools()
