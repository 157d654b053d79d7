"""The engine's part: have a model's repeated blocks recompute, without a change to the model.

Called by the engine for `activation_checkpointing.recompute` and `memory_budget_gb`, by the memory estimator, and by
users (`deepspeed.checkpointing.checkpoint_blocks`). A block's `forward` is put under a non-reentrant checkpoint; the
module, its hooks, its name and its parameters stay.

    NONE        keep everything autograd saves
    SELECTIVE   keep the results of matrix products and attention, recompute what is cheap (torch's selective checkpoints)
    FULL        keep the block's inputs

Blocks are the elements of the model's lists of like modules: `ModuleList`, or `Sequential` with several elements of one
class. Of nested lists the outermost counts.

Invariant: what is computed does not change by a bit; ZeRO's hooks stand outside the checkpoint, so at stage 3 a block's
parameters are gathered once for recomputation and backward together.
After Chen et al. (arXiv:1604.06174); selective: Korthikanti et al. (arXiv:2205.05198), section 5.
"""

from __future__ import annotations

import enum
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from deepspeed.activation import settings as configured
from deepspeed.activation.call import run_checkpointed
from deepspeed.activation.settings import Settings
from deepspeed.utils.errors import DeepSpeedError


class Recompute(enum.Enum):
    """How much of a block backward computes again."""

    NONE = "none"
    """Nothing; everything autograd saved is kept."""
    SELECTIVE = "selective"
    """What lies between matrix products and attention; their results are kept."""
    FULL = "full"
    """The block; its inputs are kept."""


def _existing(*names: str) -> frozenset[Any]:
    """Those operators of `torch.ops.aten` that this torch has, all overloads."""
    found = (getattr(torch.ops.aten, name, None) for name in names)
    return frozenset(
        getattr(packet, overload) for packet in found if packet is not None for overload in packet.overloads()
    )


EXPENSIVE = _existing(
    "mm", "addmm", "bmm", "baddbmm", "convolution",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Operators whose results a selective checkpoint keeps."""


def _keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, in order; empty if there are none. The model may itself be their `Sequential`."""
    inner = [module for module in model.children() if next(module.parameters(), None) is not None]
    kind, count = Counter(map(type, inner)).most_common(1)[0] if inner else (nn.Module, 0)
    if isinstance(model, nn.ModuleList) or (isinstance(model, nn.Sequential) and count >= 2):
        return [module for module in inner if type(module) is kind]
    return [block for child in model.children() for block in find_blocks(child)]


class Blocks:
    """The blocks of one model and how each recomputes. `detach` gives them their own forward back."""

    def __init__(self, blocks: Sequence[nn.Module], settings: Settings | None = None) -> None:
        self.blocks = list(blocks)
        self.plan = [Recompute.NONE] * len(self.blocks)
        self._settings = settings

    def apply(self, plan: Sequence[Recompute]) -> None:
        """Have the i-th block recompute as `plan[i]` says, from the next forward on."""
        if len(plan) != len(self.blocks):
            raise DeepSpeedError(
                f"the plan has {len(plan)} entries, the model {len(self.blocks)} blocks.\n  Give one each."
            )
        self.detach()
        self.plan = list(plan)
        for block, recompute in zip(self.blocks, plan, strict=True):
            if recompute is not Recompute.NONE:
                block.forward = functools.partial(_forward, block.forward, recompute, self._settings)

    def detach(self) -> None:
        """Take the checkpoints away."""
        for block in self.blocks:
            wrapped = block.__dict__.get("forward")
            if isinstance(wrapped, functools.partial) and wrapped.func is _forward:
                del block.__dict__["forward"]
        self.plan = [Recompute.NONE] * len(self.blocks)

    def __repr__(self) -> str:
        counts = Counter(recompute.value for recompute in self.plan)
        return f"Blocks({len(self.blocks)}: {', '.join(f'{n} {name}' for name, n in counts.items())})"


def _forward(
    forward: Callable[..., Any], recompute: Recompute, settings: Settings | None, *args: Any, **kwargs: Any
) -> Any:
    """A block's forward under a checkpoint."""
    selective = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    return run_checkpointed(
        forward,
        args,
        kwargs,
        settings or configured.current(),
        use_reentrant=False,
        context_fn=selective if recompute is Recompute.SELECTIVE else None,
    )


def checkpoint_blocks(model: nn.Module, recompute: Recompute | str = Recompute.FULL) -> Blocks:
    """Have every repeated block of a model recompute in backward, kept as `configure` said; returns the handle.

    Raises DeepSpeedError for a model without repeated blocks.
    """
    blocks = blocks_of(model)
    blocks.apply([Recompute(recompute)] * len(blocks.blocks))
    return blocks


def blocks_of(model: nn.Module, settings: Settings | None = None) -> Blocks:
    """The blocks of a model, recomputing nothing yet. Raises DeepSpeedError where there are none."""
    found = find_blocks(model)
    if not found:
        raise DeepSpeedError(
            f"{type(model).__name__} has no repeated blocks (a ModuleList, or a Sequential of like modules) to recompute.\n"
            "  Call deepspeed.checkpointing.checkpoint(function, *args) around the expensive parts of its forward."
        )
    return Blocks(found, settings)
