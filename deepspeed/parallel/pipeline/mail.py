"""Values on their way between the ranks of a pipeline: sent without waiting, awaited ahead, received in the sender's order.

Used by the executor; one object per rank and engine. Stands on `routes`, which knows the order of all messages, and on `postbox`,
which is one way between two ranks.

A receiver that asks for a message takes those of the same way before it too, and keeps them. A rank that fails says so in place of
its next message to each rank, so that all of a pipeline end with the same words, none waiting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.parallel.pipeline.actions import Actions
from deepspeed.parallel.pipeline.form import form_of
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.postbox import Inbox, Line, Outbox, Parcel, TaggedInbox, TaggedOutbox
from deepspeed.parallel.pipeline.routes import Key, Routes, Way, routes_of

Groups = Mapping[tuple[bool, bool], Any]
"""Process groups by (of activations, to a later rank). Where there are no tags each needs its own: a stream that sends
would hold up what comes the other way."""


class Post:
    """One rank's ends of all ways, for as long as the groups last. `ranks[i]` is the global rank of pipeline rank i; `control`: the
    gloo group for a device's first bytes, None where the values' groups are gloo's."""

    def __init__(
        self, ranks: Sequence[int], own: int, groups: Groups, device: torch.device, control: Any = None
    ) -> None:
        self.ranks, self.own, self.groups, self.device, self._control = ranks, own, groups, device, control
        self.inboxes: dict[Way, Inbox] = {}
        self.outboxes: dict[Way, Outbox] = {}

    def inbox(self, way: Way) -> Inbox:
        """Where another rank's messages arrive."""
        if way not in self.inboxes:
            line = self._line(way, way.peer < self.own)
            self.inboxes[way] = TaggedInbox(line) if line.has_tags else Inbox(line)
        return self.inboxes[way]

    def outbox(self, way: Way) -> Outbox:
        """Where messages to another rank leave."""
        if way not in self.outboxes:
            line = self._line(way, way.peer > self.own)
            self.outboxes[way] = TaggedOutbox(line) if line.has_tags else Outbox(line)
        return self.outboxes[way]

    def _line(self, way: Way, is_up: bool) -> Line:
        values = self.groups[way.is_forward, is_up]
        headers = values if self._control is None else self._control
        return Line(self.ranks[way.peer], way.is_forward, headers, values, self.device)


