"""A model as the planner sees it: a stack of like blocks, and what stands before and after them.

Read by the planner, and by the autotuner where ranks share layers. Made of any model, best on the meta device. Of each part: parameters, what of
them tensor parallelism cuts and experts own, operations and kept bytes of a sample. The last two come from tracing the model
with two and with three of its blocks: a step of a stack is affine in its blocks, so the whole is never traced, however deep it is.

Invariant: sums over the parts are the model's own numbers; `tests/planner/test_planner.py` compares with the traced whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepspeed.activation.blocks import find_blocks
from deepspeed.memory.estimator import as_call
from deepspeed.memory.trace import own_memory, trace_step
from deepspeed.profiling.counter import Phase
from deepspeed.utils.errors import DeepSpeedError

TRACED = (2, 3)
"""Blocks of the models that are traced."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model; "block" is one of `num_blocks`, "outer" what is around them. Bytes and operations per sample."""

    name: str
    num_blocks: int
    block_params: int
    block_cut_params: int
    """Of these, what tensor parallelism divides: matrices."""
    block_expert_params: int
    """Of these, what experts own."""
    outer_params: int
    first_params: int
    """Of the outer ones, those of embeddings: the first stage's. The others are the last one's."""
    block_flops: float
    """Forward and backward."""
    outer_flops: float
    block_kept_nbytes: float
    """From forward to backward."""
    outer_kept_nbytes: float
    boundary_nbytes: float
    """What one block hands to the next."""
    itemsize: int
    num_heads: int = 0
    num_kv_heads: int = 0
    num_experts: int = 0
    experts_per_token: int = 1

    @property
    def num_params(self) -> int:
        """Of the whole model."""
        return self.num_blocks * self.block_params + self.outer_params

    @property
    def flops(self) -> float:
        """Of a sample, forward and backward."""
        return self.num_blocks * self.block_flops + self.outer_flops


def shape_of(model: nn.Module, batch: Any, *, samples: int = 1, dtype: torch.dtype = torch.bfloat16) -> ModelShape:
    """The shape of a model on any device ("meta" costs nothing), called with `batch` of so many samples.

    Raises DeepSpeedError where there is no stack of at least two like blocks; TraceError where the model looks at values.
    """
    blocks = find_blocks(model)
    if len(blocks) < TRACED[0]:
        raise DeepSpeedError(
            f"{type(model).__name__} has no stack of like blocks (a ModuleList), so its layouts cannot be compared.\n"
            "  Plan for a model of repeated layers, or use `deepspeed estimate` for data-parallel ranks."
        )
    low, high = (_traced(model, batch, size, dtype) for size in TRACED)
    block_params = sum(param.numel() for param in blocks[0].parameters())
    outer = sum(param.numel() for param in model.parameters()) - sum(p.numel() for b in blocks for p in b.parameters())
    config = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    block_flops, block_kept = high.flops - low.flops, high.kept - low.kept
    return ModelShape(
        name=type(model).__name__,
        num_blocks=len(blocks),
        block_params=block_params,
        block_cut_params=sum(param.numel() for param in blocks[0].parameters() if param.dim() >= 2),
        block_expert_params=sum(
            param.numel() for name, param in blocks[0].named_parameters() if ".experts." in f".{name}"
        ),
        outer_params=outer,
        first_params=sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()),
        block_flops=block_flops / samples,
        outer_flops=(low.flops - TRACED[0] * block_flops) / samples,
        block_kept_nbytes=block_kept / samples,
        outer_kept_nbytes=(low.kept - TRACED[0] * block_kept) / samples,
        boundary_nbytes=low.boundary / samples,
        itemsize=dtype.itemsize,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", heads) or heads),
        num_experts=int(next((n for k in ("num_local_experts", "num_experts") if (n := getattr(config, k, 0))), 0)),
        experts_per_token=int(getattr(config, "num_experts_per_tok", 1) or 1),
    )


@dataclass(frozen=True)
class _Seen:
    flops: float
    kept: float
    boundary: float


def _traced(model: nn.Module, batch: Any, num_blocks: int, dtype: torch.dtype) -> _Seen:
    short = shortened(model, num_blocks)
    boundary: list[float] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        boundary.append(float(sum(tensor.nbytes for tensor in tensors)))

    args, kwargs = as_call(batch)
    trace = trace_step(
        short, args, kwargs, dtype=dtype, device_type="cuda", prepare=lambda m: _watch_last_block(m, note)
    )
    forward = next(i for i, event in enumerate(trace.events) if event.what.value == "backward")
    kept = list(own_memory(trace))[forward]
    phases = trace.flops.by_phase
    return _Seen(phases[Phase.FORWARD] + phases[Phase.BACKWARD], kept, boundary[-1] if boundary else 0.0)


def _watch_last_block(model: nn.Module, note: Any) -> None:
    find_blocks(model)[-1].register_forward_hook(note)


def shortened(model: nn.Module, num_blocks: int) -> nn.Module:
    """A copy with the first blocks of the stack alone, on the meta device; the others are never copied."""
    holders = list(_lists(model))
    whole = [holder._modules for holder in holders]
    try:
        for holder in holders:
            holder._modules = dict(list(holder._modules.items())[:num_blocks])
        with torch.device("meta"):
            short = copy.deepcopy(model)
    finally:
        for holder, modules in zip(holders, whole, strict=True):
            holder._modules = modules
    config = getattr(short, "config", None)
    if config is not None and getattr(config, "num_hidden_layers", None):
        config.num_hidden_layers = num_blocks
    return short


def _lists(model: nn.Module) -> Iterator[Any]:
    blocks = set(find_blocks(model))
    for module in list(model.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and blocks & set(module.children()):
            yield module
