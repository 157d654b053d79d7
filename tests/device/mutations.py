"""Waits that are taken away, one at a time: does adversarial time notice each of them?

A *site* is a kind of wait and the function that calls it, found by watching a run (`sites_of`). `without(site)` is a context in which the
waits of that site do nothing. What they would have finished is finished at the end, so that no rank waits for another for ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from deepspeed.comm.exchange import Pending
from deepspeed.tiers import nvme, rest
from tests.device.adversity import CASES, differences, run_late
from tests.device.group import SimWork
from tests.harness import RanksFailedError, close_pools, run_ranks

OURS = "/deepspeed/"


class Site(NamedTuple):
    """Where something is waited for."""

    kind: str
    caller: str


KINDS: dict[str, tuple[type, str]] = {
    "Pending.wait": (Pending, "wait"),
    "Work.wait": (SimWork, "wait"),
    "Ordered.wait": (rest.Ordered, "wait"),
    "Copied.wait": (rest.Copied, "wait"),
    "StagedStore.wait": (rest._StagedStore, "wait"),
    "Staged.wait": (rest._Staged, "wait"),
    "Transfer.wait": (nvme.Transfer, "wait"),
}
"""Methods that wait."""


def _caller() -> str:
    """The function of the package that waits: wrappers of the watched exchange are passed over."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if OURS in path and "/tests/" not in path and "comm/observe" not in path and "functools" not in path:
            return f"{path.rpartition(OURS)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the test"


@contextlib.contextmanager
def watching(found: set[Site]) -> Iterator[None]:
    """Notes the sites at which something is waited for."""
    with contextlib.ExitStack() as undo:
        for kind, (owner, name) in KINDS.items():
            original = getattr(owner, name)

            def wait(self: Any, *args: Any, _kind: str = kind, _original: Callable[..., Any] = original) -> Any:
                is_nothing = getattr(self, "_finish", self) is None or getattr(self, "_event", self) is None
                if not is_nothing:
                    found.add(Site(_kind, _caller()))
                return _original(self, *args)

            undo.enter_context(mock.patch.object(owner, name, wait))
        yield


@contextlib.contextmanager
def without(site: Site) -> Iterator[None]:
    """In the block nothing is waited for at the site."""
    owner, name = KINDS[site.kind]
    original = getattr(owner, name)
    skipped: list[Callable[[], Any]] = []

    def wait(self: Any, *args: Any) -> Any:
        if _caller() != site.caller:
            return original(self, *args)
        skipped.append(partial(original, self, *args))
        return None

    with mock.patch.object(owner, name, wait):
        try:
            yield
        finally:
            for late in skipped:
                with contextlib.suppress(RuntimeError):
                    late()


def sites_of(rank: int, world_size: int, case: str) -> set[Site]:
    """The sites of one run in order of time."""
    found: set[Site] = set()
    run_late(rank, world_size, case, [None], partial(watching, found))
    return found


def run_without(rank: int, world_size: int, case: str, site: Site) -> Any:
    """A run, as late as possible, without a site's waits."""
    (run,) = run_late(rank, world_size, case, [0], partial(without, site))
    return run


def noticed(case: str, site: Site, expected: Any) -> str:
    """What tells that the site's waits are missing: the first error of a rank, or the numbers that differ; "" for nothing."""
    try:
        run = run_ranks(2, run_without, case, site, device=CASES[case][0], timeout=30)[0]
    except RanksFailedError as error:
        first = next(iter(error.rank_exceptions.values()))
        return f"{type(first).__name__}: {first}".partition("\n")[0]
    return ", ".join(differences(run, expected))


def main() -> None:
    """Every site of the named cases, and what noticed it."""
    names = sys.argv[1:] or list(CASES)
    total = caught = 0
    for case in names:
        device = CASES[case][0]
        expected = run_ranks(2, run_late, case, [None], device=device)[0][0]
        for site in sorted(set().union(*run_ranks(2, sites_of, case, device=device))):
            found = noticed(case, site, expected)
            total, caught = total + 1, caught + bool(found)
            print(f"{case} | {site.kind} in {site.caller} | {found or 'NOT NOTICED'}", flush=True)
    print(f"{caught} of {total} noticed")


if __name__ == "__main__":
    main()
    close_pools()
