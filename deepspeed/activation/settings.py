"""What `deepspeed.checkpointing.configure` said: the options of every checkpoint from then on.

Read by `activation.call` at each call. One object for the process, because the contract's `checkpoint` takes no
options of its own; the engine's blocks bring theirs (`Settings.of_section`).

Invariant: settings are frozen; changing one replaces the object, so a checkpoint that is alive keeps those it was made
with. Source: the public contract of the original's `deepspeed.checkpointing`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from deepspeed.activation.saved import Arena, ModelParallel
from deepspeed.config import ActivationCheckpointingConfig, Config, load_config
from deepspeed.config.legacy_config import DeepSpeedConfig
from deepspeed.utils.errors import DeepSpeedConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a checkpoint. `arena` exists where saved inputs are laid into one buffer."""

    partition_activations: bool = False
    checkpoint_in_cpu: bool = False
    synchronize: bool = False
    profile: bool = False
    num_checkpoints: int | None = None
    ranks: ModelParallel = field(default_factory=ModelParallel)
    arena: Arena | None = None

    @property
    def moves_inputs(self) -> bool:
        """Whether saved inputs rest anywhere but where they are."""
        return self.checkpoint_in_cpu or self.arena is not None or (self.partition_activations and self.ranks.size > 1)

    @classmethod
    def of_section(
        cls, section: ActivationCheckpointingConfig, ranks: ModelParallel | None = None, **overrides: Any
    ) -> Settings:
        """The settings a configuration's section describes; `overrides` that are None say nothing."""
        values = {
            "partition_activations": section.partition_activations,
            "contiguous_checkpointing": section.contiguous_memory_optimization,
            "num_checkpoints": section.number_checkpoints,
            "checkpoint_in_cpu": section.cpu_checkpointing,
            "synchronize": section.synchronize_checkpoint_boundary,
            "profile": section.profile,
        } | {name: value for name, value in overrides.items() if value is not None}
        is_contiguous = values.pop("contiguous_checkpointing")
        count = values["num_checkpoints"]
        if is_contiguous and not values["partition_activations"]:
            raise DeepSpeedConfigError(
                "contiguous_checkpointing without partition_activations.\n"
                "  Set partition_activations (activation_checkpointing.partition_activations), or leave the buffer out."
            )
        if is_contiguous and not count:
            raise DeepSpeedConfigError(
                f"contiguous_checkpointing with num_checkpoints = {count}: the buffer needs to know how many pieces it has.\n"
                "  Give the number of checkpoints in one forward (activation_checkpointing.number_checkpoints)."
            )
        return cls(ranks=ranks or ModelParallel(), arena=Arena(count) if is_contiguous else None, **values)


@dataclass
class _Configured:
    settings: Settings = field(default_factory=Settings)
    is_configured: bool = False


_configured = _Configured()


def current() -> Settings:
    """The settings of a checkpoint made now."""
    return _configured.settings


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how `checkpoint` keeps inputs. Starts from the defaults, then takes the configuration, then the arguments.

    mpu_: tells the model-parallel ranks (`get_model_parallel_rank/group/world_size`, or Megatron's `tensor_` names);
        None for none. Inputs of a checkpoint must be equal on all of them if they are partitioned.
    deepspeed_config: dict, path, base64 or a configuration object; its `activation_checkpointing` section is read.
    partition_activations: each model-parallel rank keeps an equal share of every saved activation.
    contiguous_checkpointing: lay them into one buffer; needs `partition_activations` and `num_checkpoints`.
    checkpoint_in_cpu: keep them in CPU memory.
    synchronize, profile: wait for the device around each checkpoint; time it.

    Raises DeepSpeedConfigError (a ValueError and AssertionError) for options that contradict each other.
    """
    _configured.settings = Settings.of_section(
        _section_of(deepspeed_config),
        ModelParallel.of(mpu_),
        partition_activations=partition_activations,
        contiguous_checkpointing=contiguous_checkpointing,
        num_checkpoints=num_checkpoints,
        checkpoint_in_cpu=checkpoint_in_cpu,
        synchronize=synchronize,
        profile=profile,
    )
    _configured.is_configured = True


def _section_of(config: Any) -> ActivationCheckpointingConfig:
    if config is None:
        return ActivationCheckpointingConfig()
    if isinstance(config, DeepSpeedConfig):
        return config.activation_checkpointing
    return (config if isinstance(config, Config) else load_config(config)).activation_checkpointing


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _configured.is_configured


def reset() -> None:
    """Free the contiguous buffers, for instance before an evaluation; the next checkpoint makes them again."""
    if _configured.settings.arena is not None:
        _configured.settings.arena.clear()


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Switch the partitioning of saved activations on or off."""
    _configured.settings = dataclasses.replace(_configured.settings, partition_activations=partition_activation)


def set_num_layers(nlayers: int) -> None:
    """Set the number of checkpoints in one forward; a contiguous buffer is made anew."""
    before = _configured.settings
    arena = Arena(nlayers) if before.arena is not None else None
    _configured.settings = dataclasses.replace(before, num_checkpoints=nlayers, arena=arena)
