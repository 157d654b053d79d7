"""A model as the planner sees it: a stack of like blocks, and what stands before and after them.

Read by the planner, and by the autotuner where ranks share layers. Made of any model, best on the meta device. Of each part: parameters, what of
them tensor parallelism cuts and experts own, operations and kept bytes of a sample. The last two come from tracing the model
with two and with three of its blocks: a step of a stack is affine in its blocks, so the whole is never traced, however deep it is.

Invariant: sums over the parts are the model's own numbers; `tests/planner/test_planner.py` compares with the traced whole.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepspeed.activation.blocks import find_blocks
from deepspeed.memory.estimator import as_call
from deepspeed.memory.inside import REFUSALS, Inside, Way, inside_of
from deepspeed.memory.parts import Attention, noting_attention
from deepspeed.memory.trace import own_memory, trace_step
from deepspeed.parallel.sequence.supported import check_layers
from deepspeed.profiling.counter import Phase
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

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
    block_modules: int = 0
    """That are called in a block."""
    outer_modules: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    num_experts: int = 0
    experts_per_token: int = 1
    num_stacks: int = 1
    """Lists of blocks; of two (an encoder and a decoder) a block is one of each."""
    input_rows: int = 1
    """Of position ids, masks and targets, which ranks that share sequences tell each other."""
    cuts_sequences: bool = True
    """Whether ranks can share sequences."""
    inside: Mapping[str, Inside] = field(default_factory=dict)
    """What layers send, by a way's name; without one that the engine refuses."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why it refuses a way, by its name."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelShape:
        """From what `asdict` makes of one."""
        return cls(**{**values, "inside": {way: Inside(**sent) for way, sent in values.get("inside", {}).items()}})

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
    stacks = [[block for block in blocks if block in set(holder.children())] for holder in _lists(model)]
    if len({len(stack) for stack in stacks}) > 1:
        raise DeepSpeedError(
            f"{type(model).__name__} has lists of {' and '.join(str(len(stack)) for stack in stacks)} blocks.\n"
            "  Plan for a model whose lists are as long as each other."
        )
    of_block = [param for stack in stacks for param in stack[-1].named_parameters()]
    block_params = sum(param.numel() for _, param in of_block)
    outer = sum(param.numel() for param in model.parameters()) - len(stacks[0]) * block_params
    block_modules = sum(1 for stack in stacks for _ in stack[-1].modules())
    config = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    block_flops, block_kept = high.flops - low.flops, high.kept - low.kept
    return ModelShape(
        name=type(model).__name__,
        num_blocks=len(stacks[0]),
        block_params=block_params,
        block_cut_params=sum(param.numel() for _, param in of_block if param.dim() >= 2),
        block_expert_params=sum(param.numel() for name, param in of_block if ".experts." in f".{name}"),
        outer_params=outer,
        first_params=sum(param.numel() for param in _embeddings(model, set(blocks))),
        block_flops=block_flops / samples,
        outer_flops=(low.flops - TRACED[0] * block_flops) / samples,
        block_kept_nbytes=block_kept / samples,
        outer_kept_nbytes=(low.kept - TRACED[0] * block_kept) / samples,
        boundary_nbytes=low.boundary / samples,
        itemsize=dtype.itemsize,
        block_modules=block_modules,
        outer_modules=sum(1 for _ in model.modules()) - len(stacks[0]) * block_modules,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", heads) or heads),
        num_experts=int(next((n for k in ("num_local_experts", "num_experts") if (n := getattr(config, k, 0))), 0)),
        experts_per_token=int(getattr(config, "num_experts_per_tok", 1) or 1),
        num_stacks=len(stacks),
        input_rows=_input_rows(batch),
        cuts_sequences=_cuts_sequences(model, low),
    )


def with_inside(
    shape: ModelShape,
    model: nn.Module,
    batch: Any,
    ways: Iterable[Way],
    *,
    samples: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelShape:
    """The shape with what layers send in each way, and why the engine refuses others. Other arguments as of `shape_of`."""
    found: dict[str, Inside] = {}
    refused: dict[str, str] = {}
    for way in ways:
        try:
            found |= inside_of(partial(shortened, model), batch, TRACED, dtype, way, samples)
        except REFUSALS as error:
            refused[way.name()] = str(error)
    return replace(shape, inside=found, refused=refused)


def _cuts_sequences(model: nn.Module, seen: _Seen) -> bool:
    """Whether ranks may share sequences: attention alone sees other tokens, and nothing is added to its scores."""
    config = getattr(model, "config", None)
    if seen.has_biases:
        return False
    if config is not None and hasattr(config, "get_text_config"):
        with contextlib.suppress(DeepSpeedConfigError):
            check_layers(config.get_text_config(), type(model).__name__)
            return True
        return False
    return True


def _embeddings(model: nn.Module, blocks: set[nn.Module]) -> set[nn.Parameter]:
    """Parameters of embeddings outside of blocks, shared ones once."""
    inside = {module for block in blocks for module in block.modules()}
    outer = (module for module in model.modules() if isinstance(module, nn.Embedding) and module not in inside)
    return {param for module in outer for param in module.parameters()}


def _input_rows(batch: Any) -> int:
    named = batch if isinstance(batch, Mapping) else {}
    return 1 + ("attention_mask" in named) + bool({"labels", "shift_labels"} & set(named))


@dataclass(frozen=True)
class _Seen:
    flops: float
    kept: float
    boundary: float
    has_biases: bool
    """Whether something is added to an attention's scores."""


def _traced(model: nn.Module, batch: Any, num_blocks: int, dtype: torch.dtype) -> _Seen:
    short = shortened(model, num_blocks)
    boundary: list[float] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        boundary.append(float(sum(tensor.nbytes for tensor in tensors)))

    args, kwargs = as_call(batch)
    attentions: list[Attention] = []
    with noting_attention(attentions):
        trace = trace_step(
            short, args, kwargs, dtype=dtype, device_type="cuda", prepare=lambda m: _watch_last_block(m, note)
        )
    forward = next(i for i, event in enumerate(trace.events) if event.what.value == "backward")
    kept = list(own_memory(trace))[forward]
    phases = trace.flops.by_phase
    return _Seen(
        phases[Phase.FORWARD] + phases[Phase.BACKWARD],
        kept,
        boundary[-1] if boundary else 0.0,
        any(each.has_bias for each in attentions),
    )


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
