"""What quantisation left out of one buffer's messages, given back to the next ones (LoCo).

Kept by `comm.quantized_exchanges` for each message of a bucket's reductions; saved with each rank's own state (`engine.checkpoints`).

Invariant: what a resumed run loads is all that the next message depends on, so it has the bits of an uninterrupted one.
After LoCo (arXiv:2407.04480), algorithm 1.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from deepspeed.comm.code import ERRORS, Code


@final
class ErrorFeedback:
    """What quantisation left out of one buffer, given back to the next: `error = beta error + (1 - beta) new`.

    Begins anew every `reset_T` messages. Rests in int8, one byte an element. After LoCo, algorithm 1.
    """

    def __init__(self, beta: float, reset_every: int) -> None:
        self._beta, self._reset_every = beta, reset_every
        self._num_messages = 0
        self._error: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """What the next message depends on."""
        return {"num_messages": self._num_messages, "error": self._error}

    def take(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Go on from what `state` gave, or begin anew."""
        error = None if state is None else state["error"]
        self._num_messages = 0 if state is None else int(state["num_messages"])
        self._error = None if error is None else error.to(device, copy=True)

    def encode(self, x: Tensor, code: Code) -> Tensor:
        """The message of x plus what earlier ones left out. x may be of any float dtype."""
        before = None
        if self._error is not None and self._num_messages % self._reset_every:
            before = ERRORS.decode(self._error, x.numel())
        self._num_messages += 1
        wanted = x.float() if before is None else before.add(x)
        message = code.encode(wanted)
        new = wanted.sub(code.decode(message, x.numel())).mul_(1 - self._beta)
        if before is not None:
            new.add_(before, alpha=self._beta)
        # A step with what is not finite is skipped, and must leave nothing behind.
        self._error = ERRORS.encode(torch.nan_to_num_(new, nan=0.0, posinf=0.0, neginf=0.0))
        return message
