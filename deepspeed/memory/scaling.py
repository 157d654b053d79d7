"""Estimates of one model for any size of its micro-batch, from three traces at most.

Called by the autotuner's first run and by the search for the largest batch. Every storage that a step allocates has a size
that is affine in the micro-batch (a + b * samples), so two traces tell all others, as long as the same things happen in the
same order. Where they do not (a model that asks for its batch size), each size is traced.

    BatchEstimator(model, batch, micro=4).estimate(config, micro=32, world_size=2)

Invariant: an interpolated trace has the events of a real one; `tests/memory/test_scaling.py` compares them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deepspeed.activation.blocks import Recompute
from deepspeed.config import Config, load_config
from deepspeed.memory.estimator import Estimate, Estimator
from deepspeed.memory.trace import Trace
from deepspeed.profiling.counter import StepFlops

BASES = (2, 3)
"""Sizes that are traced; one sample may take other paths (a squeezed or broadcast dim), so it is traced by itself."""


def resized(batch: Any, micro: int, samples: int) -> Any:
    """A batch of `samples` like one of `micro`: every tensor whose first dim is `micro` gets another first dim. Meta tensors."""

    def like(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if shape and shape[0] == micro:
            shape[0] = samples
        return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)

    return tree_map_only(Tensor, like, batch)


def interpolated(low: Trace, high: Trace, at: tuple[int, int], samples: int) -> Trace | None:
    """The trace of `samples` from those of `at` samples; None where the two are not the same events in the same order."""
    if len(low.events) != len(high.events):
        return None
    span = at[1] - at[0]
    events = []
    for a, b in zip(low.events, high.events, strict=True):
        if a.what is not b.what or a.number != b.number or (b.nbytes - a.nbytes) % span:
            return None
        events.append(a._replace(nbytes=a.nbytes + (b.nbytes - a.nbytes) // span * (samples - at[0])))
    flops = StepFlops()
    for phase, count in low.flops.by_phase.items():
        grown = (high.flops.by_phase[phase] - count) / span
        flops.by_phase[phase] = int(count + grown * (samples - at[0]))
    return dataclasses.replace(low, events=events, flops=flops)


class _OfSize(Estimator):
    """An estimator whose traces come from elsewhere."""

    def __init__(self, model: nn.Module, batch: Any, find: Callable[..., Trace | None], **options: Any) -> None:
        super().__init__(model, batch, **options)
        self._find = find

    def trace(self, config: Config, plan: Sequence[Recompute] | None = None) -> Trace:
        """See Estimator."""
        return self._find(config, plan) or super().trace(config, plan)


class BatchEstimator:
    """Estimates of a model and a batch of `micro` samples, at any other number of samples."""

    def __init__(self, model: nn.Module, batch: Any, micro: int, **options: Any) -> None:
        self._model, self._batch, self._micro, self._options = model, batch, micro, options
        self._of_size: dict[int, Estimator] = {}
        self._is_affine = True

    def estimate(self, config: Any, *, micro: int, world_size: int = 1, bounds: bool = True) -> Estimate:
        """Predict for a configuration and a micro-batch; see `Estimator.estimate`."""
        return self.at(micro).estimate(config, world_size=world_size, bounds=bounds)

    def trace(self, config: Any, micro: int) -> Trace:
        """The step that is predicted from."""
        return self.at(micro).trace(config if isinstance(config, Config) else load_config(config))

    def at(self, micro: int) -> Estimator:
        """The estimator of one size; its traces are kept."""
        if micro not in self._of_size:
            batch = resized(self._batch, self._micro, micro)
            if micro == 1 or micro in BASES:
                self._of_size[micro] = Estimator(self._model, batch, **self._options)
            else:
                find = lambda config, plan: self._between(config, plan, micro)  # noqa: E731
                self._of_size[micro] = _OfSize(self._model, batch, find, **self._options)
        return self._of_size[micro]

    def _between(self, config: Config, plan: Sequence[Recompute] | None, micro: int) -> Trace | None:
        if not self._is_affine:
            return None
        low, high = (self.at(size).trace(config, plan) for size in BASES)
        found = interpolated(low, high, BASES, micro)
        self._is_affine = found is not None
        return found
