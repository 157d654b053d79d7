"""Optimizers that nobody has said are right on flat pieces: refused at ZeRO 1 to 3, or let through with a warning.

Asked by `zero.runs` where runs are pieces of a rank's shard. Pure.
"""

from __future__ import annotations

import torch

from deepspeed.optim.traits import steps_rows
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once

MATRICES_ONLY = (torch.optim.Muon,) if hasattr(torch.optim, "Muon") else ()
"""Those of torch (since 2.9) that raise for anything but a matrix."""


def check_untested(optimizer: torch.optim.Optimizer, zero_stage: int, is_allowed: bool) -> None:
    """Raise DeepSpeedConfigError for one that is not known to be element-wise, unless it `is_allowed`."""
    name = type(optimizer).__name__
    if steps_rows(optimizer):
        raise DeepSpeedConfigError(
            f"{name} takes sparse gradients, of which ZeRO stage {zero_stage} gives each rank a flat slice.\n"
            "  Use stage 0, or a dense optimizer such as Adam."
        )
    if isinstance(optimizer, MATRICES_ONLY):
        raise DeepSpeedConfigError(
            f"{name} orthogonalizes whole matrices, of which ZeRO stage {zero_stage} gives each rank a flat slice.\n"
            '  Use stage 0, or "optimizer": {"type": "Muon"}, which is given whole matrices at every stage.'
        )
    if not is_allowed:
        raise DeepSpeedConfigError(
            f"{name} is not known to work on flat shards: under ZeRO stage {zero_stage} it would step 1-D pieces that "
            "hold parts of several parameters, which is right only for element-wise optimizers.\n"
            '  If it is element-wise set "zero_allow_untested_optimizer": true; otherwise use stage 0.'
        )
    warn_once(
        f"{name} is not known to be element-wise. Under ZeRO stage {zero_stage} it steps 1-D "
        "pieces that hold parts of several parameters; if it looks at shapes or norms of parameters, as Adafactor does, "
        "it trains with other numbers than at stage 0. zero_allow_untested_optimizer allows it; some libraries set that key."
    )
