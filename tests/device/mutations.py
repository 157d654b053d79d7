"""Waits that are taken away, one at a time: does adversarial time notice each of them?

A *site* is a kind of wait and the function that calls it, found by watching a run (`sites_of`). Kinds are the package's own objects'
methods (KINDS), and what it asks of the device itself: streams that wait, memory recorded on streams, events and streams that the host
waits for (`sim.WAITS`). `without(site)` is a context in which the waits of that site do nothing. What they would have finished is
finished at the end, so that no rank waits for another for ever.

`python -m tests.device.mutations [CASE ...]` takes away every site of the scenes and the training cases, and exits with 1 where one is
noticed in none of them and is not one of REDUNDANT. A site that was noticed is not tried again in later cases.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from deepspeed.comm.exchange import Pending
from deepspeed.comm.local import NOTHING
from deepspeed.tiers import nvme, rest
from tests.device import sim
from tests.device.adversity import CASES, SPLIT, device_of, differences, ranks_of, run_late
from tests.device.group import SimWork
from tests.device.scenes import SCENES
from tests.harness import RanksFailedError, close_pools, run_ranks

OURS = "/deepspeed/"


class Site(NamedTuple):
    """Where something is waited for."""

    kind: str
    caller: str


IN_TESTS = "the test"
"""The caller of waits that are not the package's."""

MIN_CAUGHT = 20
"""Sites that have to be noticed when every case is run, so that an empty search does not pass."""

REDUNDANT: dict[Site, str] = {}
"""Sites that may go unnoticed, with the proof that something else waits. Whatever else is not noticed fails the run."""

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

NO_SITE = (
    "/tests/device/mutations.py",
    "/tests/device/sim.py",
    "/torch/accelerator/__init__.py",
    "/deepspeed/accelerator/",
)
"""Files between who waits and the device."""


def _caller() -> str:
    """The function of the package that waits: what times a wait is passed over."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if OURS in path and "/tests/" not in path and "comm/observe" not in path and "functools" not in path:
            return f"{path.rpartition(OURS)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return IN_TESTS


def _caller_of_device() -> str:
    """The function of the package that asks the device itself; what torch and the simulated collectives ask is not taken away."""
    frame: Any = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in NO_SITE):
        frame = frame.f_back
    if frame is None or OURS not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
        return IN_TESTS
    return f"{frame.f_code.co_filename.rpartition(OURS)[2]}:{frame.f_code.co_name}"


def _is_on_device() -> bool:
    return bool(torch._C._get_privateuse1_backend_name() == sim.NAME)


@contextlib.contextmanager
def watching(found: set[Site]) -> Iterator[None]:
    """Notes the sites at which something is waited for."""

    def note(kind: str) -> bool:
        found.add(Site(kind, _caller_of_device()))
        return False

    with contextlib.ExitStack() as undo:
        if _is_on_device():
            undo.enter_context(sim.skipping(note))
        for kind, (owner, name) in KINDS.items():
            original = getattr(owner, name)

            def wait(self: Any, *args: Any, _kind: str = kind, _original: Callable[..., Any] = original) -> Any:
                is_nothing = getattr(self, "_finish", self) is None or getattr(self, "_event", self) is None
                is_alone = getattr(self, "_work", None) is NOTHING  # one rank: arithmetic, and nothing to wait for
                if not is_nothing and not is_alone:
                    found.add(Site(_kind, _caller()))
                return _original(self, *args)

            undo.enter_context(mock.patch.object(owner, name, wait))
        yield


def _later(waited_for: Any, wait: Callable[[], Any]) -> Callable[[], Any]:
    """What ends a wait that was skipped. A collective's keeps no memory: that would be half of what its wait is for."""
    if not isinstance(waited_for, SimWork):
        return wait
    event = waited_for._event
    return lambda: torch.sim.current_stream().wait_event(event)


@contextlib.contextmanager
def without(site: Site) -> Iterator[None]:
    """In the block nothing is waited for at the site."""
    if site.kind in sim.WAITS:
        with sim.skipping(lambda kind: kind == site.kind and _caller_of_device() == site.caller):
            yield
        return
    owner, name = KINDS[site.kind]
    original = getattr(owner, name)
    skipped: list[Callable[[], Any]] = []

    def wait(self: Any, *args: Any) -> Any:
        if _caller() != site.caller:
            return original(self, *args)
        skipped.append(_later(self, partial(original, self, *args)))
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


def noticed(case: str, site: Site, expected: Any, timeout_s: int = 30) -> str:
    """What tells that the site's waits are missing: an error of a rank, or the numbers that differ; "" for nothing.

    That ranks are late proves nothing on a busy machine: they get three times as long, and then it is told as what it is.
    """
    try:
        run = run_ranks(ranks_of(case), run_without, case, site, device=device_of(case), timeout=timeout_s)[0]
    except RanksFailedError as error:
        told = [e for e in error.rank_exceptions.values() if not isinstance(e, TimeoutError)]
        if told:
            return f"{type(told[0]).__name__}: {told[0]}".partition("\n")[0]
        return noticed(case, site, expected, 3 * timeout_s) if timeout_s < 60 else f"ranks hang for {timeout_s} s"
    return ", ".join(differences(run, expected))


def search(cases: Sequence[str]) -> tuple[dict[Site, str], set[Site]]:
    """What noticed each site, and the sites that nothing noticed."""
    found: dict[Site, str] = {}
    missed: set[Site] = set()
    for case in cases:
        device = device_of(case)
        expected = run_ranks(ranks_of(case), run_late, case, [None], device=device, timeout=120)[0][0]
        sites = set().union(*run_ranks(ranks_of(case), sites_of, case, device=device, timeout=120))
        for site in sorted(site for site in sites - found.keys() if site.caller != IN_TESTS):
            if told := noticed(case, site, expected):
                found[site] = told
            else:
                missed.add(site)
            print(f"{case} | {site.kind} in {site.caller} | {told or 'not noticed here'}", flush=True)
    return found, missed - found.keys()


def main() -> int:
    """The exit status: 1 where a site that should have been noticed was not."""
    cases = sys.argv[1:] or [*SCENES, *CASES, *SPLIT]
    found, missed = search(cases)
    print(f"{len(found)} of {len(found) + len(missed)} waits noticed when taken away")
    for site in sorted(missed):
        print(f"  {site.kind} in {site.caller}: {REDUNDANT.get(site, 'NOT NOTICED in any case')}")
    is_whole = not sys.argv[1:]
    return int(bool(missed - REDUNDANT.keys()) or (is_whole and len(found) < MIN_CAUGHT))


if __name__ == "__main__":
    try:
        status = main()
    finally:
        close_pools()
    sys.exit(status)
