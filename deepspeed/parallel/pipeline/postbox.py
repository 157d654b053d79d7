"""One way of messages between two ranks of a pipeline: its end that sends, and its end that receives.

Made by `mail`, which says when. It lasts as long as its groups, through several engines: what is awaited cannot be called off, and
the next engine's messages would end there. A message is

    8 bytes      number of the form, or a failure; size of the text
    its text     up to 64 bytes, only for a form that was not used on this way before
    the values   one message per tensor, exactly its bytes

Where the transport matches receives by a tag, as gloo does, a message of the last one's form has its first value behind its 8 bytes,
in one piece: a receive may be longer than what comes, so the receiver makes room for both, and a message of another form is 8 bytes there.

A receive that is posted before its message comes saves a round trip and the wait for whoever has to answer (on one machine 0.03 ms
instead of 0.64). So the next message's first 8 bytes are always awaited, and where there are tags its values too, into memory of the
last message's form: the first with the 8 bytes, others under a tag that is the form's number. If another form comes, those receives
stay for the next message of their own.

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

from deepspeed.parallel.pipeline.form import Form, Value, decode
from deepspeed.parallel.pipeline.layers import PipelineError

FAILED = -1
MOST_GUESSES = 2
"""Forms for which memory may be waiting: where shapes change all the time, guesses would fill it."""
_HEADER, _TEXT, _FIRST, _VALUES = 1, 3, 5, 6
"""Tags. The first two have one of their own for activations; a form's number is added to the last. A first value that could have come
with its 8 bytes, but is of another form than the last message, has a tag that nothing awaits ahead."""
MOST_PACKED = 2**20
"""Bytes of a first value that is copied behind its 8 bytes. A copy of more costs what a second message does."""
_HEAD, _ALIGNED = 8, 64
"""Bytes in front of the values; where the first begins in memory."""


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
        self._send(number, text, ready)
        sizes = [value.nbytes for value in ready]
        self.largest = max([self.largest, *sizes])
        return sum(sizes), _HEAD + len(text)

    def _send(self, number: int, text: bytes, ready: Sequence[Tensor]) -> None:
        self._announce(number, text)
        for value in ready:
            self._start(_on_wire(value), self._line.values, _VALUES + number)

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
        self._under_way.append((self.num_sent, work, tensor))

    def forget(self, num_taken: int) -> None:
        """Let go of what has left; the other end has taken `num_taken` of the list's messages, and all of the lists before."""
        while self._under_way and self._under_way[0][1].is_completed():
            self._under_way.popleft()

    def wait_sent(self) -> None:
        """Wait until all that was sent has left. Over gloo it leaves when the other end takes it, so only where it will."""
        while self._under_way:
            self._under_way.popleft()[1].wait()


class TaggedOutbox(Outbox):
    """Over gloo: sends a first value with its 8 bytes. Works say that they are through only after they were waited for."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self._last: int | None = None

    def _send(self, number: int, text: bytes, ready: Sequence[Tensor]) -> None:
        goes_along = bool(ready) and ready[0].nbytes <= MOST_PACKED
        rest = ready[1:] if goes_along else ready
        if not goes_along:
            self._announce(number, text)
        elif number != self._last:
            self._announce(number, text)
            self._start(_on_wire(ready[0]), self._line.values, _FIRST)
        else:
            packed = torch.empty(_HEAD + ready[0].nbytes, dtype=torch.uint8)
            packed[:_HEAD].view(torch.int32).copy_(torch.tensor([number, 0], dtype=torch.int32))
            packed[_HEAD:].copy_(ready[0].reshape(-1).view(torch.uint8))
            self._start(packed, self._line.headers, _HEADER + self._line.is_forward)
        for value in rest:
            self._start(_on_wire(value), self._line.values, _VALUES + number)
        self._last = number

    def forget(self, num_taken: int) -> None:
        """See Outbox."""
        while self._under_way and self._under_way[0][0] <= self._num_before + num_taken:
            self._under_way.popleft()[1].wait()


# Receiving. ----------------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A form that came."""

    form: Form
    goes_along: int | None
    """Which value comes with a message's 8 bytes, where the last message was of this form too."""

    @property
    def room(self) -> int:
        """Bytes of that value."""
        return 0 if self.goes_along is None else self.form.values[self.goes_along].nbytes


