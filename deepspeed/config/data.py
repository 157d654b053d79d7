"""Sections about what is fed to the model when: `data_efficiency`, `curriculum_learning`, `progressive_layer_drop`.

Read by `deepspeed.data` and the engine. `curriculum_learning` at the top level is the older form of
`data_efficiency.data_sampling.curriculum_learning`; both describe a difficulty that grows with the step.

Sources: curriculum learning (arXiv:2108.06084), random-LTD (2211.11586), progressive layer dropping (2010.13369).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from deepspeed.config.base import Fraction, Int, NonNegativeFloat, NonNegativeInt, PositiveInt, Problem, Section


class ScheduleConfig(Section):
    """`schedule_config`: the numbers of a difficulty schedule; which are needed depends on `schedule_type`."""

    total_curriculum_step: PositiveInt | None = None
    """Steps until the largest difficulty; fixed_linear and fixed_root."""
    difficulty_step: PositiveInt | None = None
    """Difficulties are multiples of this; fixed_linear and fixed_root."""
    root_degree: PositiveInt | None = None
    """Difficulty grows like this root of the step; fixed_root."""
    difficulty: tuple[Int, ...] | None = None
    """The difficulties, one after the other; fixed_discrete."""
    max_step: tuple[Int, ...] | None = None
    """The last step of each but the last; fixed_discrete."""


_NEEDED_BY_SCHEDULE: dict[str, tuple[str, ...]] = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}


class CurriculumConfig(Section):
    """A difficulty that grows with the step."""

    min_difficulty: NonNegativeInt | None = None
    """At the first step."""
    max_difficulty: NonNegativeInt | None = None
    """At the end of the schedule."""
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"] | None = None
    """How it grows; custom is a function set by `engine.set_custom_curriculum_learning_schedule`."""
    schedule_config: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """The schedule's numbers."""

    def rules(self) -> Iterator[Problem]:
        """A schedule has its numbers."""
        schedule = self.schedule_config
        for key in _NEEDED_BY_SCHEDULE.get(self.schedule_type or "custom", ()):
            if getattr(schedule, key) is None:
                yield Problem(("schedule_type",), f"it needs schedule_config.{key}", f"Set schedule_config.{key}.")
        if schedule.difficulty and schedule.max_step and len(schedule.difficulty) != len(schedule.max_step) + 1:
            yield Problem(
                ("schedule_config.difficulty", "schedule_config.max_step"),
                "there is one difficulty more than there are steps, for the time after the last",
                "Make difficulty one longer than max_step.",
            )


class CurriculumLearningConfig(CurriculumConfig):
    """`curriculum_learning` at the top level: shorter sequences first."""

    enabled: bool = False
    """Use it."""
    curriculum_type: str = "seqlen"
    """What is difficult; for seqlen the engine passes `curriculum_seqlen` to forward."""


class CurriculumMetricConfig(CurriculumConfig):
    """One metric of `curriculum_metrics`."""

    index_to_sample_path: Path | None = None
    """Index from difficulty to samples, as the data analyzer writes it."""
    index_to_metric_path: Path | None = None
    """Index from position to difficulty."""
    difficulty_type: Literal["value", "percentile"] = "value"
    """What a difficulty is: the metric itself, or a percentile of it."""
    clustering_type: Literal["schedule_based", "single_cluster"] = "schedule_based"
    """Group samples by difficulty, or keep one group."""


class SamplingCurriculumConfig(Section):
    """`data_sampling.curriculum_learning`: draw samples by difficulty."""

    enabled: bool = False
    """Use it. Needs `curriculum_metrics`."""
    data_cluster_path: Path | None = None
    """Folder for groups of samples."""
    curriculum_metrics: dict[str, CurriculumMetricConfig] = Field(default_factory=dict)
    """Metrics by name; a sample must be easy enough in all."""

    def rules(self) -> Iterator[Problem]:
        """A curriculum has a metric."""
        if self.enabled and not self.curriculum_metrics:
            yield Problem(("enabled",), "a curriculum needs a metric", "Add one to curriculum_metrics.")


