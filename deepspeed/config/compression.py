"""Sections that make a model smaller or sparser: `compression_training`, `quantize_training`, `eigenvalue`,
`sparse_attention`.

Read by `deepspeed.compression` and the engine. A technique of `compression_training` has settings shared by all layers
(`shared_parameters`) and groups of layers with settings of their own (`different_groups`), written once here as a
generic pair.

Sources: MoQ and XTC (arXiv:2206.01859), ZeroQuant (2206.01861), sparse attention (1904.10509, 2007.14062).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Generic, Literal, TypeVar

from annotated_types import Gt, Lt
from pydantic import Field

from deepspeed.config.base import (
    Fraction,
    Int,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Problem,
    Section,
    also,
)

Symmetry = Literal["symmetric", "asymmetric"]
Rounding = Literal["nearest", "stochastic"]
OpenFraction = Annotated[float, Gt(0), Lt(1)]


class LayerReductionConfig(Section):
    """`layer_reduction`: a student with some of its teacher's layers."""

    enabled: bool = False
    """Use it."""
    keep_number_layer: PositiveInt | None = None
    """Layers of the student."""
    module_name_prefix: str | None = None
    """Where the layers are in the model."""
    teacher_layer: tuple[NonNegativeInt, ...] = ()
    """Numbers of the teacher's layers that are copied."""
    other_module_name: Names = ()
    """Other modules that are copied."""


class MixedFp16Config(Section):
    """`fp16_mixed_quantize`: go from fp16 values to quantized ones little by little."""

    enabled: bool = False
    """Use it."""
    quantize_change_ratio: Fraction = 0.001
    """Share that changes per step."""


class SharedConfig(Section):
    """What all `shared_parameters` have."""

    enabled: bool = False
    """Use the technique."""

    @property
    def treats_whole_model(self) -> bool:
        """Whether the technique needs no groups of layers."""
        return False


class WeightQuantSharedConfig(SharedConfig):
    """Shared settings of `weight_quantization`."""

    quantizer_kernel: bool = False
    """Quantize in a fused kernel."""
    schedule_offset: NonNegativeInt = 0
    """First step that quantizes."""
    quantize_groups: PositiveInt = 1
    """Groups with a scale of their own."""
    quantize_verbose: bool = False
    """Log each change of bits."""
    quantization_type: Symmetry = "symmetric"
    """With or without a zero point."""
    rounding: Rounding = "nearest"
    """How values are rounded."""
    quantize_weight_in_forward: bool = False
    """Quantize in each forward, rather than the weight itself after a step."""
    fp16_mixed_quantize: MixedFp16Config = Field(default_factory=MixedFp16Config)
    """Little by little."""


class ActivationQuantSharedConfig(SharedConfig):
    """Shared settings of `activation_quantization`."""

    quantization_type: Symmetry = "symmetric"
    """With or without a zero point."""
    range_calibration: Literal["dynamic", "static"] = "dynamic"
    """Range from each input, or from a running average."""
    schedule_offset: NonNegativeInt = 1000
    """First step that quantizes."""


class PruningSharedConfig(SharedConfig):
    """Shared settings of row and channel pruning."""

    method: Literal["l1", "topk"] = "l1"
    """What is small: the norm, or a learned score."""
    schedule_offset: NonNegativeInt = 1000
    """First step that prunes."""


class HeadPruningSharedConfig(PruningSharedConfig):
    """Shared settings of `head_pruning`."""

    method: Literal["l1", "topk"] = "topk"
    """What is small: the norm, or a learned score."""
    num_heads: PositiveInt | None = None
    """Attention heads of a layer; needed when enabled."""

    def rules(self) -> Iterator[Problem]:
        """The number of heads cannot be read off a weight."""
        if self.enabled and self.num_heads is None:
            yield Problem(("enabled",), "pruning heads needs num_heads", "Set num_heads.")


