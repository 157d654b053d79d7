"""Loss scales for fp16: a constant one, and one that finds the largest that does not overflow.

Owned by the optimizer wrapper, which decides from the norm (`zero.norm`) whether a step overflowed and is skipped, and tells the
scale; pure arithmetic, but for the loss that passes through `times`. After Mixed Precision Training (arXiv:1710.03740),
section 3.2; the hysteresis is DeepSpeed's (see config keys `fp16.*`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class LossScaleFloorError(RuntimeError):
    """The dynamic loss scale cannot be lowered any more. The optimizer adds which gradient is not finite."""


@dataclass
class StaticLossScale:
    """The same scale for ever: 1 for fp32 and bf16, `fp16.loss_scale` for fp16 if given."""

    scale: float = 1.0
    is_dynamic: bool = False

    @property
    def loss_scale(self) -> float:
        """The scale, under the names that scripts read of `optimizer.loss_scaler`."""
        return self.scale

    cur_scale = loss_scale

    @property
    def is_used(self) -> bool:
        """Whether a loss has to be multiplied before its backward."""
        return self.is_dynamic or self.scale != 1.0

    def times(self, loss: Tensor) -> Tensor:
        """The loss as its backward takes it: in fp32, which the scale does not overflow."""
        return loss.float() * self.scale if self.scale != 1.0 else loss

    def update(self, overflowed: bool) -> None:
        """Nothing to learn from a step."""

    def state_dict(self) -> dict[str, Any]:
        """The scale, JSON-ready."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved scale."""
        self.scale = float(state["scale"])


@dataclass
class DynamicLossScale(StaticLossScale):
    """Doubles after `window` clean steps in a row; halves on overflow, once `hysteresis` of them have been tolerated.

    With `consecutive_hysteresis` the tolerance is restored by every clean step, else only by a doubling.
    """

    scale: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    consecutive_hysteresis: bool = False
    is_dynamic: bool = True
    tolerance_left: int = -1
    num_steps: int = 0
    last_overflow: int = -1

    def __post_init__(self) -> None:
        if self.tolerance_left < 0:
            self.tolerance_left = self.hysteresis

    def update(self, overflowed: bool) -> None:
        """Learn from one step. Raises LossScaleFloorError on an overflow at `min_scale`."""
        if overflowed:
            if self.hysteresis == 1 or self.tolerance_left == 1:
                if self.scale <= self.min_scale:
                    raise LossScaleFloorError("Current loss scale already at minimum - cannot decrease scale anymore.")
                self.scale = max(self.scale / 2, self.min_scale)
            else:
                self.tolerance_left -= 1
            self.last_overflow = self.num_steps
        else:
            if self.consecutive_hysteresis:
                self.tolerance_left = self.hysteresis
            num_clean = self.num_steps - self.last_overflow - 1
            if num_clean > 0 and num_clean % self.window == 0:
                self.scale *= 2
                if not self.consecutive_hysteresis:
                    self.tolerance_left = self.hysteresis
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, JSON-ready."""
        return {
            "scale": self.scale,
            "tolerance_left": self.tolerance_left,
            "num_steps": self.num_steps,
            "last_overflow": self.last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take saved values."""
        self.scale = float(state["scale"])
        for name in ("tolerance_left", "num_steps", "last_overflow"):
            setattr(self, name, int(state[name]))
