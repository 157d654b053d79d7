"""What scripts written for the original read of its engine about layers with experts: a mixin of `script_attributes`."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch import nn

from deepspeed.checkpoint.original import read_torch_file
from deepspeed.checkpoint.original_experts import local_experts
from deepspeed.engine.expert_load import places
from deepspeed.parallel.expert import attach
from deepspeed.parallel.expert.gate import TopKGate
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.utils.errors import CheckpointError


class ExpertAttributes:
    """Mixin of the engine; empty and False for models without experts."""

    module: nn.Module

    @property
    def has_moe_layers(self) -> bool:
        """Whether the model has layers with experts: `MoE`, or what `expert_parallel` found."""
        return bool(self.num_experts)

    @property
    def num_experts(self) -> list[int]:
        """The experts of each such layer, on all ranks together."""
        return [place.num_experts for _, place in places(self.module)]

    @property
    def moe_layers(self) -> list[MOELayer]:
        """What computes in each `MoE` layer."""
        return [layer for _, layer in attach.expert_layers(self.module)]

    @property
    def gate_modules(self) -> list[TopKGate]:
        """The gate of each `MoE` layer."""
        return [layer.gate for layer in self.moe_layers]

    @staticmethod
    def load_moe_state_dict(
        checkpoint_path: str,
        tag: str,
        state_dict: MutableMapping[str, Any],
        old_moe_load: bool,
        model: nn.Module | None = None,
        mpu: Any = None,
        num_experts: Any = 1,
        checkpoint_engine: Any = None,
    ) -> None:
        """Put the weights of this rank's experts into `state_dict`, from the original's files of single experts.

        checkpoint_path, tag: the folder. model: has `MoE` layers that know their ranks, in the saved order; its state dict's
        names are what `state_dict` gets. mpu, num_experts and checkpoint_engine say nothing that the model does not. Raises
        CheckpointError for a missing file, and for `old_moe_load` (files whose names do not say the layer).
        """
        if old_moe_load or model is None:
            raise CheckpointError(
                f"load_moe_state_dict(old_moe_load={old_moe_load}, model={'None' if model is None else '...'}): files of experts "
                "are found by the layers of a model.\n  Pass the model, and a checkpoint whose files are called layer_*_expert_*."
            )
        layers = [(layer.place.first, layer.place.num_here) for _, layer in attach.expert_layers(model)]
        state_dict.update(local_experts(Path(checkpoint_path) / str(tag), layers, read_torch_file))
