"""A collective that waits: who is missing, what is waited for and where, while the ranks that meet are left alone."""

from __future__ import annotations

import logging
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed import comm
from deepspeed.comm.choose import Sharing, make_exchange, timeout_of
from deepspeed.comm.watchdog import Place, Watchdog, describe, place_of
from deepspeed.mesh.mesh import Mesh
from deepspeed.mesh.script import ScriptGroups
from deepspeed.mesh.shape import MeshShape
from deepspeed.utils.logging import logger
from tests.harness import end_group, free_port, run_ranks


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _meet(rank: int, world_size: int, port: int, hangs: bool, in_memory: bool = False) -> list[str]:
    """Meet often, then let the last rank be late for one all-reduce, or not; `in_memory`, by the exchange of one host."""
    notes = _Notes()
    logger.addHandler(notes)
    exchange = make_exchange(dist.group.WORLD, torch.device("cpu"), sharing=Sharing.ALWAYS) if in_memory else None

    def meet() -> None:
        if exchange is None:
            dist.all_reduce(torch.ones(1))
        else:
            exchange.start_all_reduce(torch.ones(world_size), 1).wait()

    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None

    def open_store() -> Any:
        client = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        return dist.PrefixStore("watch", client)

    dog = Watchdog(open_store, rank, world_size, timeout_s=60, report_after_s=1.8)
    dist.barrier()
    meet()  # what is made at first use is made
    dog.start()
    until = time.monotonic() + 3
    going = torch.ones(1)
    while going.item():
        meet()
        time.sleep(0.001)
        going.fill_(float(time.monotonic() < until))
        dist.broadcast(going, 0)
    before = len(notes.texts)
    if hangs and rank == world_size - 1:
        time.sleep(6)
    meet()
    dog.stop()
    dist.barrier()
    logger.removeHandler(notes)
    del server
    assert before == 0, notes.texts
    return notes.texts


@pytest.mark.quick("True")
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_late_rank_is_named_once_with_the_line_it_is_at(in_memory: bool) -> None:
    texts = run_ranks(3, _meet, free_port(), True, in_memory)
    assert [len(lines) for lines in texts] == [1, 0, 0]
    first, waiting, missing = texts[0][0].splitlines()
    assert first.startswith("all_reduce has waited for ") and first.endswith("it fails after 60 s.")
    assert waiting.startswith("  ranks 0, 1 wait in all_reduce at ") and "test_watchdog.py" in waiting
    assert missing.startswith("  rank 2 has not come: it is at ") and missing.endswith(" in _meet")


def _timeouts(rank: int, world_size: int) -> list[timedelta]:
    assert dist.group.WORLD is not None
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    before, options._timeout = options._timeout, timedelta(seconds=77)
    mesh = Mesh(MeshShape(dp_shard=world_size), rank)
    groups = [mesh.group("batch", "gather"), ScriptGroups().make("halves", [[0], [1]]).group, comm.new_group([0, 1])]
    options._timeout = before
    found = [timeout_of(group) for group in groups]
    for group in groups[1:]:
        end_group(group)
    return found


def test_groups_wait_as_long_as_the_job_s() -> None:
    assert run_ranks(2, _timeouts) == [[timedelta(seconds=77)] * 3] * 2


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
