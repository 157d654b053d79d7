"""Says who is missing while a collective waits: the ranks, the collective and the call site, before the timeout.

Started by `init_distributed` for jobs of several ranks, on every backend. A thread of each rank looks, a few times per
`report_after_s`, whether another thread of its process has been blocked inside a collective ever since the last look.
Only then does it write anything: it raises an alarm in the job's store. All ranks' threads see the alarm, write where
they are, and the lowest waiting rank logs it:

    all_reduce has waited for 60 s; it fails after 600 s.
      ranks 0, 1, 2 wait in all_reduce at train.py:40
      rank 3 has not come: it is at data.py:12 in read

The store is kept by rank 0's process. A question to one that is stopped or cut off is never answered, whatever timeout
the client was given (torch 2.13), so a second thread asks; where it gets no answer, each waiting rank says so itself.

Invariant: no collective is wrapped, counted or timed; training pays one look at the threads' frames and one question to
the store per interval. A blocked thread is one that the kernel has not run in between (its context switches), so ranks
that meet again and again at the same place are not taken for waiting. Who waits and looks around meanwhile says so (`LOOKING_ROUND`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from deepspeed.utils.logging import logger

MAX_REPORT_AFTER_S = 120.0
LOOKS = 6
"""Looks per `report_after_s`."""
MIN_SILENCE_S = 5.0
"""A store that has not answered for less is slow: its process may wait for a processor."""
_SILENCE = "does not answer: its process or machine is gone, stopped or cut off"
LOOKING_ROUND: dict[int, str] = {}
"""Threads that wait, and are woken now and then to see whether there is still what they wait for: a text of what that is, another
for each wait. Written where nothing has come for a while."""
_OWN = str(Path(__file__).resolve().parent)
_PACKAGE = os.path.dirname(_OWN) + os.sep
_TORCH = os.path.join("torch", "distributed")
_ALL_OF_TORCH = os.sep + "torch" + os.sep
_OPERATIONS = (
    *("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier", "gather", "scatter"),
    *("reduce", "send", "recv", "wait"),
)


class Place(NamedTuple):
    """Where a thread is: in which collective ("" if in none), and the line of the caller's code."""

    operation: str
    site: str


