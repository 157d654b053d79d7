"""Sections that split a model: `pipeline`, `tensor_parallel` and `expert_parallel`.

Read by `deepspeed.parallel` and the pipeline engine. Sequence parallelism has one top-level key, in `root.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StrictBool

from deepspeed.config.base import (
    Dtype,
    Int,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Problem,
    Section,
    Size,
    also,
)

TP_KEY = "tp"
"""How the JSON of inference, and the files that it names, spell tensor parallelism."""


class PipelineConfig(Section, extra="allow"):
    """`pipeline`: how the pipeline engine runs. Other keys are kept as they are."""

    stages: Literal["auto"] | PositiveInt = "auto"
    """Pipeline stages; "auto" takes the module's."""
    partition: str = "best"
    """How layers are shared out; "best" leaves it to the module."""
    seed_layers: bool = False
    """Seed each layer by its number, so that weights do not depend on the stages."""
    activation_checkpoint_interval: NonNegativeInt = 0
    """Layers between activation checkpoints; above 0 it overrides the module's."""
    pipe_partitioned: bool = True
    """Send a share of an activation per tensor-parallel rank, and gather on arrival."""
    grad_partitioned: bool = True
    """The same for its gradient."""
    use_reentrant: bool = True
    """Which of PyTorch's two activation checkpointing modes to use."""
    schedule: str = "auto"
    """"gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v", or a CSV file of actions, a row per rank; "auto":
    1f1b, or by how many stages a rank has and how they lie; "generated": made for what the stages took in the first two batches."""
    max_activation_memory: Size = 0
    """Bytes of activations that a rank may keep alive under a "generated" schedule; 0: what the "auto" one takes at its peak."""
    post_validation: bool = False
    """Step without waiting for the norm of all stages, and take the step back, bit for bit, where that turns out to clip or skip it;
    for one more copy of masters, states and gradients."""


class TpSizeConfig(Section):
    """`tensor_parallel.tensor_parallel`: the degree and the group."""

    tp_size: PositiveInt = 1
    """Tensor-parallel ranks."""
    tp_grain_size: PositiveInt = 1
    """Shard sizes are multiples of this."""
    mpu: Any = None
    """An object that knows the group, from Python."""
    tp_group: Any = None
    """The group itself, from Python."""


class LayerSpecConfig(Section):
    """One item of `layer_specs`: which parameters, and how they are cut."""

    patterns: Names
    """Regular expressions over parameter names."""
    partition_type: Literal["row", "column", "skip"] = "column"
    """Cut inputs, cut outputs, or leave whole."""
    shape: Any = None
    """How a fused parameter divides into parts, each cut by itself."""
    partition_dim: Int | None = None
    """Dim that is cut, where it is not the usual one."""
    model_types: Names | None = None
    """Model types the item is for; all when not given."""
    gather_output: bool = False
    """Have every rank get all outputs of the layer; of columns."""
    grad_allreduce: bool = False
    """Sum the gradient of the layer over the ranks; of what is skipped."""


class PartitionConfig(Section):
    """`partition_config`: rules of your own for cutting parameters."""

    use_default_specs: bool = True
    """Keep the preset's rules behind these."""
    layer_specs: tuple[LayerSpecConfig, ...] = ()
    """The rules; the first match holds."""
    tp_size: PositiveInt | None = None
    """Tensor-parallel ranks, where `autotp_size` is repeated here."""
    embedding_partition_dim: Literal[0, 1] = 1
    """Cut embeddings that a rule names over the words (0) or over the width (1)."""
    lm_head_patterns: Names = ("lm_head", "embed_out")
    """Names of heads."""
    strict_mode: bool = False
    """Refuse rules that match no layer."""


class TensorParallelConfig(Section):
    """`tensor_parallel`: cut a model's layers over ranks while training, without changing the model (AutoTP).

    Which rules hold: `partition_config`, else `preset_model`, else the Hugging Face model's own plan, else names.
    """

    autotp_size: NonNegativeInt = 0
    """Tensor-parallel ranks; 0 is off."""
    dtype: Dtype = torch.float16
    """Dtype of the cut weights."""
    tp_overlap_comm: bool = False
    """Overlap the all-reduce of input gradients with the weight gradients."""
    sequence_parallel_regions: bool = False
    """Between cut layers each rank has the hidden states of some tokens only; lengths have to be multiples of the ranks."""
    vocab_parallel_lm_head: bool | None = None
    """Cut the last layer over the vocabulary; decided by the model when not given."""
    vocab_parallel_ce_backend: Literal["torch", "liger"] = "torch"
    """Who computes the cross entropy of such a layer."""
    tensor_parallel: Annotated[TpSizeConfig, also("tensor_parallel", "tp")] = Field(default_factory=TpSizeConfig)
    """Degree and group."""
    injection_policy_tuple: tuple[Any, ...] | None = None
    """Names of the layers whose outputs are reduced."""
    preset_model: Literal["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"] | None = None
    """Rules for a known family of models."""
    partition_config: PartitionConfig | None = None
    """Rules of your own."""
    keep_module_on_host: bool = False
    """Cut on the CPU and leave it there."""
    replace_with_kernel_inject: Annotated[bool, also("replace_with_kernel_inject", "kernel_inject")] = False
    """Use fused inference kernels."""


