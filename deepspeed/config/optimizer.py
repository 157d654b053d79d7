"""Sections `optimizer` and `scheduler`: a name, and parameters passed on as they are.

Read by the engine when the script brings no optimizer or scheduler object. Which names exist, and what each does with
its parameters, is the business of `deepspeed.optim`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from deepspeed.config.base import AUTO, Section

ONE_BIT_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb")
"""Optimizers with a compressed reduction of their own, in lower case."""


class _Chosen(Section):
    """Something built by name."""

    type: str | None = None
    """The name; nothing is built without one."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor. A value of "auto" is left out, so the constructor's default holds."""

    @field_validator("params", mode="before")
    @classmethod
    def _leave_out_auto(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {} if value is None else value
        return {key: given for key, given in value.items() if not (isinstance(given, str) and given == AUTO)}


class OptimizerConfig(_Chosen):
    """`optimizer`: Adam, AdamW, Lamb, Lion, Adagrad, Muon, the 1-bit family (any case), or a class of torch.optim."""

    legacy_fusion: bool = False
    """Use an older layout of fused fp16 states. Accepted, no effect."""


class SchedulerConfig(_Chosen):
    """`scheduler`: one of this package's five schedules or a class of torch.optim.lr_scheduler, exact spelling."""