class Mail:
    """The messages of one rank and engine."""

    def __init__(self, post: Post) -> None:
        self._post, self._own = post, post.own
        self._actions: Actions | None = None
        self._routes = Routes({}, {}, {})
        self._due: dict[Way, deque[Key]] = {}
        self._to_send: dict[Way, deque[Key]] = {}
        self._here: dict[Key, Parcel] = {}
        self._told: dict[Key, PipelineError] = {}
        self.waited_s = 0.0
        """Spent in waiting for messages."""
        self.bytes_sent = self.control_bytes_sent = 0
        """Since the engine was made: of values; of forms and their numbers."""

    def begin(self, actions: Actions) -> None:
        """Before a list is run."""
        if actions is not self._actions:
            self._actions, self._routes = actions, routes_of(actions, self._own)
        self._due = {way: deque(keys) for way, keys in self._routes.due.items()}
        self._to_send = {way: deque(keys) for way, keys in self._routes.to_send.items()}
        self._here.clear()
        self._told.clear()
        for outbox in self._post.outboxes.values():
            outbox.begin()
        for way in self._due:
            self._post.inbox(way).expect()

    # Sending. ------------------------------------------------------------------------------------------------------

    def send(self, to_rank: int, key: Key, values: Sequence[Tensor | None], is_tuple: bool) -> None:
        """Start to send; the tensors may not be written afterwards. Whether one has a gradient is its `requires_grad`."""
        form = form_of(values, is_tuple)
        if to_rank == self._own:
            # A copy: the other stage may write into its inputs, this one's graph may have saved them.
            copies = [v.detach().clone() if v is not None else None for v in values]
            self._here[key] = Parcel(copies, form)
            return
        way = Way(to_rank, key.is_forward)
        expected = self._to_send[way].popleft()
        assert expected == key, f"sends {key} where its list says {expected}"
        nbytes, control = self._post.outbox(way).send(values, form)
        self.bytes_sent += nbytes
        self.control_bytes_sent += control

    def wait_sent(self) -> None:
        """Wait until all that was sent has left. Only where all ranks have done their lists, or `drain` it: a rank that has failed
        takes nothing more."""
        for outbox in self._post.outboxes.values():
            outbox.wait_sent()

    def tell_failure(self, text: str) -> None:
        """Say to all who wait for a message of this rank that none will come, and why."""
        for way, keys in self._to_send.items():
            if keys:
                self._post.outbox(way).fail(text)
                keys.clear()

    # Receiving. ----------------------------------------------------------------------------------------------------

    def receive(self, key: Key, from_rank: int) -> Parcel:
        """The message, waited for. Raises PipelineError where its sender failed."""
        began = time.perf_counter()
        way = Way(from_rank, key.is_forward)
        while key not in self._here:
            if key in self._told:
                raise self._told[key]
            self._take(way)
        if from_rank != self._own:
            self._forget(key, from_rank)
        self.waited_s += time.perf_counter() - began
        return self._here.pop(key)

    def _take(self, way: Way) -> None:
        due = self._due.get(way)
        assert due, f"no message is due from rank {way.peer}"
        arrived = due.popleft()
        inbox = self._post.inbox(way)
        parcel = inbox.take()
        if isinstance(parcel, PipelineError):
            self._told.update(dict.fromkeys([arrived, *due], parcel))
            due.clear()
            return
        self._here[arrived] = parcel
        if due:
            inbox.expect()

    def _forget(self, key: Key, from_rank: int) -> None:
        for is_forward, num_taken in zip((False, True), self._routes.taken_before[key], strict=True):
            outbox = self._post.outboxes.get(Way(from_rank, is_forward))
            if outbox is not None:
                outbox.forget(num_taken)

    def time_hop(self, rounds: int = 5) -> float:
        """Seconds that the largest message of the last list takes to the next rank of the pipeline, 0 on the last one.
        Collective over the pipeline."""
        largest = max((outbox.largest for way, outbox in self._post.outboxes.items() if way.is_forward), default=1)
        ball = torch.empty(max(1, largest), dtype=torch.uint8, device=self._post.device)
        group = self._post.groups[True, True]
        best = float("inf")
        for first in range(len(self._post.ranks) - 1):
            if self._own not in (first, first + 1):
                continue
            size = torch.tensor([ball.numel()], dtype=torch.int64, device=self._post.device)
            other = self._post.ranks[first + 1 if self._own == first else first]
            if self._own == first:
                dist.send(size, other, group=group)
            else:
                dist.recv(size, other, group=group)
            thrown = ball if self._own == first else torch.empty(int(size), dtype=torch.uint8, device=self._post.device)
            for _ in range(rounds):
                began = time.perf_counter()
                for sends in (self._own == first, self._own != first):
                    (dist.send if sends else dist.recv)(thrown, other, group=group)
                if self._own == first:
                    best = min(best, (time.perf_counter() - began) / 2)
        return best if best < float("inf") else 0.0

    # After a failure. ----------------------------------------------------------------------------------------------

    @property
    def log(self) -> dict[Way, int]:
        """How many messages this rank has sent each way since the engine was made, for `drain` of the others."""
        return {way: outbox.num_sent for way, outbox in self._post.outboxes.items()}

    def drain(self, logs: Sequence[Mapping[Way, int]]) -> None:
        """Take what others have sent and nobody will read, so that the next list begins with nothing on its way. `logs`: of
        all ranks of the pipeline. Collective over them."""
        for from_rank, log in enumerate(logs):
            for is_forward in (True, False):
                num_sent = log.get(Way(self._own, is_forward), 0)
                while num_sent and self._post.inbox(Way(from_rank, is_forward)).num_taken < num_sent:
                    self._post.inbox(Way(from_rank, is_forward)).take()
        self.wait_sent()
        self._here.clear()