def _known(form: Form) -> _Known:
    first = next((i for i, value in enumerate(form.values) if value.nbytes), None)
    return _Known(form, first if first is not None and form.values[first].nbytes <= MOST_PACKED else None)


class Inbox:
    """Takes messages in the order in which they were sent; values when their form is known."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._awaited: tuple[Any, Tensor] | None = None
        """The next message's receive, and its memory: the 8 bytes end at `_ALIGNED`."""
        self._forms: list[_Known] = []
        self.num_taken = 0
        """Messages so far, a failure among them."""

    def expect(self) -> None:
        """Have the next message's receives under way. Only where one will come."""
        if self._awaited is None:
            memory = torch.empty(_ALIGNED + self._room(), dtype=torch.uint8, device="cpu")
            line, header = self._line, memory[_ALIGNED - _HEAD :]
            self._awaited = dist.irecv(header, line.peer, group=line.headers, tag=_HEADER + line.is_forward), memory

    def _room(self) -> int:
        """Bytes that may come behind the first 8."""
        return 0

    def take(self) -> Parcel | PipelineError:
        """The next message, waited for; the error of its sender that it may be."""
        self.expect()
        assert self._awaited is not None
        (work, memory), self._awaited = self._awaited, None
        work.wait()
        self.num_taken += 1
        number, size = memory[_ALIGNED - _HEAD : _ALIGNED].view(torch.int32).tolist()
        text = b""
        if size:
            said = torch.empty(size, dtype=torch.uint8, device="cpu")
            dist.recv(said, self._line.peer, group=self._line.headers, tag=_TEXT + self._line.is_forward)
            text = said.numpy().tobytes()
        if number == FAILED:
            return PipelineError(text.decode(errors="replace"))
        if number == len(self._forms):
            self._forms.append(_known(decode(text)))
        return Parcel(self._values(number, memory), self._forms[number].form)

    def _values(self, number: int, memory: Tensor) -> list[Tensor | None]:
        values, works = self._post(number, None)
        for work in works:
            work.wait()
        return values

    def _post(self, number: int, but: int | None) -> tuple[list[Tensor | None], list[Any]]:
        """Memory for a message of a form, and the receives into it; neither for value `but`."""
        line, values, works = self._line, list[Tensor | None](), []
        for i, value in enumerate(self._forms[number].form.values):
            is_due = value.dtype is not None and i != but
            tensor = torch.empty(value.shape, dtype=value.dtype, device=line.device) if is_due else None
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
            self._guesses[self._last] = self._post(self._last, self._forms[self._last].goes_along)

    def _room(self) -> int:
        return 0 if self._last is None else self._forms[self._last].room

    def _values(self, number: int, memory: Tensor) -> list[Tensor | None]:
        form, at = self._forms[number]
        values, works = self._guesses.pop(number) if number in self._guesses else self._post(number, at)
        if at is not None:
            values[at] = self._first(form.values[at], memory if number == self._last else None)
        self._last = number
        for work in works:
            work.wait()
        return values

    def _first(self, described: Value, memory: Tensor | None) -> Tensor:
        """The first value: where it came with its 8 bytes, in their memory."""
        if memory is None:
            value = torch.empty(described.shape, dtype=described.dtype)
            dist.recv(_on_wire(value), self._line.peer, group=self._line.values, tag=_FIRST)
            return value
        value = torch.empty(0, dtype=described.dtype)
        start = _ALIGNED // value.itemsize
        return value.set_(memory.untyped_storage(), start, described.shape)  # type: ignore[call-overload]
