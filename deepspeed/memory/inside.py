"""What the layers of a block send to the ranks that share them, read off traced parts of short models. No ranks.

Called by `memory.shape` for the planner, which multiplies by blocks, samples and micro-batches. The layers are the engine's own, cut by
its own rules; each says what it would send while it is traced (`comm.recorder.Current.predicted`).

Invariant: block by block and end by end, sums are those of the whole model (`tests/planner/test_counts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from deepspeed.activation.blocks import Recompute, find_blocks
from deepspeed.config import Config, load_config
from deepspeed.memory.estimator import as_call, prepare_part
from deepspeed.memory.experts import learned
from deepspeed.memory.messages import summed
from deepspeed.memory.parts import Attention, noting_attention
from deepspeed.memory.trace import Trace, What, trace_step
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError

ALL_REDUCE, COUNTS = "tensor.all_reduce", "moe.counts"
REFUSALS = (DeepSpeedConfigError, NotAvailableError)
"""What the engine raises for a model or a configuration that it does not run."""
Sent = Mapping[str, Sequence[float]]
"""(messages, bytes of a sample) by operation."""


class Way(NamedTuple):
    """Over how many ranks layers are cut, and experts spread."""

    tp: int = 1
    ep: int = 1

    def name(self, recompute: bool = False) -> str:
        """As a key of JSON, with blocks recomputed or not."""
        return f"cut {self.tp}, spread {self.ep}{', recomputed' if recompute else ''}"

    @property
    def words(self) -> str:
        """As a layout's name has it."""
        return " ".join(f"{dim}{size}" for dim, size in zip(self._fields, self, strict=True) if size > 1) or "one rank"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Of one micro-batch of one sample, forward and backward, where nobody shares sequences."""

    first: Sent = field(default_factory=dict)
    """Before the blocks."""
    block: Sent = field(default_factory=dict)
    fixed: Sent = field(default_factory=dict)
    """Of a block, however many samples there are: gradients of what is whole on each rank, numbers of tokens."""
    last: Sent = field(default_factory=dict)
    """Behind them."""
    attends: Sequence[Sequence[Any]] = ()
    """Attentions of a block: (an `Attends`, whether a ring may compute it)."""
    num_again: int = 0
    """Of these, how many run again in backward."""


def inside_of(
    shorten: Callable[[int], nn.Module], batch: Any, sizes: tuple[int, int], dtype: torch.dtype, way: Way, samples: int
) -> dict[str, Inside]:
    """By name, with blocks that keep their activations and with blocks that recompute them.

    shorten: gives the model with so many blocks; sizes: of those that are traced. Raises what the engine raises for a model that it
    cannot cut so.
    """
    settings: dict[str, Any] = {"tensor_parallel": {"autotp_size": way.tp}}
    if way.ep > 1:
        settings["expert_parallel"] = {"enabled": True, "autoep_size": way.ep}
    config = load_config({"train_micro_batch_size_per_gpu": 1, **settings})

    def traced(size: int, recompute: Recompute = Recompute.NONE) -> _Traced:
        return _traced(shorten(size), batch, config, dtype, recompute)

    low, high, again = traced(sizes[0]), traced(sizes[1]), traced(sizes[0], Recompute.FULL)
    more = sizes[1] - sizes[0]
    block = high.all.minus(low.all).over(more)
    attends = low.attends[: (len(high.attends) - len(low.attends)) // more]
    kept = Inside(
        first=low.all.minus(block.over(1 / sizes[0])).minus(low.last).of_sample(samples),
        block=block.of_sample(samples),
        fixed=high.fixed.minus(low.fixed).over(more),
        last=low.last.of_sample(samples),
        attends=[(each.at._replace(samples=1), each.rings) for each in attends],
    )
    recomputed = replace(
        kept,
        block=block.plus(again.all.minus(low.all).over(sizes[0])).of_sample(samples),
        fixed=high.fixed.minus(low.fixed).over(more).plus(again.fixed.minus(low.fixed).over(sizes[0])),
        num_again=(len(again.attends) - len(low.attends)) // sizes[0],
    )
    return {way.name(): kept, way.name(True): recomputed}


class _Counts(dict[str, tuple[float, float]]):
    """(messages, bytes) by operation."""

    @classmethod
    def of(cls, messages: Iterable[tuple[str, int]]) -> _Counts:
        return cls({op: (float(sent.calls), float(sent.nbytes)) for op, sent in summed(messages).items()})

    def plus(self, other: _Counts) -> _Counts:
        none = (0.0, 0.0)
        found = {
            op: [a + b for a, b in zip(self.get(op, none), other.get(op, none), strict=True)] for op in (*self, *other)
        }
        return _Counts({op: (calls, nbytes) for op, (calls, nbytes) in found.items() if calls})

    def over(self, number: float) -> _Counts:
        return _Counts({op: (calls / number, nbytes / number) for op, (calls, nbytes) in self.items()})

    def minus(self, other: _Counts) -> _Counts:
        return self.plus(other.over(-1))

    def of_sample(self, samples: int) -> dict[str, tuple[float, float]]:
        return {op: (calls, nbytes / samples) for op, (calls, nbytes) in self.items()}


@dataclass(frozen=True)
class _Traced:
    all: _Counts
    """Without those that are fixed."""
    fixed: _Counts
    last: _Counts
    attends: list[Attention]


def _traced(model: nn.Module, batch: Any, config: Config, dtype: torch.dtype, recompute: Recompute) -> _Traced:
    blocks = learned(model, config)
    attends: list[Attention] = []
    args, kwargs = as_call(batch)
    summed_params: list[nn.Parameter] = []

    def prepare(part: nn.Module) -> None:
        prepare_part(config, blocks, part)
        summed_params.extend(param for param in part.parameters() if param._backward_hooks)

    with noting_attention(attends):
        trace = trace_step(
            model,
            args,
            kwargs,
            dtype=dtype,
            device_type="cuda",
            plan=recompute,
            prepare=prepare,
        )
    sizes = [(each.op, each.nbytes) for each in trace.messages if each.op == COUNTS]
    fixed = _Counts.of([*sizes, *((ALL_REDUCE, param.nbytes) for param in summed_params)])
    all_sent = _Counts.of((each.op, each.nbytes) for each in trace.messages)
    return _Traced(all_sent.minus(fixed), fixed, _Counts.of(_behind(trace)), attends)


def _behind(trace: Trace) -> Iterable[tuple[str, int]]:
    """What is sent behind the last block in forward, and before its gradient in backward."""
    blocks = find_blocks(trace.model)
    number = next(i for i, module in enumerate(trace.modules) if module is blocks[-1])
    events = trace.events
    backward = next(i for i, event in enumerate(events) if event.what is What.BACKWARD)
    left = max(i for i, e in enumerate(events[:backward]) if e.what is What.LEAVE and e.number == number)
    reached = next(
        (i for i, e in enumerate(events) if i > backward and e.what is What.OUTPUT and e.number == number), backward
    )
    return [(each.op, each.nbytes) for each in trace.messages if left < each.at <= reached]
