"""The instructions of the contract's schedules, as scripts name and subclass them. Pure: the engine's lists are `actions`.

An instruction has what it was made with as attributes, and as `kwargs`.
"""

from __future__ import annotations

from typing import Any


class PipeInstruction:
    """Something that one rank does in one slot."""

    def __init__(self, **kwargs: Any) -> None:
        self.name, self.kwargs = type(self).__name__, kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.kwargs.items())})"


class OptimizerStep(PipeInstruction):
    """Step, and forget gradients."""


class ReduceGrads(PipeInstruction):
    """Reduce gradients between ranks of the same stage."""


class ReduceTiedGrads(PipeInstruction):
    """Sum gradients of tied parameters between stages."""


class CommitP2P(PipeInstruction):
    """Start the sends and receives that were gathered."""


class BufferOpInstruction(PipeInstruction):
    """Something done in one of the stage's buffers."""

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Read a micro-batch from the loader."""


class ForwardPass(BufferOpInstruction):
    """Compute the stage's outputs."""


class BackwardPass(BufferOpInstruction):
    """Compute the stage's gradients."""


class SendActivation(BufferOpInstruction):
    """Send outputs to the next stage."""


class RecvActivation(BufferOpInstruction):
    """Receive inputs from the stage before."""


class SendGrad(BufferOpInstruction):
    """Send the inputs' gradients to the stage before."""


class RecvGrad(BufferOpInstruction):
    """Receive the outputs' gradients from the next stage."""
