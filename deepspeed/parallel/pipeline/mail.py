"""Values on their way between the ranks of a pipeline: sent without waiting, received in the sender's order.

Used by the executor; one object per rank and engine. Both sides know the whole list of actions, so the order in which one
rank sends to another is known to both, and no message needs a name:

    8 bytes      number of the form, or a failure
    its text     up to 64 bytes, only for a form that this pair of ranks has not used before
    the values   one message per tensor, exactly its bytes

A receiver that asks for a message takes those before it too, and keeps them. A rank that fails says so in place of its next
message to each rank, so that all of a pipeline end with the same words, none waiting.

Invariant: what is sent stays in memory until it has left (`settle`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.parallel.pipeline.actions import Actions, Op
from deepspeed.parallel.pipeline.form import Form, decode, form_of
from deepspeed.parallel.pipeline.layers import PipelineError

FAILED = -1


class Key(NamedTuple):
    """A message: what stage `to` gets for a micro-batch, from the stage before (`is_forward`) or after."""

    to: int
    micro: int
    is_forward: bool


class Parcel(NamedTuple):
    """What arrived."""

    values: list[Tensor | None]
    form: Form


def orders(actions: Actions) -> dict[tuple[int, int], list[Key]]:
    """By (sender, receiver), pipeline ranks, the messages in the order in which they are sent."""
    found: dict[tuple[int, int], list[Key]] = {}
    for sender, row in enumerate(actions.lists):
        for action in row:
            if action.op is Op.WEIGHT:
                continue
            is_forward = action.op is Op.FORWARD
            to = action.stage + 1 if is_forward else action.stage - 1
            if not 0 <= to < actions.num_stages or actions.rank_of[to] == sender:
                continue
            found.setdefault((sender, actions.rank_of[to]), []).append(Key(to, action.micro, is_forward))
    return found


class Mail:
    """The messages of one rank. `ranks[i]` is the global rank of pipeline rank i; `groups`: for activations, for gradients."""

    def __init__(self, ranks: Sequence[int], own: int, groups: tuple[Any, Any], device: torch.device) -> None:
        self._ranks, self._own, self._groups, self._device = ranks, own, groups, device
        self._sent_forms: dict[tuple[int, bool], dict[Form, int]] = {}
        self._seen_forms: dict[tuple[int, bool], list[Form]] = {}
        self._under_way: deque[tuple[Any, Tensor]] = deque()
        self._due: Mapping[tuple[int, int], deque[Key]] = {}
        self._to_send: Mapping[tuple[int, int], deque[Key]] = {}
        self._here: dict[Key, Parcel] = {}
        self._told: dict[Key, PipelineError] = {}
        self._log: dict[tuple[int, bool], list[tuple[int, torch.dtype]]] = {}
        """By receiver and way, the size of every message of the list under way."""
        self._num_taken: dict[tuple[int, bool], int] = {}
        self.bytes_sent = self.control_bytes_sent = 0
        """Since the engine was made: of values; of forms and their numbers."""
        self.waited_s = 0.0
        """Spent in waiting for messages."""

    def begin(self, actions: Actions) -> None:
        """Before a list is run."""
        all_orders = orders(actions)
        self._due = {pair: deque(keys) for pair, keys in all_orders.items() if pair[1] == self._own}
        self._to_send = {pair: deque(keys) for pair, keys in all_orders.items() if pair[0] == self._own}
        self._here.clear()
        self._told.clear()
        self._log.clear()
        self._num_taken.clear()

    # Sending. ------------------------------------------------------------------------------------------------------

    def keep(self, key: Key, values: Sequence[Tensor | None], form: Form) -> None:
        """Hand values to another stage of this rank."""
        self._here[key] = Parcel(list(values), form)

    def send(self, to_rank: int, key: Key, values: Sequence[Tensor | None], is_tuple: bool) -> None:
        """Start to send; the tensors may not be written afterwards. Whether one has a gradient is its `requires_grad`."""
        form = form_of(values, is_tuple)
        if to_rank == self._own:
            # A copy: the other stage may write into its inputs, this one's graph may have saved them.
            self.keep(key, [v.detach().clone() if v is not None else None for v in values], form)
            return
        expected = self._to_send[self._own, to_rank].popleft()
        assert expected == key, f"sends {key} where its list says {expected}"
        known = self._sent_forms.setdefault((to_rank, key.is_forward), {})
        is_new = form not in known
        number = known.setdefault(form, len(known))
        text = form.encode() if is_new else b""
        self._start(to_rank, key, self._header(number, len(text)))
        if is_new:
            self._start(to_rank, key, torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device))
        self.control_bytes_sent += 8 + len(text)
        for value in values:
            if value is not None and value.numel():
                self._start(to_rank, key, value.detach().contiguous())
                self.bytes_sent += value.nbytes
        self._forget_done()

    def _header(self, number: int, size: int) -> Tensor:
        return torch.tensor([number, size], dtype=torch.int32, device=self._device)

    def _start(self, to_rank: int, key: Key, tensor: Tensor) -> None:
        wire = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dim() else tensor
        self._log.setdefault((to_rank, key.is_forward), []).append((wire.numel(), wire.dtype))
        work = dist.isend(wire, self._ranks[to_rank], group=self._groups[not key.is_forward])
        self._under_way.append((work, wire))

    def _forget_done(self) -> None:
        while len(self._under_way) > 64 and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def tell_failure(self, text: str) -> None:
        """Say to all who wait for a message of this rank that none will come, and why."""
        data = text.encode()[:2000]
        for (_, to_rank), keys in self._to_send.items():
            for is_forward in (True, False):
                key = next((key for key in keys if key.is_forward is is_forward), None)
                if key is not None:
                    self._start(to_rank, key, self._header(FAILED, len(data)))
                    self._start(to_rank, key, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device))
            keys.clear()

    # Receiving. ----------------------------------------------------------------------------------------------------

    def receive(self, key: Key, from_rank: int) -> Parcel:
        """The message, waited for. Raises PipelineError where its sender failed."""
        began = time.perf_counter()
        due = self._due.get((from_rank, self._own))
        while key not in self._here:
            if key in self._told:
                raise self._told[key]
            assert due, f"{key} is not among what rank {from_rank} sends"
            arrived = due.popleft()
            parcel = self._take(from_rank, arrived.is_forward)
            if isinstance(parcel, PipelineError):
                for missing in [arrived, *(k for k in due if k.is_forward is arrived.is_forward)]:
                    self._told[missing] = parcel
            else:
                self._here[arrived] = parcel
        self.waited_s += time.perf_counter() - began
        return self._here.pop(key)

    def _take(self, from_rank: int, is_forward: bool) -> Parcel | PipelineError:
        receive = self._receiver(from_rank, is_forward)
        number, size = receive(torch.empty(2, dtype=torch.int32, device=self._device)).tolist()
        text = b""
        if size:
            text = receive(torch.empty(size, dtype=torch.uint8, device=self._device)).cpu().numpy().tobytes()
        if number == FAILED:
            return PipelineError(text.decode(errors="replace"))
        seen = self._seen_forms.setdefault((from_rank, is_forward), [])
        if number == len(seen):
            seen.append(decode(text))
        form = seen[number]
        values: list[Tensor | None] = []
        for value in form.values:
            tensor = None if value.dtype is None else torch.empty(value.shape, dtype=value.dtype, device=self._device)
            if tensor is not None and tensor.numel():
                receive(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dim() else tensor)
            values.append(tensor)
        return Parcel(values, form)

    def _receiver(self, from_rank: int, is_forward: bool) -> Callable[[Tensor], Tensor]:
        source, group = self._ranks[from_rank], self._groups[not is_forward]

        def receive(into: Tensor) -> Tensor:
            self._num_taken[from_rank, is_forward] = self._num_taken.get((from_rank, is_forward), 0) + 1
            dist.recv(into, source, group=group)
            return into

        return receive

    def time_hop(self, rounds: int = 5) -> float:
        """Seconds that the largest message of the last list takes to the next rank of the pipeline, 0 on the last one.
        Collective over the pipeline."""
        sizes = [numel * dtype.itemsize for (_, forward), sent in self._log.items() if forward for numel, dtype in sent]
        ball = torch.empty(max(sizes, default=1), dtype=torch.uint8, device=self._device)
        best = float("inf")
        for first in range(len(self._ranks) - 1):
            if self._own not in (first, first + 1):
                continue
            size = torch.tensor([ball.numel()], dtype=torch.int64, device=self._device)
            other = self._ranks[first + 1 if self._own == first else first]
            if self._own == first:
                dist.send(size, other, group=self._groups[0])
            else:
                dist.recv(size, other, group=self._groups[0])
            thrown = ball if self._own == first else torch.empty(int(size), dtype=torch.uint8, device=self._device)
            for _ in range(rounds):
                began = time.perf_counter()
                for sends in (self._own == first, self._own != first):
                    (dist.send if sends else dist.recv)(thrown, other, group=self._groups[0])
                if self._own == first:
                    best = min(best, (time.perf_counter() - began) / 2)
        return best if best < float("inf") else 0.0

    # After a failure. ----------------------------------------------------------------------------------------------

    @property
    def log(self) -> dict[tuple[int, bool], list[tuple[int, torch.dtype]]]:
        """What this rank has sent since the list began, for `drain` of the others."""
        return self._log

    def drain(self, logs: Sequence[Mapping[tuple[int, bool], list[tuple[int, torch.dtype]]]]) -> None:
        """Take what others have sent and nobody will read, so that the next list begins with nothing on its way. `logs`: of
        all ranks of the pipeline. Collective over them."""
        for from_rank, log in enumerate(logs):
            for is_forward in (True, False):
                messages = log.get((self._own, is_forward), [])
                receive = self._receiver(from_rank, is_forward)
                for numel, dtype in messages[self._num_taken.get((from_rank, is_forward), 0) :]:
                    receive(torch.empty(numel, dtype=dtype, device=self._device))
        self.settle()
        self._sent_forms.clear()
        self._seen_forms.clear()
        self._here.clear()