def place_of(frame: FrameType | None) -> Place:
    """The collective a stack is in, and the innermost line that is not the communication library's; of a wait inside of this
    package, the script's line."""
    operation = ""
    innermost = frame
    while frame is not None:
        path = frame.f_code.co_filename
        if not (path.startswith(_OWN) or _TORCH in path):
            break
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.11
        known = next((known for known in _OPERATIONS if known in name), "")
        operation = operation if not known or (known == "wait" and operation) else known
        frame = frame.f_back
    if (
        frame is innermost
        and frame is not None
        and ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    ):
        operation = "wait"  # of an asynchronous operation: native code, called from the user's line
    if operation:
        inner = frame
        while frame is not None and (
            frame.f_code.co_filename.startswith(_PACKAGE) or _ALL_OF_TORCH in frame.f_code.co_filename
        ):
            frame = frame.f_back
        frame = frame or inner  # a thread of this package's own
    frame = frame or innermost
    if frame is None:
        return Place(operation, "?")
    return Place(operation, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")


class _Look(NamedTuple):
    """What a look at the process's threads found: where the longest wait is (None: nobody waits), since when, and when."""

    place: Place | None
    since_s: float
    now_s: float

    @property
    def waited_s(self) -> float:
        """How long it has lasted."""
        return self.now_s - self.since_s


def _switches(native_id: int | None) -> str | None:
    """A text that changes whenever the kernel runs the thread; None where it cannot be told."""
    try:
        lines = Path(f"/proc/self/task/{native_id}/status").read_text().splitlines()
    except OSError:
        return None
    return "".join(line for line in lines if "ctxt_switches" in line)


class Watchdog:
    """The looking thread of one rank. `open_store` is called in the thread, so that it has a connection of its own."""

    def __init__(
        self,
        open_store: Callable[[], Any],
        rank: int,
        world_size: int,
        timeout_s: float,
        report_after_s: float | None = None,
        keeper: str = "rank 0",
    ) -> None:
        """`keeper` is whose process has the store, in words."""
        self._open_store = open_store
        self._keeper = keeper
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._after_s = report_after_s or min(MAX_REPORT_AFTER_S, timeout_s / 2)
        self._blocked: dict[int, tuple[str, float]] = {}
        """Thread -> its context switches at the first look that found it blocked, and when that was."""
        self._alarm_s: float | None = None
        self._has_reported = False
        self._has_told_silence = False
        self._seen = _Look(None, 0.0, 0.0)
        self._asked_s: float | None = None
        """When the question to the store that is open now was asked; None if none is."""
        self._has_look = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepspeed-watchdog", daemon=True)
        self._asker = threading.Thread(target=self._ask, name="deepspeed-watchdog-store", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._asker.start()
        self._thread.start()

    def stop(self) -> None:
        """End. The second thread may still be in a question to a store that is silent: an answer while the interpreter
        shuts down would abort the process, so a slow one is waited for."""
        self._ended.set()
        self._has_look.set()
        self._thread.join(1.0)
        self._asker.join(MIN_SILENCE_S)

    def _run(self) -> None:
        while not self._ended.wait(self._after_s / LOOKS):
            now_s = time.monotonic()
            look = _Look(*self._longest_wait(now_s), now_s)
            if self._asked_s is None:
                self._seen, self._asked_s = look, now_s
                self._has_look.set()
            else:
                self._mind_silence(look, self._asked_s)

    def _ask(self) -> None:
        try:
            store = None
            while not self._ended.is_set():
                self._has_look.wait()
                self._has_look.clear()
                if self._asked_s is not None:
                    store = store or self._open_store()
                    self._tell(store, self._seen)
                    self._asked_s = None
        except Exception as error:  # the store ends with rank 0; its question stays open
            logger.debug("the watchdog's store is gone: %s", error)

    def _mind_silence(self, look: _Look, asked_s: float) -> None:
        """Report without the store where it does not answer: every waiting rank, as none can know of the others."""
        if look.place is None:
            self._has_told_silence = False
        elif (
            not self._has_told_silence
            and look.now_s - asked_s >= max(2 * self._after_s / LOOKS, MIN_SILENCE_S)
            and look.waited_s >= self._after_s
        ):
            self._has_told_silence = True
            mine = {self._rank: {"waits": True, "operation": look.place.operation, "site": look.place.site}}
            text = describe(mine, look.place.operation, look.waited_s, self._timeout_s, silent=self._keeper)
            logger.error("%s", text)

    def _tell(self, store: Any, look: _Look) -> None:
        place, now_s = look.place, look.now_s
        waits = place is not None and look.waited_s >= self._after_s * (LOOKS - 2) / LOOKS
        alarm = self._alarm(store, raises=waits)
        if not alarm:
            self._alarm_s, self._has_reported = None, False
            return
        if not waits and alarm.startswith(f"{self._rank}:"):
            store.set("alarm", "")  # ours, and over
            return
        mine = place or place_of(sys._current_frames().get(threading.main_thread().ident or 0))
        text = {"waits": waits, "operation": mine.operation, "site": mine.site}
        store.set(f"{alarm}/{self._rank}", json.dumps(text))
        if not waits:
            return
        self._alarm_s = self._alarm_s or now_s
        if not self._has_reported and now_s - self._alarm_s >= 2 * self._after_s / LOOKS:
            self._has_reported = True
            assert place is not None
            self._report(store, alarm, place, look.waited_s)

    def _alarm(self, store: Any, *, raises: bool) -> str:
        """The alarm that is on, "" if none is; this rank's, if it `raises` one and nobody else has."""
        if raises:
            current = store.compare_set("alarm", "", f"{self._rank}:{time.time():.0f}")
        elif store.check(["alarm"]):
            current = store.get("alarm")
        else:
            return ""
        return current.decode() if isinstance(current, bytes) else str(current)

    def _longest_wait(self, now_s: float) -> tuple[Place | None, float]:
        """The collective in which a thread has been blocked longest, and since when; None if none is."""
        native = {thread.ident: thread.native_id for thread in threading.enumerate()}
        found: dict[int, tuple[str, float]] = {}
        longest: tuple[Place | None, float] = (None, now_s)
        for ident, frame in sys._current_frames().items():
            place = place_of(frame)
            if ident in (self._thread.ident, self._asker.ident) or not place.operation:
                continue
            switches = LOOKING_ROUND.get(ident) or _switches(native.get(ident)) or f"{id(frame)}:{frame.f_lasti}"
            before = self._blocked.get(ident)
            found[ident] = before if before is not None and before[0] == switches else (switches, now_s)
            if found[ident][1] < longest[1]:
                longest = (place, found[ident][1])
        self._blocked = found
        return longest

    def _report(self, store: Any, alarm: str, place: Place, waited_s: float) -> None:
        told: dict[int, dict[str, Any] | None] = {}
        for rank in range(self._world_size):
            key = f"{alarm}/{rank}"
            told[rank] = json.loads(store.get(key)) if store.check([key]) else None
            entry = told[rank]
            if rank < self._rank and entry is not None and entry["waits"]:
                return  # that rank says it
        logger.error(describe(told, place.operation, waited_s, self._timeout_s))


def describe(
    told: Mapping[int, dict[str, Any] | None],
    operation: str,
    waited_s: float,
    timeout_s: float,
    *,
    silent: str | None = None,
) -> str:
    """The report: who waits where, who has not come and where it is instead, who does not answer.

    `silent` is who keeps the store, where that does not answer: then `told` has this rank alone.
    """
    waiting: dict[tuple[str, str], list[int]] = {}
    lines = [f"{operation} has waited for {waited_s:.0f} s; it fails after {timeout_s:.0f} s."]
    missing = []
    for rank, entry in told.items():
        if entry is None:
            missing.append(f"  rank {rank} {_SILENCE}, or native code holds its interpreter's lock")
        elif entry["waits"]:
            waiting.setdefault((entry["operation"], entry["site"]), []).append(rank)
        else:
            missing.append(f"  rank {rank} has not come: it is at {entry['site']}")
    lines += [f"  {_ranks(ranks)} in {name} at {site}" for (name, site), ranks in waiting.items()]
    if silent is not None:
        missing = [f"  {silent} {_SILENCE}"]
        missing += ["  what the other ranks do cannot be asked without it"]
    elif not missing:
        missing = ["  all ranks wait: they call different collectives, or a message between two of them is lost"]
    return "\n".join([*lines, *missing])


def _ranks(ranks: Iterable[int]) -> str:
    listed = [str(rank) for rank in ranks]
    return f"rank {listed[0]} waits" if len(listed) == 1 else f"ranks {', '.join(listed)} wait"


class _Running:
    """The watchdog of this process's default group."""

    current: Watchdog | None = None


def opens_store(master_addr: str, master_port: int, prefix: str) -> Callable[[], Any]:
    """What opens a connection of its own to the store at which the ranks met."""

    def open_store() -> Any:
        import torch.distributed as dist

        store = dist.TCPStore(master_addr, master_port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"{prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    return open_store


def watch(master_addr: str, master_port: int, rank: int, world_size: int, timeout_s: float) -> None:
    """Start this process's watchdog; the store is the one at which the ranks met."""

    open_store = opens_store(master_addr, master_port, "deepspeed_watchdog")
    unwatch()
    # A thread that is inside native code while the interpreter shuts down aborts the process: "terminate called".
    atexit.unregister(unwatch)
    atexit.register(unwatch)
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = f"torchrun's agent at {master_addr}:{master_port}" if is_agents else "rank 0"
    _Running.current = Watchdog(open_store, rank, world_size, timeout_s, keeper=keeper)
    _Running.current.start()


def unwatch() -> None:
    """Stop it, if it runs."""
    running, _Running.current = _Running.current, None
    if running is not None:
        with contextlib.suppress(RuntimeError):
            running.stop()