class ExpertParallelConfig(Section):
    """`expert_parallel`: spread a mixture-of-experts model's experts over ranks, without changing the model (AutoEP).

    What is not given comes from the preset.
    """

    enabled: bool = False
    """Spread them."""
    autoep_size: PositiveInt = 1
    """Expert-parallel ranks; must divide the experts of every layer."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that cut each expert; 1 at ZeRO stage 3."""
    preset_model: Literal["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"] | None = (
        None
    )
    """Names and routing of a known family of models."""
    moe_layer_pattern: str | None = None
    """Regular expression over the names of the layers with experts."""
    router_pattern: str | None = None
    """Attribute of such a layer that holds the router."""
    expert_pattern: str | None = None
    """Attribute that holds the experts."""
    shared_experts_pattern: str | None = None
    """Attribute that holds experts every token visits."""
    shared_experts_gate_pattern: str | None = None
    """Attribute that holds their gate."""
    use_grouped_mm: bool = True
    """One grouped matrix product for all experts of a rank."""
    disable_triton_grouped_mm: bool = False
    """Leave Triton out of it."""
    score_func: Literal["auto", "softmax", "sigmoid"] = "auto"
    """From router outputs to scores."""
    score_apply: Literal["auto", "pre", "post"] = "auto"
    """Scale a token by its score before or after the expert."""
    route_norm: bool | None = None
    """Let the scores of a token's experts sum to one."""
    route_scale: NonNegativeFloat = 1.0
    """Factor on all scores."""
    top_k: Literal["auto"] | PositiveInt = "auto"
    """Experts per token."""
    routed_scaling_factor: Literal["auto"] | NonNegativeFloat = "auto"
    """Factor on the output of routed experts."""
    num_expert_groups: PositiveInt | None = None
    """Groups of experts; must divide the experts. With `num_limited_groups`."""
    num_limited_groups: PositiveInt | None = None
    """Groups a token may visit; at most `num_expert_groups`."""
    load_balance_coeff: None = None
    """Only null: balancing is the model's own loss."""
    expert_w1: str | None = None
    """Name of an expert's gate weight."""
    expert_w2: str | None = None
    """Name of its output weight."""
    expert_w3: str | None = None
    """Name of its input weight; absent takes the preset's, null means fused with the gate's."""
    num_experts_attr: str | None = None
    """Attribute of the model's config that counts experts."""
    top_k_attr: str | None = None
    """Attribute of the model's config that holds `top_k`."""
    has_shared_experts: bool | None = None
    """Whether there are experts every token visits."""
    expert_activation: str | None = None
    """Activation inside an expert."""
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = "auto"
    """How the outputs of a token's experts are summed."""
    row_weighting_impl: Literal["auto", "eager", "fused"] = "auto"
    """How rows are scaled by their scores."""
    gate_up_impl: Literal["separate", "fused"] = "separate"
    """One or two matrix products before the activation."""
    comm_backend: Literal["comm", "deepep"] = "comm"
    """The all-to-all: torch's or DeepEP's."""
    comm_num_sm: PositiveInt = 12
    """Multiprocessors for DeepEP."""
    comm_qp_margin: NonNegativeInt = 4
    """Spare queue pairs for DeepEP."""
    comm_max_tokens_per_rank: Size = 0
    """Tokens a rank may receive; above 0 for DeepEP."""
    validate_folding_routing: StrictBool = False
    """Check the routing when ranks are shared with tensor parallelism."""
    async_split_plan: StrictBool = False
    """Exchange token counts while scores are computed."""

    def rules(self) -> Iterator[Problem]:
        """Groups come in pairs; attribute names are direct children; DeepEP needs a bound."""
        groups, limited = self.num_expert_groups, self.num_limited_groups
        if (groups is None) != (limited is None) or (groups is not None and limited is not None and limited > groups):
            yield Problem(
                ("num_limited_groups", "num_expert_groups"),
                "the two go together, and a token cannot visit more groups than there are",
                "Give both, num_limited_groups at most num_expert_groups, or neither.",
            )
        if self.comm_backend == "deepep" and self.comm_max_tokens_per_rank == 0:
            yield Problem(
                ("comm_backend", "comm_max_tokens_per_rank"),
                "DeepEP needs a bound on received tokens",
                "Set comm_max_tokens_per_rank above 0.",
            )
        for key in ("router_pattern", "expert_pattern", "shared_experts_pattern", "shared_experts_gate_pattern"):
            if "." in (getattr(self, key) or ""):
                yield Problem(
                    (key,), "this names a direct child of the layer", "Give the attribute alone, without dots."
                )