class DynamicBatchingConfig(Section):
    """`data_sampling.dynamic_batching`: batches of equally many tokens instead of samples."""

    enabled: bool = False
    """Use it. Needs `max_tokens`."""
    lr_scaling_method: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows the batch size."""
    min_batch_size: PositiveInt = 1
    """Fewest samples."""
    max_batch_size: PositiveInt | None = None
    """Most samples."""
    sequence_picking_order: Literal["random", "seqlen", "dataloader"] = "dataloader"
    """In which order samples fill a batch."""
    max_tokens: PositiveInt | None = None
    """Tokens in a batch."""
    metrics_path: Path | None = None
    """Sequence lengths, as the data analyzer writes them."""
    verbose: bool = False
    """Log the batches."""

    def rules(self) -> Iterator[Problem]:
        """A token budget."""
        if self.enabled and self.max_tokens is None:
            yield Problem(("enabled",), "batches by tokens need max_tokens", "Set max_tokens.")


class DataSamplingConfig(Section):
    """`data_sampling`: which samples come when."""

    enabled: bool = False
    """Use this part."""
    num_epochs: PositiveInt = 1000
    """Epochs the sampler prepares for."""
    num_workers: NonNegativeInt = 0
    """Loader processes."""
    pin_memory: bool = False
    """Pin batches in memory."""
    curriculum_learning: SamplingCurriculumConfig = Field(default_factory=SamplingCurriculumConfig)
    """Easy samples first."""
    dynamic_batching: DynamicBatchingConfig = Field(default_factory=DynamicBatchingConfig)
    """Batches by tokens."""


class RandomLtdStepsConfig(Section):
    """`random_ltd_schedule.schedule_config`."""

    require_steps: PositiveInt | None = None
    """Steps until all tokens are kept."""
    seq_per_step: PositiveInt | None = None
    """Tokens added at a time."""


class RandomLtdScheduleConfig(Section):
    """`random_ltd_schedule`: how many tokens are kept when."""

    min_value: PositiveInt | None = None
    """Tokens kept at the start."""
    max_value: PositiveInt | None = None
    """Tokens of a full sequence."""
    schedule_type: Literal["fixed_linear"] = "fixed_linear"
    """How the number grows."""
    schedule_config: RandomLtdStepsConfig = Field(default_factory=RandomLtdStepsConfig)
    """The schedule's numbers."""


class TokenLrScheduleConfig(Section, extra="allow"):
    """`layer_token_lr_schedule`: a learning rate that follows the tokens seen per layer."""

    enabled: bool = False
    """Use it."""


class RandomLtdConfig(Section):
    """`data_routing.random_ltd`: middle layers see a random part of the tokens."""

    enabled: bool = False
    """Use it."""
    total_layer_num: PositiveInt | None = None
    """Layers of the model."""
    random_ltd_layer_num: PositiveInt | None = None
    """Layers that see a part."""
    random_ltd_layer_id: tuple[NonNegativeInt, ...] | None = None
    """Their numbers."""
    model_mask_name: str | None = None
    """Argument of a layer that holds the attention mask."""
    model_type: Literal["decoder", "encoder"] | None = None
    """Whether tokens see only what is before them."""
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] | None = None
    """Order of a layer's input dims."""
    random_ltd_schedule: RandomLtdScheduleConfig = Field(default_factory=RandomLtdScheduleConfig)
    """How many tokens are kept when."""
    layer_token_lr_schedule: TokenLrScheduleConfig = Field(default_factory=TokenLrScheduleConfig)
    """A learning rate that follows."""

    def rules(self) -> Iterator[Problem]:
        """As many layer numbers as layers."""
        count, numbers = self.random_ltd_layer_num, self.random_ltd_layer_id
        if count is not None and numbers is not None and len(numbers) != count:
            yield Problem(
                ("random_ltd_layer_num", "random_ltd_layer_id"),
                f"{len(numbers)} layers are listed",
                f"Set random_ltd_layer_num to {len(numbers)}, or mend the list.",
            )


class DataRoutingConfig(Section):
    """`data_routing`: which tokens pass through which layers."""

    enabled: bool = False
    """Use this part."""
    random_ltd: RandomLtdConfig = Field(default_factory=RandomLtdConfig)
    """Random layerwise token dropping."""


class DataEfficiencyConfig(Section):
    """`data_efficiency`: train on less data, or fewer tokens, for the same quality."""

    enabled: bool = False
    """Master switch over both parts."""
    seed: Int = 1234
    """Seed of the sampler."""
    data_sampling: DataSamplingConfig = Field(default_factory=DataSamplingConfig)
    """Which samples come when."""
    data_routing: DataRoutingConfig = Field(default_factory=DataRoutingConfig)
    """Which tokens pass through which layers."""


class ProgressiveLayerDropConfig(Section):
    """`progressive_layer_drop`: skip layers at random, more of them as training goes on."""

    enabled: bool = False
    """Use it. The engine passes `progressive_layer_drop` and `pld_theta` to forward."""
    theta: Fraction = 1.0
    """Share of layers kept in the end."""
    gamma: NonNegativeFloat = 0.001
    """How fast that share is reached."""
