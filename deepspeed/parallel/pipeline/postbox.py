"""One way of messages between two ranks of a pipeline: its end that sends, and its end that receives.

Made by `mail`, which says when. It lasts as long as its groups, through several engines: what is awaited cannot be called off, and
the next engine's messages would end there. A message is

    8 bytes      number of the form, or a failure; size of the text
    its text     up to 64 bytes, only for a form that was not used on this way before
    the values   one message per tensor, exactly its bytes

A receive that is posted before its message comes saves a round trip and the wait for whoever has to answer (on one machine 0.03 ms
instead of 0.64). So the next message's first 8 bytes are always awaited, and where the transport matches receives by a tag, as gloo
does, its values too, into memory of the last message's form, under a tag that is the form's number. If another form comes, that
receive stays for the next message of its own.

NCCL and its kind match receives by their order alone and hold a stream up until the other side answers: there values are received
when the form is known.

Invariant: what is sent stays in memory until it has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.parallel.pipeline.form import Form, decode
from deepspeed.parallel.pipeline.layers import PipelineError

FAILED = -1
MOST_GUESSES = 2
"""Forms for which memory may be waiting: where shapes change all the time, guesses would fill it."""
_HEADER, _TEXT, _VALUES = 1, 3, 5
"""Tags. The first two have one of their own for activations; a form's number is added to the last."""


class Parcel(NamedTuple):
    """What arrived."""

    values: list[Tensor | None]
    form: Form


class Line(NamedTuple):
    """What both ends of a way are made with."""

    peer: int
    """The other end, a global rank."""
    is_forward: bool
    headers: Any
    """The group in which the first 8 bytes and texts go, over the CPU's memory."""
    values: Any
    """The group of the values."""
    device: torch.device

    @property
    def has_tags(self) -> bool:
        """Whether values are matched by tags."""
        return self.device.type == "cpu"


def _on_wire(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.dim() else tensor


# Sending. ------------------------------------------------------------------------------------------------------------


class Outbox:
    """Sends without waiting. On a device, whose works know by themselves when they are through."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._forms: dict[Form, int] = {}
        self._under_way: deque[tuple[int, Any, Tensor]] = deque()
        self._num_before = 0
        self.num_sent = 0
        """Messages so far, a failure among them."""
        self.largest = 0
        """Bytes of the list's largest value."""

    def begin(self) -> None:
        """Before a list."""
        self._num_before, self.largest = self.num_sent, 0

    def send(self, values: Sequence[Tensor | None], form: Form) -> tuple[int, int]:
        """Start to send; the tensors may not be written afterwards. Bytes of the values, and of what announces them."""
        ready = [v.detach().contiguous() for v in values if v is not None and v.numel()]
        is_new = form not in self._forms
        number = self._forms.setdefault(form, len(self._forms))
        self.num_sent += 1
        text = form.encode() if is_new else b""
        self._announce(number, text)
        for value in ready:
            self._start(_on_wire(value), self._line.values, _VALUES + number)
        sizes = [value.nbytes for value in ready]
        self.largest = max([self.largest, *sizes])
        return sum(sizes), 8 + len(text)

    def fail(self, words: str) -> None:
        """Say that no more messages will come, and why."""
        self.num_sent += 1
        self._announce(FAILED, words.encode()[:2000])

    def _announce(self, number: int, text: bytes) -> None:
        line = self._line
        header = torch.tensor([number, len(text)], dtype=torch.int32, device="cpu")
        self._start(header, line.headers, _HEADER + line.is_forward)
        if text:
            said = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._start(said, line.headers, _TEXT + line.is_forward)

    def _start(self, tensor: Tensor, group: Any, tag: int) -> None:
        work = dist.isend(tensor, self._line.peer, group=group, tag=tag)
        self._under_way.append((self.num_sent - self._num_before, work, tensor))

    def forget(self, num_taken: int) -> None:
        """Let go of what has left; the other end has taken `num_taken` of the list's messages."""
        while self._under_way and self._under_way[0][1].is_completed():
            self._under_way.popleft()

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._under_way.popleft()[1].wait()


class TaggedOutbox(Outbox):
    """Over gloo, whose works say that they are through only after they were waited for."""

    def forget(self, num_taken: int) -> None:
        """See Outbox."""
        while self._under_way and self._under_way[0][0] <= num_taken:
            self._under_way.popleft()[1].wait()


# Receiving. ----------------------------------------------------------------------------------------------------------


class Inbox:
    """Takes messages in the order in which they were sent; values when their form is known."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._header: tuple[Any, Tensor] | None = None
        self._forms: list[Form] = []
        self.num_taken = 0
        """Messages so far, a failure among them."""

    def expect(self) -> None:
        """Have the next message's receives under way. Only where one will come."""
        if self._header is None:
            header = torch.empty(2, dtype=torch.int32, device="cpu")
            work = dist.irecv(header, self._line.peer, group=self._line.headers, tag=_HEADER + self._line.is_forward)
            self._header = work, header

    def take(self) -> Parcel | PipelineError:
        """The next message, waited for; the error of its sender that it may be."""
        self.expect()
        assert self._header is not None
        (work, header), self._header = self._header, None
        work.wait()
        self.num_taken += 1
        number, size = header.tolist()
        text = b""
        if size:
            said = torch.empty(size, dtype=torch.uint8, device="cpu")
            dist.recv(said, self._line.peer, group=self._line.headers, tag=_TEXT + self._line.is_forward)
            text = said.numpy().tobytes()
        if number == FAILED:
            return PipelineError(text.decode(errors="replace"))
        if number == len(self._forms):
            self._forms.append(decode(text))
        return Parcel(self._values(number), self._forms[number])

    def _values(self, number: int) -> list[Tensor | None]:
        values, works = self._post(number)
        for work in works:
            work.wait()
        return values

    def _post(self, number: int) -> tuple[list[Tensor | None], list[Any]]:
        """Memory for a message of a form, and the receives into it."""
        line, values, works = self._line, list[Tensor | None](), []
        for value in self._forms[number].values:
            tensor = None if value.dtype is None else torch.empty(value.shape, dtype=value.dtype, device=line.device)
            if tensor is not None and tensor.numel():
                works.append(dist.irecv(_on_wire(tensor), line.peer, group=line.values, tag=_VALUES + number))
            values.append(tensor)
        return values, works


class TaggedInbox(Inbox):
    """Has the next values' receives under way too, for the form that came last."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self._guesses: dict[int, tuple[list[Tensor | None], list[Any]]] = {}
        self._last: int | None = None

    def expect(self) -> None:
        """See Inbox."""
        super().expect()
        if self._last is not None and self._last not in self._guesses and len(self._guesses) < MOST_GUESSES:
            self._guesses[self._last] = self._post(self._last)

    def _values(self, number: int) -> list[Tensor | None]:
        self._last = number
        values, works = self._guesses.pop(number) if number in self._guesses else self._post(number)
        for work in works:
            work.wait()
        return values
