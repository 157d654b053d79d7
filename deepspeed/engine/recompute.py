"""The engine's activation checkpointing: what `activation_checkpointing.recompute` and `memory_budget_gb` ask for.

Made by the engine before it builds anything, asked before each forward. A fixed choice is applied at once; a budget at
the first training forward, when the shapes of a micro-batch are known, and then for good. All ranks use the most
cautious rank's choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepspeed.activation.blocks import Blocks, Recompute, blocks_of
from deepspeed.activation.saved import ModelParallel
from deepspeed.activation.settings import Settings
from deepspeed.config import Config
from deepspeed.memory.budget import choose_plan, ladder
from deepspeed.mesh import Mesh
from deepspeed.utils.logging import log_dist


class Recomputation:
    """Which blocks of the engine's model recompute; `blocks` is None where the configuration does not ask."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, device: torch.device) -> None:
        self._model, self._config, self._mesh, self._device = model, config, mesh, device
        section = config.activation_checkpointing
        self._budget_gb = section.memory_budget_gb
        self.is_undecided = self._budget_gb is not None
        """Whether `choose` still has to."""
        self.blocks: Blocks | None = None
        if section.recompute != "none" or self._budget_gb is not None:
            self.blocks = blocks_of(model, Settings.of_section(section, ModelParallel.of_mesh(mesh)))
            self.blocks.apply([Recompute(section.recompute)] * len(self.blocks.blocks))

    def detach(self) -> None:
        """Take the checkpoints away."""
        if self.blocks is not None:
            self.blocks.detach()

    def choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose for the budget, once, from the shapes of a training micro-batch. Collective then."""
        if self._budget_gb is None or not torch.is_grad_enabled():
            return
        assert self.blocks is not None, "a budget has blocks"
        budget_gb, self._budget_gb, self.is_undecided = self._budget_gb, None, False
        rung, estimate = choose_plan(
            self._model,
            self._config,
            args,
            kwargs,
            world_size=self._mesh.size("average"),
            budget_nbytes=int(budget_gb * 2**30),
            device_type=self._device.type,
        )
        rung = max(theirs for (theirs,) in self._mesh.agree("average", rung))
        self.blocks.apply(ladder(len(self.blocks.blocks))[rung])
        log_dist(f"{self.blocks}: {estimate.peak_nbytes / 2**30:.2f} GiB predicted for {budget_gb:g} GiB", ranks=[0])
