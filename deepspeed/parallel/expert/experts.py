"""The experts of one rank as modules, run one after the other on their rows.

Used by `layer`. Parameters are `deepspeed_experts.{local number}.<the expert's own names>`.

Where oneDNN multiplies fp32 matrices faster than torch does, the Linear layers inside of experts are computed by it (`kernels.onednn`).

Invariant: every expert runs in every call, on no rows if it got none, so that its parameters have gradients (zeros) as
those of a dense loop over all experts have, and ranks that shard parameters gather them in one order.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.kernels import onednn
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError


class Experts(nn.Module):
    """`num_local_experts` copies of a module."""

    def __init__(self, expert: nn.Module, num_local_experts: int = 1, expert_group_name: str | None = None) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_local_experts))
        self.num_local_experts = num_local_experts
        for param in self.deepspeed_experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = expert_group_name  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """rows [n, width], `counts[e]` of them for expert e, in order; [n, width of the results]."""
        with onednn.LinearByOneDNN() if onednn.may_help(rows) else contextlib.nullcontext():
            return torch.cat(self._results(rows, counts))

    def _results(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        results = []
        for expert, part in zip(self.deepspeed_experts, rows.split(counts), strict=True):
            result = expert(part)
            results.append(result[0] if isinstance(result, tuple) else result)
        return results

    def names(self, place: ExpertPlace) -> dict[str, str]:
        """What the local experts are called in the whole model."""
        return {str(i): str(place.first + i) for i in range(self.num_local_experts)}


def check_alike(name: str, experts: nn.ModuleList) -> None:
    """Refuse experts of one layer that differ. Raises DeepSpeedConfigError, naming the layer."""
    values: dict[str, set[Any]] = {
        "requires_grad": {tuple(p.requires_grad for p in expert.parameters()) for expert in experts},
        "dtypes or devices": {tuple((p.dtype, p.device) for p in expert.parameters()) for expert in experts},
    }
    different = next((what for what, kinds in values.items() if len(kinds) > 1), None)
    if different:
        raise DeepSpeedConfigError(
            f"the experts of {name} have different {different}.\n  Freeze all of a layer's experts or none, in one dtype."
        )
