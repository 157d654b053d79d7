"""The update as one recorded graph of the device, replayed each step (`graph_harvesting`): the host launches it at once.

Owned by `zero.optimizer`. What changes from step to step reaches a replay through memory: the factor that unscales and clips, and
the learning rates, which the optimizer reads as tensors while it is recorded. All else that the recording took up is its key:
addresses of gradients, masters, parameters and states, and the groups' other settings. A step whose key is not the last
one's runs as it always does, and the next records anew.

Invariant: a replay does what the recorded calls would do now, to rounding (learning rates are fp32 in it). What Python does
beside kernels in a step is not in a graph: hooks on it are called around it (`zero.step_hooks`); with torch's global ones steps run as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from deepspeed.accelerator import DeepSpeedAccelerator
from deepspeed.optim.adam import FusedAdam
from deepspeed.tiers import InMemory
from deepspeed.utils.logging import warn_once
from deepspeed.zero.master import Master
from deepspeed.zero.runs import Runs
from deepspeed.zero.update import Update

MAX_MISSES = 8
"""Steps in a row that were unlike their predecessors, after which a line says so."""

Key = tuple[Any, ...]


def why_not(runs: Runs, accelerator: DeepSpeedAccelerator) -> str | None:
    """Why steps of these runs cannot be recorded; None where they can be."""
    if not runs.masters:
        return "nothing is trained"
    if accelerator.create_graph() is None:
        return f"{accelerator.device_name()} has no graphs"
    if runs.stream is not None or not all(_lies_in_memory(master) for master in runs.masters):
        return "masters or parameters rest on another tier"
    groups = runs.optimizer.param_groups
    if not (isinstance(runs.optimizer, FusedAdam) or all(group.get("capturable") for group in groups)):
        return f"{type(runs.optimizer).__name__} reads its settings on the host; FusedAdam, and torch's with capturable=True, do not"
    return None


@final
class GraphedUpdate:
    """`Update.run` and `Master.to_params` of all runs, by a graph where there is one that fits."""

    def __init__(self, runs: Runs, accelerator: DeepSpeedAccelerator) -> None:
        self._runs, self._accelerator = runs, accelerator
        self._key: Key | None = None
        self._graph: Any = None
        self._scalars: list[Tensor] = []
        """The factor, and each group's learning rate."""
        self._num_misses = 0
        self.num_replays = 0
        """Steps that a graph did."""

    def run(self, factor: float) -> bool:
        """One step, parameters written; False, and nothing done, where this step has to run as it always does."""
        key = self._key_now()
        if key is None or key != self._key:
            self._key, self._graph = key, None
            self._num_misses += 1
            if self._num_misses == MAX_MISSES:
                warn_once(
                    f"graph_harvesting: {MAX_MISSES} steps in a row differed from the one before (hooks on every optimizer's step, or "
                    "memory that moves); they run without a graph."
                )
            return False
        self._num_misses = 0
        values = [factor, *(float(group["lr"]) for group in self._runs.optimizer.param_groups)]
        if self._graph is None:
            device = self._runs.masters[0].tensor.device
            self._scalars = [torch.zeros((), device=device) for _ in values]
            self._graph = self._record()
        for scalar, value in zip(self._scalars, values, strict=True):
            scalar.fill_(value)
        self._accelerator.replay_graph(self._graph)
        # What torch's learning-rate schedulers look for: they watch `step`.
        self._runs.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.num_replays += 1
        return True

    def _record(self) -> Any:
        groups = self._runs.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        graph = self._accelerator.create_graph()
        try:
            for group, rate in zip(groups, self._scalars[1:], strict=True):
                group["lr"] = rate
            with self._accelerator.capture_to_graph(graph):
                Update(self._runs).run(self._scalars[0], ())
                for master in self._runs.masters:
                    master.to_params()
        finally:
            for group, given in zip(groups, rates, strict=True):
                group["lr"] = given
        return graph

    def _key_now(self) -> Key | None:
        optimizer = self._runs.optimizer
        if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
            return None
        settings = tuple(
            (name, repr(value))
            for group in optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        )
        return (settings, *self._addresses())

    def _addresses(self) -> Iterator[tuple[int, ...]]:
        runs = self._runs
        for master, gradients, members in zip(runs.masters, runs.gradients, runs.steppable, strict=True):
            low = _target(master).view(0, master.numel)
            gradient = gradients.rest().view(0, master.numel)
            yield tuple(-1 if found is None else found.data_ptr() for found in (master.tensor, low, gradient))
            for group, run in members:
                states = runs.optimizer.state.get(run, {})
                tensors = [state.data_ptr() for state in states.values() if isinstance(state, Tensor)]
                yield (group, run.data_ptr(), run.numel(), *tensors)


def _target(master: Master) -> Any:
    return master.bucket.rest if master.is_sharded else InMemory(master.bucket.full)


def _lies_in_memory(master: Master) -> bool:
    return not master.is_streamed and isinstance(_target(master), InMemory)
