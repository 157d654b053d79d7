"""A rank that fails inside of a call of the engine tells the others, who would wait for it in a collective until the timeout.

Asked for by `tensor` for an engine whose layers are cut, by `experts` for one whose experts are spread; there is one for each group of ranks, whoever uses it.
Entered while the engine is made, around each forward and generate of it, and of its module (`attend`, also for `served`); what they send is waited for by `wait`. A rank that fails writes into the job's store in which call it was, after how many collectives, and with what error, and raises. Who
waits longer than `LOOK` reads there: a rank that left this call before the collective that is waited for will not come.

    rank 1   call 7   collectives 1 2 3, IndexError             raises it, writes (7, 3, "IndexError ...")
    rank 0   call 7   collectives 1 2 3 4 ...                   waits in 4, reads that, raises a DeepSpeedError with those words

At its next call a rank that failed asks the others where they are: all failed at one place (a bad prompt), or none waits, and all go on;
else the collective that some wait in is left with its group, and all make another.

Invariant: a call that succeeds asks nobody, and writes nothing. Over gloo alone: elsewhere waiting does not stop the host.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.comm.choose import timeout_of
from deepspeed.comm.watchdog import LOOKING_ROUND
from deepspeed.utils.errors import DeepSpeedError

LOOK = timedelta(seconds=0.5)
"""Between looks, of a rank that waits in a collective."""
PATIENCE_S = 60.0
"""How long a rank that failed waits at its next call for word of the others."""


class Waiting(Protocol):
    """Ranks that wait for each other in the collectives of one group."""

    group: Any
    rank: int
    size: int
    wait_for: Callable[[Any], None] | None
    """Waits for a collective in another way than by its own `wait`, if anybody knows one."""


@contextlib.contextmanager
def asking(module: Any, any_rank: Callable[[bool, Any], bool]) -> Iterator[None]:
    """Inside, Hugging Face's question before each token, whether any rank goes on, is put by `any_rank(own answer, device)`."""
    models = [m for m in module.modules() if hasattr(type(m), _QUESTION)] if isinstance(module, nn.Module) else []

    def is_unfinished(own: Callable[..., bool], is_finished: bool, synced_gpus: bool, device: Any) -> bool:
        return own(not any_rank(not is_finished, device) if synced_gpus else is_finished, False, device)

    for model in models:
        model.__dict__[_QUESTION] = functools.partial(is_unfinished, getattr(model, _QUESTION))
    try:
        yield
    finally:
        for model in models:
            model.__dict__.pop(_QUESTION, None)


_QUESTION = "_has_unfinished_sequences"
"""A method of Transformers' models that generate."""


def attend(module: nn.Module, around: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[], None]:
    """Have calls of an engine's module itself be inside of `around()`; what is returned ends that. Copies of it are not attended."""
    called, inner = weakref.ref(module), module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        own = inner or called()._call_impl  # type: ignore[union-attr]
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        with around():
            return own(*args, **kwargs)

    def end() -> None:
        module = called()
        if module is not None and module._compiled_call_impl is call:
            module._compiled_call_impl = inner

    module._compiled_call_impl = call  # which nn.Module calls in the place of its own, and leaves out of copies
    return end


class _Word(NamedTuple):
    """What a rank has written of itself."""

    call: int
    has_failed: bool
    num_launched: int
    error: str
    """Of the last call that failed."""


