"""What the ranks that run a model together agree on before it is changed, and at each step that can fail.

Made by the engine with a `Gather` for each group of ranks that its model is cut over, shares experts with, or shares weights with. Steps of preparing are
of two kinds:

    each for itself    (deciding, reading, quantizing) `do`: one that fails tells the others at the step's end, or where they `meet` before a collective inside
    together           (cutting) `do_together`: one that fails leaves, and the others are told in the collective that they wait in (`calls`)

Invariant: every rank raises where one does, and names it. Without it the others would wait in a collective for one that has left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from deepspeed.comm.init import init_distributed
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.mesh.mesh import world_size
from deepspeed.utils import errors
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

T = TypeVar("T")
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


class Steps:
    """What the ranks of one engine do side by side until it is made. `has_calls`: whether a collective that waits for one that left is told."""

    def __init__(self, gathers: Sequence[Gather], *, has_calls: bool) -> None:
        self._gathers, self._has_calls = gathers, has_calls
        self._told: Exception | None = None
        """What this rank raises, and the others know."""

    def do(self, step: Callable[[], T]) -> T:
        """Do a step on every rank, and raise on all where it fails on one. Collective."""
        try:
            made = step()
        except Exception as error:
            if not self._is_told(error):
                self._raise_everywhere(error)
            raise
        self.meet()
        return made

    def do_together(self, step: Callable[[], T]) -> T:
        """Do a step of collectives. One that fails where nobody is told of it is heard of by those that wait for it no sooner than the timeout."""
        return self._left_or_done(step) if self._has_calls else self.do(step)

    def _left_or_done(self, step: Callable[[], T]) -> T:
        made = step()
        self.meet()
        return made

    def meet(self) -> None:
        """Before a collective inside of a step: raise where a rank has failed meanwhile. Collective."""
        self._raise_everywhere(None)

    def all(self, is_so: bool) -> bool:
        """Whether it is so on every rank. Collective."""
        for gather in self._gathers:
            is_so = all(gather(is_so))
        return is_so

    def _is_told(self, error: BaseException | None) -> bool:
        while error is not None and error is not self._told:
            error = error.__cause__ or error.__context__
        return error is not None

    def _raise_everywhere(self, error: Exception | None) -> None:
        try:
            for gather in self._gathers:
                raise_everywhere(gather, error)
        except Exception as raised:
            self._told = raised
            raise


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
