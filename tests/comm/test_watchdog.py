"""A collective that waits: who is missing, what is waited for and where, while the ranks that meet are left alone."""

from __future__ import annotations

import logging
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.comm.watchdog import Place, Watchdog, describe, place_of
from deepspeed.utils.logging import logger
from tests.harness import free_port, run_ranks


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _meet(rank: int, world_size: int, port: int, hangs: bool) -> list[str]:
    """Meet often, then let the last rank be late for one all-reduce, or not."""
    notes = _Notes()
    logger.addHandler(notes)
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None

    def open_store() -> Any:
        client = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        return dist.PrefixStore("watch", client)

    dog = Watchdog(open_store, rank, world_size, timeout_s=60, report_after_s=1.8)
    dist.barrier()
    dog.start()
    until = time.monotonic() + 3
    going = torch.ones(1)
    while going.item():
        dist.all_reduce(torch.ones(1))
        time.sleep(0.001)
        going.fill_(float(time.monotonic() < until))
        dist.broadcast(going, 0)
    before = len(notes.texts)
    if hangs and rank == world_size - 1:
        time.sleep(6)
    dist.all_reduce(torch.ones(1))
    dog.stop()
    dist.barrier()
    logger.removeHandler(notes)
    del server
    assert before == 0, notes.texts
    return notes.texts


def test_the_late_rank_is_named_once_with_the_line_it_is_at() -> None:
    texts = run_ranks(3, _meet, free_port(), True)
    assert [len(lines) for lines in texts] == [1, 0, 0]
    first, waiting, missing = texts[0][0].splitlines()
    assert first.startswith("all_reduce has waited for ") and first.endswith("it fails after 60 s.")
    assert waiting.startswith("  ranks 0, 1 wait in all_reduce at ") and "test_watchdog.py" in waiting
    assert missing.startswith("  rank 2 has not come: it is at ") and missing.endswith(" in _meet")


def test_ranks_that_meet_are_never_reported() -> None:
    assert run_ranks(2, _meet, free_port(), False) == [[], []]


def test_a_report_tells_silence_and_disagreement() -> None:
    waits = {"waits": True, "operation": "all_gather", "site": "b.py:2 in g"}
    told: dict[int, dict[str, Any] | None] = {0: {**waits, "operation": "all_reduce"}, 1: waits, 2: None}
    assert "rank 2 does not answer" in describe(told, "all_reduce", 60, 600)
    both = describe({0: told[0], 1: told[1]}, "all_reduce", 60, 600)
    assert "rank 0 waits in all_reduce" in both and "rank 1 waits in all_gather" in both
    assert both.endswith("all ranks wait: they call different collectives, or a message between two of them is lost")


def test_a_slow_answer_of_the_store_is_waited_for_at_the_end() -> None:
    """A thread that comes back from native code while the interpreter shuts down aborts the process."""
    asked = threading.Event()

    class _Slow:
        def check(self, keys: list[str]) -> bool:
            asked.set()
            time.sleep(2)
            return False

    dog = Watchdog(_Slow, 1, 2, timeout_s=60, report_after_s=0.06)
    dog.start()
    assert asked.wait(20)
    dog.stop()
    assert not dog._asker.is_alive() and not dog._thread.is_alive()


def test_a_place_outside_of_collectives_has_no_operation() -> None:
    frame = sys._current_frames()[threading.get_ident()]
    place = place_of(frame)
    assert place.operation == "" and "test_watchdog.py" in place.site


def test_a_store_that_never_answers_is_told_by_the_rank_that_waits() -> None:
    """Rank 0 keeps the store; when it is stopped (SIGSTOP), a question to it does not even time out."""
    notes, over = _Notes(), threading.Event()

    class _Silent:
        def wait_for_answer(self, *_: object) -> None:
            over.wait(30)

        compare_set = check = set = get = wait_for_answer

    logger.addHandler(notes)
    dog = Watchdog(_Silent, 1, 2, timeout_s=60, report_after_s=0.6)
    dog._longest_wait = lambda now_s: (Place("all_reduce", "train.py:40 in step"), begin_s)  # type: ignore[method-assign]
    begin_s = time.monotonic()
    dog.start()
    while not notes.texts and time.monotonic() < begin_s + 20:
        time.sleep(0.02)
    over.set()
    dog.stop()
    logger.removeHandler(notes)
    [text] = notes.texts
    assert text.splitlines()[1:] == [
        "  rank 1 waits in all_reduce at train.py:40 in step",
        "  rank 0 does not answer: its process or machine is gone, stopped or cut off",
        "  what the other ranks do cannot be asked without it",
    ]