class Calls:
    """One rank's calls of all engines over a group: what one left in it, the next has to know. Made on all ranks."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group, self._rank, self._size = group, rank, size
        self._users: list[tuple[Waiting, Callable[[Any, Any], None]]] = []
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, group=group, group_src=0)
        self._name, self._num_groups = name[0], 0
        self._store = dist.PrefixStore(f"deepspeed/calls/{self._name}", dist.distributed_c10d._get_default_store())
        self._depth = self._call = self._num_launched = self._at_start = 0
        self._has_failed = False
        self._error = ""

    @property
    def group(self) -> Any:
        """The one of now."""
        return self._group

    def join(self, ranks: Waiting, replace: Callable[[Any, Any], None]) -> None:
        """An engine more; `replace` is told of the group that takes another's place."""
        ranks.group, ranks.wait_for = self._group, self.wait
        self._users.append((ranks, replace))

    def __enter__(self) -> Calls:
        self._depth += 1
        if self._depth > 1:
            return self
        self._call += 1
        self._at_start = self._num_launched
        if self._has_failed:
            try:
                self._meet()
            except BaseException:
                self._depth = 0
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if error is None or self._depth:
            return
        self._has_failed, self._error = True, f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store ends with the process that keeps it
            self._write(has_failed=True, num_launched=self._num_launched)

    def wait(self, work: Any) -> None:
        """Wait for a collective. Raises DeepSpeedError where a rank will not come."""
        if not self._depth:
            work.wait()
            return
        self._num_launched += 1
        try:
            while True:
                try:
                    work.wait(LOOK)
                    return
                except RuntimeError as error:  # over gloo, a time that is over too
                    is_over = work.is_completed()
                    self._look(error)
                    if is_over:
                        work.wait()  # raises what it was, if it did not end just now
                        return
                    LOOKING_ROUND[threading.get_ident()] = f"collective {self._num_launched} of {id(self)}"
        finally:
            LOOKING_ROUND.pop(threading.get_ident(), None)

    def _look(self, error: RuntimeError) -> None:
        for rank, told in self._others():
            if told is None:
                continue
            if (told.call, told.has_failed) > (self._call, False) and told.num_launched < self._num_launched:
                raise DeepSpeedError(
                    f"[rank {rank} of {self._size}] {told.error}\n"
                    "  It left the call that this rank was in, which ends here. The next call begins anew on all ranks."
                ) from error
            if told.call == self._call and not told.has_failed:
                # It failed before, and asks where this one is.
                self._write(has_failed=False, num_launched=self._at_start)

    def _meet(self) -> None:
        """After an error here: learn where the others are, and make another group where some wait in this one."""
        self._write(has_failed=False, num_launched=self._num_launched)
        until_s = time.monotonic() + PATIENCE_S
        while any(told is None or told.call < self._call for _, told in self._others()):
            if time.monotonic() > until_s:
                raise DeepSpeedError(
                    f"[rank {self._rank} of {self._size}] an earlier call failed here ({self._error}), and not all ranks "
                    f"have made another within {PATIENCE_S:.0f} s.\n  Every rank has to make the same calls of the engine."
                )
            time.sleep(0.01)
        self._has_failed = False
        if any(told is not None and told.num_launched != self._num_launched for _, told in self._others()):
            before = self._group
            self._num_groups += 1
            # The other stays: what is left in it is waited for where it ends.
            after = _another_group(before, f"{self._name}.{self._num_groups}")
            self._group = after
            self._num_launched = self._at_start = 0
            for ranks, replace in self._users:
                ranks.group = after
                replace(before, after)

    def _write(self, *, has_failed: bool, num_launched: int) -> None:
        word = _Word(self._call, has_failed, num_launched, self._error)
        self._store.set(str(self._rank), json.dumps(word))

    def _others(self) -> Iterator[tuple[int, _Word | None]]:
        """The other ranks, and what they have written last."""
        for rank in range(self._size):
            if rank != self._rank:
                key = str(rank)
                yield rank, _Word(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def leave(self, ranks: Waiting) -> None:
        """An engine is done."""
        ranks.wait_for = None
        self._users = [user for user in self._users if user[0] is not ranks]


def _another_group(before: Any, name: str) -> Any:
    """A group of the same ranks, made by them alone. Torch (2.13) names such a group by how many the process has, which differs between
    ranks that are in different groups, and comes again after one was destroyed."""
    core: Any = dist.distributed_c10d
    members = dist.get_process_group_ranks(before)
    desc = before.group_desc if before.group_desc != "undefined" else "given.tensor"
    own, core._process_group_name = core._process_group_name, lambda ranks, use_hashed_name: name
    try:
        return dist.new_group(members, timeout_of(before), "gloo", use_local_synchronization=True, group_desc=desc)
    finally:
        core._process_group_name = own


_known: list[tuple[Any, Calls]] = []
"""The groups that engines were given, and their calls: what was sent in one is counted once, whosever group it is, and as long as it lives."""


def calls_of(ranks: Waiting, replace: Callable[[Any, Any], None]) -> Calls | None:
    """Those over a group, which `ranks` join; None where waiting does not stop the host. Collective at first use of the group."""
    if dist.get_backend(ranks.group) != "gloo":
        return None
    living = dist.distributed_c10d._world.pg_map
    _known[:] = [(given, calls) for given, calls in _known if given in living]
    found = next((calls for given, calls in _known if ranks.group in (given, calls.group)), None)
    if found is None:
        found = Calls(ranks.group, ranks.rank, ranks.size)
        _known.append((ranks.group, found))
    found.join(ranks, replace)
    return found


def tell_all(ranks: Waiting, value: Any, device: str) -> list[Any]:
    """A small picklable value of every rank, in rank order, waited for as the group's collectives are. Collective."""

    def gathered(own: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(own) for _ in range(ranks.size)]
        work = dist.all_gather(parts, own, group=ranks.group, async_op=True)
        work.wait() if ranks.wait_for is None else ranks.wait_for(work)
        return [part.cpu() for part in parts]

    saved = pickle.dumps(value)
    lengths = [int(each) for each in gathered(torch.tensor([len(saved)], device=device))]
    sent = torch.zeros(max(lengths), dtype=torch.uint8)
    sent[: len(saved)] = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
    every = gathered(sent.to(device))
    return [pickle.loads(part[:length].numpy().tobytes()) for part, length in zip(every, lengths, strict=True)]