class SparsePruningSharedConfig(SharedConfig):
    """Shared settings of `sparse_pruning`. From `block_pattern` on they belong to the method snip_momentum."""

    method: Literal["l1", "topk", "snip_momentum"] = "l1"
    """What is small: the magnitude, a learned score, or magnitude times gradient over time."""
    schedule_offset: NonNegativeInt = 1000
    """First step that prunes."""
    block_pattern: str = "4x1"
    """Block that is pruned as one."""
    dense_ratio: OpenFraction = 0.1
    """Share that is kept."""
    schedule_offset_stride: PositiveInt = 1
    """Steps between prunings."""
    schedule_offset_end: NonNegativeInt | None = None
    """Last step that prunes; `schedule_offset` when not given."""
    excluded_modules: Names = ()
    """Modules left whole."""

    @property
    def treats_whole_model(self) -> bool:
        """snip_momentum chooses for itself."""
        return self.method == "snip_momentum"

    def rules(self) -> Iterator[Problem]:
        """The end is not before the start."""
        if self.schedule_offset_end is not None and self.schedule_offset_end < self.schedule_offset:
            yield Problem(
                ("schedule_offset_end", "schedule_offset"),
                "pruning would end before it starts",
                f"Set schedule_offset_end to at least {self.schedule_offset}.",
            )


class BitRangeConfig(Section):
    """`params` of a group of `weight_quantization`."""

    start_bits: PositiveInt
    """Bits at the start."""
    target_bits: PositiveInt
    """Bits in the end."""
    quantization_period: NonNegativeInt = 1
    """Steps between two changes of bits; doubles each time. 0 goes to the target at once."""


class BitsConfig(Section):
    """`params` of a group of `activation_quantization`."""

    bits: PositiveInt
    """Bits per value."""


class DensityConfig(Section):
    """`params` of a group that is pruned."""

    dense_ratio: Fraction | None = None
    """Share that is kept; needed by every method but snip_momentum."""


SharedT = TypeVar("SharedT", bound=SharedConfig)
ParamsT = TypeVar("ParamsT", bound=Section)

# For a generic class pydantic looks for the attribute docstrings once per parametrisation, through the stack of imports:
# 0.3 s of import time for six techniques. So the two generic classes leave their texts to the reader of this file.


class GroupConfig(Section, Generic[ParamsT], use_attribute_docstrings=False):
    """One of `different_groups`: layers treated alike."""

    params: ParamsT
    """How."""
    modules: Names = ("*",)
    """Which: pieces of module names; "*" is every layer the technique can treat."""
    related_modules: tuple[Names, ...] | None = None
    """Modules that change shape with them, a list per entry of `modules`."""


class TechniqueConfig(Section, Generic[SharedT, ParamsT], use_attribute_docstrings=False):
    """A technique: shared settings, and groups of layers."""

    shared_parameters: SharedT
    """Settings for all groups."""
    different_groups: dict[str, GroupConfig[ParamsT]] = Field(default_factory=dict)
    """Groups by a name of your choice."""

    @property
    def enabled(self) -> bool:
        """Whether the technique is used."""
        return self.shared_parameters.enabled

    def rules(self) -> Iterator[Problem]:
        """Something to treat, and by how much."""
        if self.enabled and not self.different_groups and not self.shared_parameters.treats_whole_model:
            yield Problem(("shared_parameters.enabled",), "no group of layers is given", "Add one to different_groups.")
        for name, group in self.different_groups.items():
            for key, value in group.params:
                if value is None and not self.shared_parameters.treats_whole_model:
                    yield Problem((f"different_groups.{name}.params.{key}",), "it must be given", f"Set {key}.")


class CompressionConfig(Section):
    """`compression_training`: quantize, prune or shorten a model while it trains."""

    layer_reduction: LayerReductionConfig = Field(default_factory=LayerReductionConfig)
    """Fewer layers."""
    weight_quantization: TechniqueConfig[WeightQuantSharedConfig, BitRangeConfig] | None = None
    """Fewer bits per weight."""
    activation_quantization: TechniqueConfig[ActivationQuantSharedConfig, BitsConfig] | None = None
    """Fewer bits per activation."""
    sparse_pruning: TechniqueConfig[SparsePruningSharedConfig, DensityConfig] | None = None
    """Single weights to zero."""
    row_pruning: TechniqueConfig[PruningSharedConfig, DensityConfig] | None = None
    """Rows of a matrix to zero, with the columns of the next."""
    head_pruning: TechniqueConfig[HeadPruningSharedConfig, DensityConfig] | None = None
    """Attention heads to zero."""
    channel_pruning: TechniqueConfig[PruningSharedConfig, DensityConfig] | None = None
    """Channels of a convolution to zero."""


