"""Sections that choose other settings for a run: `autotuning` and `elasticity`.

Read by `deepspeed.autotuning`, `deepspeed.elasticity` and the launcher, before training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from deepspeed.config.base import NonNegativeFloat, PositiveInt, Problem, Section, also

Folder = Annotated[str, StringConstraints(min_length=1)]


class ModelInfoConfig(Section):
    """`autotuning.model_info`: what is known of the model, so that a profiling run can be left out."""

    profile: bool = False
    """Measure it."""
    num_params: PositiveInt | None = None
    """Parameters."""
    hidden_size: PositiveInt | None = None
    """Width."""
    num_layers: PositiveInt | None = None
    """Depth."""


class AutotuningConfig(Section):
    """`autotuning`: try configurations and keep the best."""

    enabled: bool = False
    """Tune when the launcher is asked to."""
    fast: bool = True
    """Tune micro-batch sizes only."""
    results_dir: Folder = "autotuning_results"
    """Folder for results."""
    exps_dir: Folder = "autotuning_exps"
    """Folder for experiments."""
    overwrite: bool = True
    """Run experiments again that have results."""
    metric: Literal["throughput", "latency", "flops"] = "throughput"
    """What "best" means."""
    metric_path: Path | None = None
    """File in which a run leaves its metric."""
    start_profile_step: PositiveInt = 3
    """First step measured; those before it warm up."""
    end_profile_step: PositiveInt = 5
    """Last step measured; the run ends there."""
    tuner_type: Literal["gridsearch", "random", "model_based"] = "gridsearch"
    """In which order configurations are tried."""
    tuner_early_stopping: PositiveInt = 5
    """Experiments without improvement before the search ends."""
    tuner_num_trials: PositiveInt = 50
    """Experiments at most."""
    arg_mappings: dict[str, str] | None = None
    """From configuration keys to the script's own arguments."""
    mp_size: PositiveInt = 1
    """Ranks that share one copy of the model."""
    max_train_batch_size: PositiveInt | None = None
    """Largest `train_batch_size` tried; no bound when not given."""
    min_train_batch_size: PositiveInt = 1
    """Smallest."""
    max_train_micro_batch_size_per_gpu: PositiveInt = 1024
    """Largest micro-batch tried."""
    min_train_micro_batch_size_per_gpu: PositiveInt = 1
    """Smallest."""
    num_tuning_micro_batch_sizes: PositiveInt = 3
    """Micro-batch sizes tried."""
    model_info_path: Path | None = None
    """File in which a profiling run leaves what it found."""
    model_info: ModelInfoConfig | None = None
    """What is known of the model."""


class ElasticityConfig(Section):
    """`elasticity`: batch sizes that stay the same over many numbers of GPUs. Overrides the three batch keys."""

    enabled: bool = False
    """Compute the batch sizes."""
    max_train_batch_size: PositiveInt = 2000
    """Largest `train_batch_size`; must be given when enabled."""
    micro_batch_sizes: tuple[PositiveInt, ...] = (2, 4, 6)
    """Micro-batches a GPU can hold; must be given when enabled."""
    min_gpus: PositiveInt = 1
    """Fewest GPUs."""
    max_gpus: PositiveInt = 10000
    """Most GPUs."""
    min_time: NonNegativeFloat = 0.0
    """Minutes a job keeps its GPUs before it may be resized."""
    prefer_larger_batch: Annotated[bool, also("prefer_larger_batch", "prefer_large_batch")] = True
    """Take the larger of two batches that fit equally many numbers of GPUs."""
    version: float = 0.2
    """0.2 counts nodes and model parallelism; 0.1 counts GPUs."""
    ignore_non_elastic_batch_info: bool = False
    """Allow the three batch keys beside this section; they are not used."""
    num_gpus_per_node: PositiveInt = 1
    """With version 0.2: GPUs come in this number."""
    model_parallel_size: PositiveInt = 1
    """Ranks that share one copy of the model; above 1 needs version 0.2."""

    def rules(self) -> Iterator[Problem]:
        """Bounds in order, a version that exists, and what `enabled` needs."""
        if self.min_gpus > self.max_gpus:
            yield Problem(("min_gpus", "max_gpus"), "the bounds are the wrong way round", "Exchange them.")
        if self.version not in (0.1, 0.2):
            yield Problem(("version",), "there is no such version", "Use 0.1 or 0.2.")
        if self.model_parallel_size > 1 and self.version != 0.2:
            yield Problem(
                ("model_parallel_size", "version"), "model parallelism needs version 0.2", "Set version to 0.2."
            )
        for key in ("max_train_batch_size", "micro_batch_sizes"):
            if self.enabled and key not in self.model_fields_set:
                yield Problem(("enabled",), f"{key} must be given too", f"Set {key}.")
