"""What scripts written for the original read of its engine beside the configuration: a mixin, and a table.

`ScriptAttributes` has what has a meaning here. `LATER` has what belongs to another engine or to a feature of a later version: `hasattr`
says no, as an engine without the feature does in the original, and whoever asks by name is told the feature.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.engine.script_experts import ExpertAttributes
from deepspeed.mesh import groups
from deepspeed.optim.traits import AveragesItself
from deepspeed.utils.errors import TrainingStateError

_BY_FEATURE = {
    "a deepspeed.PipelineModule, whose engine has it": "train_batch eval_batch grid set_batch_fn is_pipe_parallel is_model_parallel is_data_parallel "
    "is_first_stage is_last_stage micro_batches num_stages stage_id next_stage prev_stage reset_activation_shape "
    "set_has_attention_mask set_dataloader set_dataiterator fwd_outputs pipe_buffers pipe_recv_buf first_output_send "
    "num_pipe_buffers _exec_reduce_tied_grads _next_batch",
    "data efficiency, which is not available yet": "random_ltd_scheduler set_data_post_process_func curriculum_scheduler_legacy "
    "curriculum_scheduler_difficulty",
    "progressive layer dropping, which is not available yet": "progressive_layer_drop get_pld_theta",
    "deepspeed.init_inference": "generate profile_model_time model_times cuda_graph_created",
    "the hybrid engine, which is not available yet": "fuse_lora_weight unfuse_lora_weight",
}
LATER: dict[str, str] = {name: feature for feature, names in _BY_FEATURE.items() for name in names.split()}
"""Attribute: the feature it comes with."""


class ScriptAttributes(ExpertAttributes):
    """Mixin of the engine."""

    warn_unscaled_loss = True
    universal_checkpoint_info: Any = None
    loaded_checkpoint_mp_world_size: int | None = None
    loaded_checkpoint_dp_world_size: int | None = None

    @property
    def enable_backward_allreduce(self) -> bool:
        """Whether gradients are averaged between ranks; not where a 1-bit optimizer compresses the next step."""
        optimizer = self.basic_optimizer  # type: ignore[attr-defined]
        return not (isinstance(optimizer, AveragesItself) and optimizer.takes_local)

    @enable_backward_allreduce.setter
    def enable_backward_allreduce(self, value: bool) -> None:
        if value != self.enable_backward_allreduce:
            raise TrainingStateError(
                f"engine.enable_backward_allreduce = {value}: the optimizer decides whether the next step's gradients are averaged.\n"
                "  Leave it, and hold reductions back with engine.no_sync()."
            )

    @property
    def pipeline_enable_backward_allreduce(self) -> bool:
        """The same, by the name that a pipeline's engine has for it."""
        return self.enable_backward_allreduce

    @pipeline_enable_backward_allreduce.setter
    def pipeline_enable_backward_allreduce(self, value: bool) -> None:
        self.enable_backward_allreduce = value

    @property
    def data_parallel_group(self) -> Any:
        """The group of all data-parallel ranks."""
        return groups._get_data_parallel_group()

    @property
    def dp_process_group(self) -> Any:
        """The same."""
        return groups._get_data_parallel_group()

    @property
    def seq_data_parallel_group(self) -> Any:
        """The group over which parameters are sharded: data-parallel and sequence-parallel ranks."""
        return groups._get_sequence_data_parallel_group()

    def get_sequence_parallel_group(self) -> Any:
        """The group of ranks that share a sequence. KeyError without sequence parallelism."""
        return groups._get_sequence_parallel_group()

    @property
    def seq_parallel_group(self) -> Any:
        """The same; None without sequence parallelism."""
        return self.get_sequence_parallel_group() if self.mesh.size("sequence") > 1 else None  # type: ignore[attr-defined]

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Parameters whose gradients are reduced sparse."""
        if not self._config.sparse_gradients:  # type: ignore[attr-defined]
            return set()
        kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
        named = self.module.named_modules()
        return {f"{name}.weight".lstrip(".") for name, module in named if isinstance(module, kinds)}

    @property
    def gradient_average(self) -> bool:
        """Whether gradients are averaged, rather than summed, over ranks."""
        return bool(self._config.gradient_allreduce_op == "mean")  # type: ignore[attr-defined]

    @property
    def compile_config(self) -> Any:
        """The configuration's section `compile`."""
        return self._config.compile  # type: ignore[attr-defined]

    @property
    def client_optimizer(self) -> Any:
        """The optimizer that ZeRO wraps."""
        return self.basic_optimizer  # type: ignore[attr-defined]

    @property
    def _global_grad_norm(self) -> float | None:
        return self.get_global_grad_norm()  # type: ignore[attr-defined]

    def get_wall_clock_timers(self) -> Any:
        """The engine's timers."""
        return self.timers  # type: ignore[attr-defined]

    def using_bf16_optimizer(self) -> bool:
        """Whether masters belong to an optimizer beside ZeRO: never."""
        return False

    def all_gather_scalar(self, value: Tensor, dp_group: Any = None) -> list[Tensor]:
        """A scalar of every rank of the group, in order. Collective."""
        group = dp_group if dp_group is not None else self.data_parallel_group
        found = [torch.zeros_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, value, group=group)
        return found
