"""The least recomputation that keeps a rank within a number of bytes.

Called by the engine (`activation_checkpointing.memory_budget_gb`) at its first training forward, and by users before one.
Plans form a ladder from nothing to everything; each rung recomputes a little more than the one below:

    0 .. n      the first blocks selectively, one more per rung
    n .. 2n     the first blocks whole, one more per rung, the others selectively

A rung that is predicted to fit, while the one below is not, is found by bisection: about log2(2n) traces of the model.

Invariant: the choice depends on shapes and settings alone, so it is the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepspeed.activation.blocks import Recompute, find_blocks
from deepspeed.memory.estimator import Estimate, Estimator
from deepspeed.utils.errors import DeepSpeedConfigError

GIB = 2**30


def ladder(num_blocks: int) -> list[list[Recompute]]:
    """All plans for so many blocks, from the least recomputation to the most."""
    selective = [[Recompute.SELECTIVE] * k + [Recompute.NONE] * (num_blocks - k) for k in range(num_blocks + 1)]
    whole = [[Recompute.FULL] * k + [Recompute.SELECTIVE] * (num_blocks - k) for k in range(1, num_blocks + 1)]
    return selective + whole


def choose_plan(
    model: nn.Module,
    config: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    world_size: int,
    budget_nbytes: int,
    device_type: str,
) -> tuple[int, Estimate]:
    """A rung of the ladder that fits while the one below does not, and its estimate. `args` and `kwargs` are a micro-batch's; shapes count.

    On an accelerator what rounding adds counts too. Raises DeepSpeedConfigError where even the highest rung does not fit.
    """
    estimator = Estimator(model, None, device_type=device_type)
    estimator.args, estimator.kwargs = args, dict(kwargs)
    plans = ladder(len(find_blocks(model)))

    def at(rung: int) -> Estimate:
        return estimator.estimate(config, world_size=world_size, plan=plans[rung])

    def fits(estimate: Estimate) -> bool:
        rounding = 0 if device_type == "cpu" else estimate.allowance_nbytes
        return estimate.peak_nbytes + rounding <= budget_nbytes

    low, high = 0, len(plans) - 1
    best = at(high)
    if not fits(best):
        raise DeepSpeedConfigError(
            f"activation_checkpointing.memory_budget_gb = {budget_nbytes / GIB:.3g}: with every block recomputed whole a rank "
            f"still needs {best.peak_nbytes / GIB:.3g} GiB (peak in {best.phase}).\n"
            "  Raise the budget, lower train_micro_batch_size_per_gpu, or shard or offload more (see `deepspeed estimate`)."
        )
    while low < high:
        middle = (low + high) // 2
        estimate = at(middle)
        if fits(estimate):
            high, best = middle, estimate
        else:
            low = middle + 1
    return high, best