class EigenvalueConfig(Section):
    """`eigenvalue`: the largest curvature of each layer, by power iteration, as a pace for quantization."""

    enabled: bool = False
    """Compute it."""
    verbose: bool = False
    """Log it."""
    max_iter: PositiveInt = 100
    """Iterations at most."""
    tol: NonNegativeFloat = 1e-2
    """Relative change at which iteration ends."""
    stability: NonNegativeFloat = 1e-6
    """Added to a divisor."""
    gas_boundary_resolution: PositiveInt = 1
    """Steps between two computations."""
    layer_name: str = "bert.encoder.layer"
    """Where the layers are in the model."""
    layer_num: NonNegativeInt = 0
    """How many they are."""


class QuantizeBitsConfig(Section):
    """`quantize_training.quantize_bits`."""

    start_bits: PositiveInt = 16
    """Bits at the start."""
    target_bits: PositiveInt = 8
    """Bits in the end."""


class QuantizeScheduleConfig(Section):
    """`quantize_training.quantize_schedule`."""

    quantize_period: PositiveInt = 1000
    """Steps between two changes of bits."""
    schedule_offset: NonNegativeInt = 1000
    """First step that quantizes."""


class QuantizeAlgoConfig(Section):
    """`quantize_training.quantize-algo`."""

    q_type: Symmetry = "symmetric"
    """With or without a zero point."""
    rounding: Rounding = "nearest"
    """How values are rounded."""


class QuantizeTrainingConfig(Section):
    """`quantize_training`: the first form of mixture-of-quantization training (MoQ)."""

    enabled: bool = False
    """Use it."""
    quantize_verbose: bool = False
    """Log each change of bits."""
    quantizer_kernel: bool = False
    """Quantize in a fused kernel."""
    quantize_type: Symmetry = "symmetric"
    """With or without a zero point."""
    rounding: Rounding = "nearest"
    """How values are rounded."""
    quantize_algo: Annotated[QuantizeAlgoConfig, also("quantize-algo", "quantize_algo")] = Field(
        default_factory=QuantizeAlgoConfig
    )
    """The same two, in a section."""
    quantize_bits: QuantizeBitsConfig = Field(default_factory=QuantizeBitsConfig)
    """From how many bits to how many."""
    quantize_schedule: QuantizeScheduleConfig = Field(default_factory=QuantizeScheduleConfig)
    """When."""
    quantize_groups: PositiveInt = 1
    """Groups with a scale of their own."""
    fp16_mixed_quantize: MixedFp16Config = Field(default_factory=MixedFp16Config)
    """Little by little."""
    eigenvalue: EigenvalueConfig = Field(default_factory=EigenvalueConfig)
    """Pace by curvature."""


class SparseAttentionConfig(Section):
    """`sparse_attention`: attention over blocks of a pattern. The section's presence enables it."""

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer"] = "fixed"
    """The pattern."""
    block: PositiveInt = 16
    """Tokens of a block's side."""
    different_layout_per_head: bool = False
    """A pattern per head; all but dense."""
    num_local_blocks: PositiveInt = 4
    """Blocks of a local window; fixed."""
    num_global_blocks: NonNegativeInt = 1
    """Blocks seen from everywhere; fixed, bigbird."""
    attention: Literal["unidirectional", "bidirectional"] = "bidirectional"
    """Whether tokens see what comes later; fixed, variable."""
    horizontal_global_attention: bool = False
    """Global blocks see everything too; fixed, variable."""
    num_different_global_patterns: PositiveInt = 1
    """Patterns of global blocks over the heads; fixed."""
    num_random_blocks: NonNegativeInt = 0
    """Random blocks per row; variable, bigbird."""
    local_window_blocks: tuple[PositiveInt, ...] = (4,)
    """Widths of local windows, the last repeated; variable."""
    global_block_indices: tuple[NonNegativeInt, ...] = (0,)
    """Blocks seen from everywhere; variable, bslongformer."""
    global_block_end_indices: tuple[Int, ...] | None = None
    """Ends of ranges that start at those; variable, bslongformer."""
    num_sliding_window_blocks: PositiveInt = 3
    """Width of the sliding window; bigbird, bslongformer."""
