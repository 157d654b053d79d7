"""Sections that change how a model executes: `compile`, `hybrid_engine` and `weight_quantization`.

Read by the engine and by `deepspeed.inference`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deepspeed.config.base import NonNegativeInt, PositiveInt, Section, Size


class CompileConfig(Section):
    """`compile`: DeepCompile, the compiler pass that schedules ZeRO's communication inside the graph.

    Takes effect when the script calls `engine.compile()`.
    """

    deepcompile: bool = False
    """Use it."""
    passes: tuple[Literal["z1", "z3", "autosp", "autotp"], ...] | None = None
    """The passes to run; chosen by the ZeRO stage when not given."""
    free_activation: bool = False
    """Free activations that are not needed any more."""
    free_activation_threshold: Size = 10 * 1024 * 1024
    """Bytes from which an activation is freed."""
    offload_activation: bool = False
    """Move activations to CPU memory."""
    offload_activation_pin_memory: bool = True
    """Pin that memory."""
    offload_opt_states: bool = False
    """Move optimizer states to CPU memory while they are not used."""
    offload_parameters: bool = False
    """Move parameters to CPU memory while they are not used."""
    double_buffer: bool = True
    """Two buffers for reductions: one fills while the other is sent."""
    symmetric_memory: bool = False
    """Use torch's symmetric memory for all-gathers."""
    debug_log: bool = False
    """Write graphs and plans."""
    sync_before_reduce: bool = False
    """Wait for the device before each reduction; for debugging, like the next three."""
    sync_after_reduce: bool = False
    """Wait after each reduction."""
    sync_before_allgather: bool = False
    """Wait before each all-gather."""
    sync_after_allgather: bool = False
    """Wait after each all-gather."""
    keep_int_input_tensors: bool = True
    """Keep integer inputs for backward."""
    keep_all_input_tensors: bool = False
    """Keep all inputs for backward."""
    autoep_non_moe: bool = False
    """With `expert_parallel`: compile the parts without experts."""

    @property
    def splits_sequences(self) -> bool:
        """Whether all that is asked for is that sequences are split, which needs no compiler here."""
        return self.deepcompile and self.passes == ("autosp",)


class HybridEngineConfig(Section):
    """`hybrid_engine`: one model that trains and generates by turns, for RLHF."""

    enabled: bool = False
    """Use it."""
    max_out_tokens: PositiveInt = 512
    """Tokens of prompt and answer together."""
    inference_tp_size: PositiveInt = 1
    """Tensor-parallel ranks while generating."""
    release_inference_cache: bool = False
    """Free the inference memory before training goes on."""
    pin_parameters: bool = True
    """Keep pinned copies for the exchange."""
    tp_gather_partition_size: PositiveInt = 8
    """Layers gathered together while generating."""
    enable_cuda_graph: bool = False
    """Generate through a CUDA graph."""


class QuantizationSpecConfig(Section):
    """How one weight is quantized."""

    num_bits: PositiveInt
    """Bits per value."""
    group_size: PositiveInt
    """Values that share a scale."""
    group_dim: NonNegativeInt
    """Dim along which groups lie."""
    symmetric: bool
    """Without a zero point."""


class WeightQuantConfig(Section):
    """`weight_quantization`: keep weights quantized in memory, for inference under ZeRO stage 3."""

    enabled: bool = True
    """Nothing happens unless one of the last two fields says where."""
    num_bits: PositiveInt = 8
    """Bits per value."""
    q_type: str = "symmetric"
    """With or without a zero point."""
    q_groups: PositiveInt = 1
    """Groups with a scale of their own."""
    quantized_initialization: Annotated[
        QuantizationSpecConfig | None, BeforeValidator(lambda value: None if value == {} else value)
    ] = None
    """Quantize every weight as it is created; {} is off."""
    post_init_quant: dict[str, QuantizationSpecConfig] = Field(default_factory=dict)
    """Quantize after creation: a piece of a module's name, and how."""
