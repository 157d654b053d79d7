"""Sections that choose other settings for a run: `autotuning` and `elasticity`.

Read by `deepspeed.autotuning`, `deepspeed.elasticity` and the launcher, before training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from deepspeed.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section, also

Folder = Annotated[str, StringConstraints(min_length=1)]


class ModelInfoConfig(Section):
    """`autotuning.model_info`: what is known of the model. The autotuner looks for itself, and says so where it is given."""

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
    """Tune when the launcher is asked to (`deepspeed --autotuning`); in training it has no effect."""
    fast: bool = True
    """Tune micro-batch sizes and ZeRO stages only; false adds buckets, prefetch, recomputation and offload."""
    results_dir: Folder = "autotuning_results"
    """Folder for results: a folder per trial, `summary.txt`, `report.html`, `ds_config_optimal.json`, `cmd_optimal.txt`."""
    exps_dir: Folder = "autotuning_exps"
    """Folder for experiments: a JSON each, before it runs."""
    overwrite: bool = True
    """Start over where an earlier search ended; one that was interrupted is always continued."""
    metric: Literal["throughput", "latency", "flops"] = "throughput"
    """What "best" means: most samples per second, least seconds per step, or most operations per second."""
    metric_path: Path | None = None
    """File in which a run leaves its metric; written by the autotuner. A run that has it ends after `end_profile_step`."""
    start_profile_step: PositiveInt = 3
    """First step measured; those before it warm up."""
    end_profile_step: PositiveInt = 5
    """Last step measured; the run ends there."""
    tuner_type: Literal["gridsearch", "random", "model_based"] = "gridsearch"
    """In which order configurations are tried: as they are listed, at random, or the most promising first (when not given)."""
    tuner_early_stopping: PositiveInt = 5
    """Experiments without improvement before the search ends."""
    tuner_num_trials: PositiveInt = 50
    """Experiments at most."""
    arg_mappings: dict[str, str] | None = None
    """From configuration keys to the script's own arguments."""
    mp_size: PositiveInt = 1
    """Ranks that share one copy of the model (a script's own model parallelism)."""
    max_train_batch_size: PositiveInt | None = None
    """Largest `train_batch_size` tried; no bound when not given."""
    min_train_batch_size: PositiveInt = 1
    """Smallest."""
    max_train_micro_batch_size_per_gpu: PositiveInt = 1024
    """Largest micro-batch tried."""
    min_train_micro_batch_size_per_gpu: PositiveInt = 1
    """Smallest."""
    num_tuning_micro_batch_sizes: PositiveInt = 3
    """Micro-batch sizes tried for each choice of everything else."""
    model_info_path: Path | None = None
    """File in which a profiling run leaves what it found."""
    model_info: ModelInfoConfig | None = None
    """What is known of the model; the autotuner looks for itself."""
    trial_timeout: PositiveInt = 1800
    """Seconds after which a trial that shows no sign of progress is ended; less where trials before it were quicker."""
    device_memory_gb: PositiveFloat | None = None
    """GiB that a rank may use; measured when not given."""

    def rules(self) -> Iterator[Problem]:
        """Bounds in order."""
        for low, high in (
            ("start_profile_step", "end_profile_step"),
            ("min_train_batch_size", "max_train_batch_size"),
            ("min_train_micro_batch_size_per_gpu", "max_train_micro_batch_size_per_gpu"),
        ):
            most = getattr(self, high)
            if most is not None and getattr(self, low) > most:
                yield Problem((low, high), "the bounds are the wrong way round", "Exchange them.")


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
