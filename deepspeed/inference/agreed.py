"""What the ranks that run a model together agree on before it is changed, and at each step that can fail.

Called by the engine with a `Gather` for each group of ranks that its model is cut over, shares experts with, or shares weights with.

Invariant: every rank raises where one does. Without it the others would wait in a collective for one that has left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed.comm.init import init_distributed
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.mesh.mesh import world_size
from deepspeed.utils import errors
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

Gather = Callable[[Any], list[Any]]
"""Tells every rank of a group a small picklable value; theirs in rank order. Collective."""


def job_gather(config: DeepSpeedInferenceConfig) -> Gather | None:
    """All ranks of the job, where they share weights; None for one alone, or where they do not."""
    if not config.streams:
        return None
    init_distributed(verbose=False)
    if world_size() == 1:
        return None

    def gather(value: Any) -> list[Any]:
        told: list[Any] = [None] * world_size()
        dist.all_gather_object(told, value)
        return told

    return gather


def raise_everywhere(gather: Gather, error: Exception | None) -> None:
    """Raise where any rank has an error: the own one, or with another's words a DeepSpeedError of its kind. Collective."""
    told = gather(None if error is None else (_kind(error), str(error) or type(error).__name__))
    if error is not None:
        raise error
    for rank, theirs in enumerate(told):
        if theirs is not None:
            kind, words = theirs
            raise getattr(errors, kind)(f"[rank {rank} of {len(told)}] {words}")


def _kind(error: Exception) -> str:
    """The name of the package's own class of errors that it is nearest to."""
    names = [kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind]
    return names[0] if names else DeepSpeedError.__name__


def require_same(gather: Gather, own: Mapping[str, Any]) -> None:
    """Raise DeepSpeedConfigError, on every rank, where one was told otherwise than the first. Collective."""
    told = gather(dict(own))
    for rank, theirs in enumerate(told):
        key = next((key for key in told[0] if theirs[key] != told[0][key]), None)
        if key is not None:
            raise DeepSpeedConfigError(
                f"[rank {rank} of {len(told)}] {key} = {theirs[key]}, and the first rank has {told[0][key]}.\n"
                "  Ranks that run one model together need one model and one configuration."
            )


def description(module: nn.Module, config: DeepSpeedInferenceConfig) -> dict[str, str]:
    """What has to be the same on ranks that run a module together; paths and groups may differ."""
    shapes = repr([(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters()])
    return {
        "the model": f"{type(module).__name__} with parameters of digest {hashlib.sha256(shapes.encode()).hexdigest()[:8]}",
        "dtype": dtype_name(config.dtype),
        "quant": config.quant.model_dump_json(),
        "kv_cache.dtype": config.kv_cache.dtype,
        "max_out_tokens": str(config.limit),
        "zero.stage": str(config.zero.stage),
        "tp_size": str(config.tensor_parallel.tp_size),
        "tp_grain_size": str(config.tensor_parallel.tp_grain_size),
        "ep_size": str(config.moe.ep_size),
    }
