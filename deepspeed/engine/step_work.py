"""How much a step did: forwards, tokens, floating-point operations; and what was waited for and moved since the last one.

Two parts of the step report (`engine.step_report`), which asks them once per step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepspeed.engine.observer import PHASES
from deepspeed.profiling.counter import OpCounter, Phase, StepFlops
from deepspeed.utils.waits import COMMUNICATION, OFFLOAD, OFFLOAD_S

MOST_INPUTS = 16
"""Tensors of a batch that `input_numels` counts."""


@final
class StepWork:
    """Operations are counted in the first micro-batch of training, and scaled by the number of tokens (or samples) after that.
    Where the script calls `loss.backward()` itself, backward is taken for twice forward."""

    def __init__(self) -> None:
        self.num_forwards = self._rows = 0
        self.tokens: int | None = None
        self._flops = StepFlops()
        self._counted_rows = 0
        self._is_first_micro_batch: bool | None = None
        """None before the first forward of training, whose operations are counted."""
        self._counting: OpCounter | None = None

    def begins(self, phase: str, value: Any) -> None:
        """A phase of training begins."""
        if phase == "forward":
            self._count_rows(value)
            self.num_forwards += 1
            self._is_first_micro_batch = self._is_first_micro_batch is None
        if phase != "step" and self._is_first_micro_batch:
            self._counting = OpCounter(self._flops.add)
            self._counting.__enter__()

    def ends(self, phase: str) -> None:
        """It ends."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
        if phase == "forward" and self._flops.by_phase[Phase.FORWARD] and not self._counted_rows:
            self._counted_rows = self._rows

    def _count_rows(self, inputs: Any) -> None:
        args, kwargs = inputs
        leaves = [*args, *kwargs.values()]
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            leaves = tree_leaves(leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        tokens = next((t for t in tensors if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)), None)
        if tokens is not None:
            self.tokens = (self.tokens or 0) + tokens.numel()
        counted = tokens.numel() if tokens is not None else tensors[0].shape[0] if tensors else 1
        self._rows += counted

    @property
    def has_counted(self) -> bool:
        """Whether operations of a micro-batch were counted."""
        return bool(self._flops.model)

    def flops(self) -> float | None:
        """The model's operations in this step; None where none were counted."""
        if not self._counted_rows:
            return None
        saw_backward = self._flops.by_phase[Phase.BACKWARD] > 0
        counted = self._flops.model if saw_backward else 3 * self._flops.by_phase[Phase.FORWARD]
        return counted * self._rows / self._counted_rows

    def end_step(self) -> None:
        """Begin a new step."""
        self.num_forwards = self._rows = 0
        self.tokens = None


def input_numels(inputs: Any) -> list[int]:
    """Elements of each tensor that a model is called with: (args, kwargs), in order; of many, the first ones."""
    return [leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)][:MOST_INPUTS]


@final
class SinceLast:
    """What the process's counters grew by from one call of `mark` to the next."""

    def __init__(self) -> None:
        self._ended_s: float | None = None
        self._phases: Mapping[str, float] = dict.fromkeys(PHASES, 0.0)
        self._comm_s = self._offload_s = 0.0
        self._sent: dict[str, int] = {}
        self._offload: dict[str, float] = {}

    def begin(self) -> None:
        """Count from now on, if that has not begun."""
        if self._ended_s is None:
            self._ended_s = time.perf_counter()
            self._take()

    def _take(self) -> None:
        self._comm_s, self._offload_s = COMMUNICATION.seconds, OFFLOAD.seconds
        self._sent = dict(COMMUNICATION.nbytes)
        self._offload = OFFLOAD.nbytes | OFFLOAD_S

    def mark(self, now_s: float, phases: Mapping[str, float]) -> dict[str, Any]:
        """The growth, as fields of `StepNumbers`; and begin anew. `phases`: seconds in each since the run began."""
        sent = {op: n - self._sent.get(op, 0) for op, n in COMMUNICATION.nbytes.items()}
        offload = {key: now - self._offload.get(key, 0) for key, now in (OFFLOAD.nbytes | OFFLOAD_S).items()}
        grown = {
            "step_s": now_s - (self._ended_s if self._ended_s is not None else now_s),
            "forward_s": phases["forward"] - self._phases["forward"],
            "backward_s": phases["backward"] - self._phases["backward"],
            "update_s": phases["step"] - self._phases["step"],
            "wait_comm_s": COMMUNICATION.seconds - self._comm_s,
            "wait_offload_s": OFFLOAD.seconds - self._offload_s,
            "offload_s": {key: offload[key] for key in OFFLOAD_S},
            "offload_nbytes": {key: int(offload[key]) for key in OFFLOAD.nbytes},
            "comm_nbytes": {op: n for op, n in sent.items() if n},
        }
        self._ended_s, self._phases = now_s, phases
        self._take()
        return grown
