"""Sections that choose dtypes: `fp16`, `bf16`, `torch_autocast`, `amp`, `msamp` and `data_types`.

Read by the engine and by `deepspeed.precision`. At most one of fp16 and bf16 is on; with neither the model stays fp32.
That rule, and those that need the ZeRO stage, stand in `root.py`, where both sections are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from deepspeed.config.base import FloatDtype, Names, NonNegativeFloat, NonNegativeInt, PositiveInt, Problem, Section


class Fp16Config(Section):
    """`fp16`: an fp16 model copy, fp32 master weights, and a loss scale that keeps small gradients from vanishing."""

    enabled: bool = False
    """Train in fp16."""
    auto_cast: bool = False
    """Cast floating-point inputs of `forward` to fp16."""
    loss_scale: NonNegativeFloat = 0.0
    """A fixed loss scale; 0 lets the scale follow the gradients (the four fields below)."""
    initial_scale_power: NonNegativeInt = 16
    """The dynamic scale starts at 2 to this power. 65536 is near the top of fp16's range, so it settles from above."""
    loss_scale_window: PositiveInt = 1000
    """Steps without overflow before the dynamic scale doubles."""
    hysteresis: PositiveInt = 2
    """Overflows tolerated before the dynamic scale halves."""
    consecutive_hysteresis: bool = False
    """Restore the full tolerance after each step without overflow, instead of only when the scale grows."""
    min_loss_scale: NonNegativeFloat = 1.0
    """The floor of the dynamic scale; an overflow at the floor is an error."""
    fp16_master_weights_and_grads: bool = False
    """Keep master weights and gradients in fp16 too. Needs a ZeRO stage of 1 to 3."""


class Bf16Config(Section):
    """`bf16` (also spelled `bfloat16`): a bf16 model copy and fp32 master weights, no loss scale."""

    enabled: bool = False
    """Train in bf16."""
    immediate_grad_update: bool = False
    """Add each gradient to its fp32 accumulator as backward produces it. Gradients always are here, so no effect."""
    check_grad_overflow: bool = True
    """Skip a step whose gradients hold inf or nan."""
    bf16_master_weights_and_grads: bool = False
    """Keep master weights and gradients in bf16 too. Needs a ZeRO stage of 1 to 3."""
    bf16_optimizer_states: bool = False
    """Keep the optimizer's moments in bf16 too. Needs `bf16_master_weights_and_grads`."""

    def rules(self) -> Iterator[Problem]:
        """States in bf16 follow from masters in bf16."""
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            yield Problem(
                ("bf16_optimizer_states", "bf16_master_weights_and_grads"),
                "bf16 optimizer states need bf16 master weights",
                "Set bf16_master_weights_and_grads to true as well, or bf16_optimizer_states to false.",
            )


class TorchAutocastConfig(Section):
    """`torch_autocast`: run forward under `torch.autocast`; parameters keep their dtype."""

    enabled: bool = False
    """Use autocast."""
    dtype: FloatDtype | None = None
    """The lower dtype; bf16 when not given."""
    lower_precision_safe_modules: Names | None = None
    """Class paths of modules whose parameters and gradients travel in the lower dtype; linear and convolution layers
    of torch when not given."""


class AmpConfig(Section, extra="allow"):
    """`amp`: NVIDIA Apex mixed precision. Every other key goes to `apex.amp.initialize` as it is."""

    enabled: bool = False
    """Use Apex. Excludes fp16 and ZeRO."""


class MsAmpConfig(Section):
    """`msamp`: Microsoft's fp8 library, a section Accelerate may send."""

    enabled: bool = False
    """Use MS-AMP."""
    opt_level: str = "O1"
    """Which tensors are fp8: O1, O2 or O3."""
    use_te: bool = False
    """Combine it with Transformer Engine."""


class DataTypesConfig(Section):
    """`data_types`: dtypes that differ from the mode's own."""

    grad_accum_dtype: FloatDtype | None = None
    """Dtype in which gradients accumulate over micro-batches; the model's when not given."""
    param_dtype: FloatDtype | None = None
    """A statement of the model's dtype; must equal that of the enabled mode."""
    buffer_dtype: FloatDtype | None = None
    """Dtype of floating-point buffers; each keeps its own when not given."""
    keep_in_fp32_modules: Literal["auto"] | Names = "auto"
    """Modules whose buffers stay fp32; "auto" takes the lists that Hugging Face models carry."""
