"""A rank that fails inside of a call over sharded weights goes on with the others until they know.

Made by the engine where several ranks share weights at ZeRO stage 3; entered around each forward and generation, and each call of its modules. A forward takes every rank there: nobody can leave
a gather that the others wait in. So a rank that fails writes that to the job's store and takes part in what the others are in, the gathers of
a forward (its own one too, by `zero.hooks`) or the question whether all are done, which ends with the news on all of them.

    rank 1   call 7   forwards 1 2 3, IndexError    ends forward 3 with the others, as one that has left; writes it; raises its error
    rank 0   call 7   forwards 1 2 3                is told at its end, and raises a DeepSpeedError with those words

Where the others are, if that is elsewhere, says a thread that each rank has in a call: twice a second it looks whether anybody has failed, and only then
writes at which forward and which question its rank is. One that waits cannot say so itself.

Invariant: ranks have begun equally many forwards and questions when they leave a call, so that the next one begins in step.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.interrupts import HELD
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import logger
from deepspeed.zero.gather import PhaseKind, RankLeftError
from deepspeed.zero.hooks import ModuleHooks, abandon

LOOK_S = 0.5
"""Between looks whether anybody has failed."""
TELL_S = 0.02
"""Between words of where a rank is, once somebody has."""
UNHEARD_S = 15.0
"""After so long without a word a rank is done, or has not begun."""
PATIENCE_S = 60.0
"""How long a rank that failed goes on with the others."""


class _Place(NamedTuple):
    """Where a rank is in its call."""

    forwards: list[tuple[int, str]]
    """Of each module, how many have begun, and the name of what runs the last one."""
    num_questions: int


class Served:
    """One engine's calls on one rank; `hooks` are those of its modules whose weights are shared. Made on all ranks of the job."""

    def __init__(self, hooks: Sequence[ModuleHooks]) -> None:
        self._hooks = hooks
        for each in hooks:
            each.tells_errors = True
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        self._store = dist.PrefixStore(f"deepspeed/served/{name[0]}", dist.distributed_c10d._get_default_store())
        self._call = self._num_questions = 0
        self._at_start = [0] * len(hooks)
        self._is_inside = self._was_told = False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a forward or a generation, on all ranks. Raises DeepSpeedError where another one failed."""
        if self._is_inside:
            yield
            return
        self._call += 1
        self._num_questions = 0
        self._at_start = [each.gatherer.num_phases for each in self._hooks]
        self._is_inside, self._was_told = True, False
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(stop,), name="deepspeed-served", daemon=True)
        thread.start()
        try:
            yield
        except RankLeftError as error:
            self._set(f"left/{self._rank}", "")
            rank, words = json.loads(self._store.get(self._key("failed")))
            raise DeepSpeedError(
                f"[rank {rank} of {self._size}] {words}\n"
                "  It left the call that this rank was in, which ends here. The next call begins anew on all ranks."
            ) from error
        except BaseException as error:
            self._set(f"left/{self._rank}", "")
            self._set("failed", json.dumps([self._rank, f"{type(error).__name__}: {error}"]))
            self._go_on()
            raise
        finally:
            self._is_inside = False
            stop.set()
            thread.join()
            if self._was_told:
                self._set(f"left/{self._rank}", "")

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a call of one of the modules: as `call`, with an end at which Ctrl-C is heeded, on all ranks. One that left a gather
        for it could not come back to those that wait there."""
        with self.call(), HELD:
            yield

    def any(self, is_so: bool, device: torch.device, *, has_left: bool = False) -> bool:
        """Whether it is so on any rank. Raises RankLeftError where one has left. Collective."""
        self._num_questions += 1
        counts = torch.tensor([float(is_so), float(has_left)], device=device)
        dist.all_reduce(counts)
        any_is, any_left = counts.tolist()
        if any_left:
            raise RankLeftError("a rank has left the call; see its error.")
        return bool(any_is)

    def _go_on(self) -> None:
        """Take part in what the others are in, until none needs this rank."""
        for each in self._hooks:
            abandon(each)
        others = set(range(self._size)) - {self._rank}
        heard: set[int] = set()
        begun_s = time.monotonic()
        while others:
            waited_s = time.monotonic() - begun_s
            others = {rank for rank in others if not self._has(f"left/{rank}")}
            if waited_s > UNHEARD_S:
                others &= heard
            if waited_s > PATIENCE_S:
                logger.warning("ranks %s are still in the call that failed here.", sorted(others))
                return
            for rank in others:
                if self._has(f"at/{rank}"):
                    heard.add(rank)
                    self._join(_Place(*json.loads(self._store.get(self._key(f"at/{rank}")))))
            time.sleep(TELL_S)

    def _join(self, there: _Place) -> None:
        """Take part in a forward or a question that another rank has begun and this one has not."""
        here = self._place()
        with contextlib.suppress(RankLeftError):
            for each, (num_theirs, name), (num_own, _) in zip(self._hooks, there.forwards, here.forwards, strict=True):
                if num_theirs > num_own:
                    each.gatherer.begin(PhaseKind.INFERENCE, name)
                    each.gatherer.end(has_left=True)
            if there.num_questions > here.num_questions:
                self.any(False, torch.device(get_accelerator().current_device_name()), has_left=True)

    def _look(self, stop: threading.Event) -> None:
        """The thread."""
        with contextlib.suppress(RuntimeError):  # the store ends with the process that keeps it
            while not stop.wait(TELL_S if self._was_told else LOOK_S):
                if self._was_told or self._has("failed"):
                    self._was_told = True
                    self._set(f"at/{self._rank}", json.dumps(self._place()))

    def _place(self) -> _Place:
        begun = zip((each.gatherer for each in self._hooks), self._at_start, strict=True)
        return _Place([(g.num_phases - before, g.phase_name) for g, before in begun], self._num_questions)

    def _key(self, name: str) -> str:
        return f"{self._call}/{name}"

    def _set(self, name: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(self._key(name), value)

    def _has(self, name: str) -> bool:
        return bool(self._store.check([self._key(name)]))
