"""What a pipeline's executor has done at a stage, with ZeRO around it: forward, loss and backward of one micro-batch.

Made by the pipeline engine; holds the module and what was built for it, not the engine. The executor says when.

Invariant: the loss of a micro-batch is divided by their number once, on the last stage, in the order in which
`engine.backward` does it, so gradients have the bits of one process that accumulates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deepspeed.engine.build import Parts
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.module import PipelineModule


class StageWork:
    """One rank's stages, and the batch that is under way."""

    def __init__(self, module: PipelineModule, parts: Parts, device: torch.device) -> None:
        self._module, self._parts, self._device = module, parts, device
        self._zero = parts.zero
        self._trains = {stage: self._has_trained(stage) for stage in module.own_stages}
        self._inputs: list[Any] = []
        self._labels: list[Any] = []
        self.computes_loss = True
        self.num_micro = 1
        self.losses: list[Tensor] = []
        """Of the micro-batches so far, on the last stage."""
        self.outputs: Any = None
        """Of the last micro-batch, on the last stage, in evaluation."""
        self.additional: dict[str, Tensor] = {}
        """Sums of the module's further losses."""
        self.before_gradients: Callable[[], None] | None = None
        """Called before a loss that is scaled for backward, and before a backward."""
        self.on_last_loss: Callable[[list[Tensor]], None] | None = None
        """Called with the losses of all micro-batches of a batch that trains, on the last stage."""

    def _has_trained(self, stage: int) -> bool:
        start, end = self._module._chunk_at[stage]
        functions = (getattr(f, "args", (f,))[0] for f in self._module.forward_funcs[start:end])
        return any(p.requires_grad for f in functions if isinstance(f, torch.nn.Module) for p in f.parameters())

    def begin(self, inputs: Sequence[Any], labels: Sequence[Any], num_micro: int, computes_loss: bool = True) -> None:
        """Take a batch: what the first stage reads, and the last."""
        self._inputs, self._labels = list(inputs), list(labels)
        self.num_micro, self.computes_loss = num_micro, computes_loss
        self.losses, self.outputs, self.additional = [], None, {}

    def end(self) -> None:
        """Let go of the batch."""
        self._inputs, self._labels = [], []

    # Work. ---------------------------------------------------------------------------------------------------------

    def trains(self, stage: int) -> bool:
        """See Work."""
        return self._trains[stage]

    def load(self, micro: int) -> Any:
        """See Work."""
        value, self._inputs[micro] = to_device(self._inputs[micro], self._device), None
        as_tuple = value if isinstance(value, tuple) else (value,)
        cast = self._parts.casts.inputs(as_tuple)
        return cast if isinstance(value, tuple) else cast[0]

    def forward(self, stage: int, inputs: Any) -> Any:
        """See Work."""
        with torch.profiler.record_function(f"pipeline.forward.{stage}"), self._parts.casts.context():
            output = self._module(inputs, stage=stage)
        if self._zero.hooks is None and torch.is_grad_enabled():
            self._zero.watch.watch(output)
        for name, value in (self._module.get_additional_losses() or {}).items():
            now = value.detach().float()
            self.additional[name] = self.additional[name] + now if name in self.additional else now
        return output

    def loss(self, outputs: Any, micro: int) -> Tensor:
        """See Work."""
        if not torch.is_grad_enabled():
            self.outputs = outputs
        elif self.before_gradients is not None:
            self.before_gradients()
        loss = outputs
        if self._module.loss_fn is not None and self.computes_loss:
            labels = to_device(self._labels[micro], self._device)
            with self._parts.casts.context():
                loss = self._module.loss_fn(outputs, labels)
        if isinstance(loss, (list, tuple)) and all(isinstance(part, Tensor) for part in loss):
            loss = sum(loss[1:], loss[0])
        if not isinstance(loss, Tensor):
            raise PipelineError(
                f"the last stage's loss is a {type(loss).__name__}, not a tensor.\n  Give PipelineModule a loss_fn that returns "
                "a scalar tensor, or have the last layer return one."
            )
        self.losses.append(loss.detach().float())
        if self.on_last_loss is not None and torch.is_grad_enabled() and len(self.losses) == self.num_micro:
            self.on_last_loss(self.losses)
        return self._scaled(loss) if torch.is_grad_enabled() else loss

    def _scaled(self, loss: Tensor) -> Tensor:
        if loss.numel() != 1:
            raise PipelineError(
                f"the last stage's loss has shape {tuple(loss.shape)}: training needs one number.\n  Give PipelineModule a "
                "loss_fn, or have the last layer return a scalar."
            )
        if not loss.requires_grad and any(self._trains.values()):
            raise PipelineError(
                "the last stage's loss does not require grad: it was detached, or does not depend on its parameters."
            )
        weighs = None if self._module.loss_is_whole else self._parts.sequence_loss
        if weighs is not None:
            weighs.note_loss(loss)
        divided = loss / self.num_micro if self.num_micro > 1 else loss
        if weighs is not None:
            divided = weighs.weighted(divided)
        return self._zero.scale_guard.scale.times(divided)

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """See Work."""
        if self.before_gradients is not None:
            self.before_gradients()
        self._zero.scale_guard.is_scaled = True
        with torch.profiler.record_function("pipeline.backward"):
            torch.autograd.backward(list(roots), list(gradients))
        self._zero.watch.end()


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in nested values on the device; a list of inputs becomes a tuple."""
    moved = tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value)
    return tuple(moved) if isinstance(moved, list) else moved
