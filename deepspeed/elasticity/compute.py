"""`compute_elastic_config` and its relatives: the public functions over `config.elastic`.

Schedulers call them before a job starts, with the dict the job will get; so the arguments are dicts, and what is wrong
with them is an ElasticityConfigError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from deepspeed.config.elastic import ElasticBatch, elastic_batch, valid_sizes
from deepspeed.config.tuning import ElasticityConfig
from deepspeed.utils.errors import ElasticityConfigError, ElasticityError
from deepspeed.utils.launch_env import int_or_error
from deepspeed.utils.logging import warn_once

SECTION = "elasticity"
ENVIRONMENT = "DEEPSPEED_ELASTICITY_CONFIG"
OLDEST = Version("0.3.8")
"""Before it there was no elasticity."""
_FIXED = ("max_train_batch_size", "micro_batch_sizes", "version")


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether a configuration's section is on."""
    section = ds_config.get(SECTION)
    return isinstance(section, Mapping) and bool(section.get("enabled", False))


def read_section(ds_config: Any) -> ElasticityConfig:
    """The section of a configuration. Raises ValueError for what is no dict, ElasticityConfigError for a bad section."""
    if not isinstance(ds_config, Mapping):
        raise ValueError(f"ds_config is a {type(ds_config).__name__}, not a dict.\n  Parse the JSON first.")
    if SECTION not in ds_config:
        raise ElasticityConfigError(f"the configuration has no section {SECTION!r}.\n  Add one with enabled: true.")
    if not elasticity_enabled(ds_config):
        raise ElasticityConfigError("elasticity.enabled is not true.\n  Set it to compute elastic batch sizes.")
    from deepspeed.config import load_config

    try:
        return load_config({SECTION: dict(ds_config[SECTION])}).elasticity
    except ElasticityError:
        raise
    except ValueError as error:
        raise ElasticityConfigError(str(error)) from None


def compute_elastic_config(
    ds_config: Mapping[str, Any], target_deepspeed_version: str, world_size: int = 0, return_microbatch: bool = False
) -> tuple[int, list[int]] | tuple[int, list[int], int]:
    """(batch, valid GPU counts), and the micro-batch where `world_size` or `return_microbatch` is given.

    ds_config: the configuration, with its `elasticity` section.
    target_deepspeed_version: the version the job will run with.
    world_size: all ranks; 0 where it is not known. Version 0.2 needs it, or WORLD_SIZE in the environment.

    Raises ValueError, ElasticityConfigError, ElasticityError (a version without elasticity),
    ElasticityIncompatibleWorldSize.
    """
    section = read_section(ds_config)
    try:
        is_old = Version(target_deepspeed_version) < OLDEST
    except (InvalidVersion, TypeError):
        raise ElasticityError(f"target_deepspeed_version {target_deepspeed_version!r} is no version.") from None
    if is_old:
        raise ElasticityError(f"version {target_deepspeed_version} has no elasticity.\n  It needs {OLDEST} or later.")
    found = _compute(section, world_size)
    result = (found.batch, list(found.valid_sizes))
    return (*result, found.micro) if world_size > 0 or return_microbatch else result


def _compute(section: ElasticityConfig, world_size: int) -> ElasticBatch:
    if section.version != 0.1 and world_size <= 0:
        world_size = int_or_error(os.environ, "WORLD_SIZE", 0)
        if world_size <= 0:
            raise ElasticityConfigError(
                "elasticity.version 0.2 needs the number of GPUs.\n  Pass world_size, or set WORLD_SIZE."
            )
    return elastic_batch(section, world_size)


def get_valid_gpus(
    batch_size: int, micro_batches: Sequence[int], min_valid_gpus: int, max_valid_gpus: int
) -> list[int]:
    """All GPU counts in the range that can train this batch with one of the micro-batches."""
    return valid_sizes(batch_size, micro_batches, min_valid_gpus, max_valid_gpus)


def get_compatible_gpus(
    micro_batches: Sequence[int],
    max_acceptable_batch_size: int,
    min_gpus: int = 1,
    max_gpus: int = 10000,
    prefer_larger: bool = True,
) -> tuple[int, list[int]]:
    """(batch, valid GPU counts) of version 0.1."""
    section = ElasticityConfig(
        enabled=True,
        version=0.1,
        micro_batch_sizes=tuple(micro_batches),
        max_train_batch_size=max_acceptable_batch_size,
        min_gpus=min_gpus,
        max_gpus=max_gpus,
        prefer_larger_batch=prefer_larger,
    )
    found = elastic_batch(section)
    return found.batch, list(found.valid_sizes)


def ensure_immutable_elastic_config(runtime_elastic_config_dict: Mapping[str, Any]) -> None:
    """Compare a section with the one the scheduler left in DEEPSPEED_ELASTICITY_CONFIG.

    Raises ElasticityConfigError where the batch would differ; warns once where the scheduler left none.
    """
    text = os.environ.get(ENVIRONMENT)
    if text is None:
        warn_once(
            f"{ENVIRONMENT} is not set, so nothing guarantees that the scheduler resizes this job to compatible "
            "numbers of GPUs."
        )
        return
    try:
        scheduled = read_section({SECTION: {**json.loads(text), "enabled": True}})
    except (json.JSONDecodeError, TypeError) as error:
        raise ElasticityConfigError(f"{ENVIRONMENT} is not a JSON object: {error}.") from None
    running = read_section({SECTION: {**runtime_elastic_config_dict, "enabled": True}})
    for key in _FIXED:
        ours, theirs = getattr(running, key), getattr(scheduled, key)
        if ours != theirs:
            raise ElasticityConfigError(
                f"elasticity.{key} = {ours}, but the scheduler was given {theirs} ({ENVIRONMENT}).\n"
                "  Submit the job with the configuration it runs with."
            )
