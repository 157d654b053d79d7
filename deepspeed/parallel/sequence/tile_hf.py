"""`tile_model`: a causal model of Hugging Face Transformers with its MLPs and its loss computed in tiles.

Called by scripts before `deepspeed.initialize`, for long sequences, with or without sequence parallelism. MLPs are found by their
shape: modules named "mlp" (or "feed_forward") of one input. The loss is the model's own cross entropy, computed by a forward that
calls the model's base and then head and loss tile by tile; `logits` of its output is then None.

On a CPU the allocator is told to return what a tile freed: it would keep several times what a step holds.

Invariant: loss and gradients are those of the model as it was.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.parallel.sequence import linear_loss
from deepspeed.parallel.sequence.inputs import IGNORED, shifted
from deepspeed.parallel.sequence.logits_loss import TiledFusedLogitsLoss
from deepspeed.parallel.sequence.tiled import TiledMLP
from deepspeed.utils.allocator import map_large_blocks
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import log_dist

MLP_NAMES = ("mlp", "feed_forward")


MAPPED_NBYTES = 1 << 20
"""Blocks of this size and larger are returned when they are freed."""


def tile_model(
    model: Any, *, mlp_tokens: int | None = 4096, loss_tokens: int | None = 4096, returns_memory: bool = True
) -> Any:
    """Have MLPs run over at most `mlp_tokens` tokens at a time and the loss over `loss_tokens`; None leaves them whole.

    returns_memory: where the model trains on a CPU, have glibc return freed blocks of 1 MiB and larger to the system at once, for
    the whole process and for good. Said once; a size that the environment gives (MALLOC_MMAP_THRESHOLD_) stays.

    Returns the model, changed in place. Raises DeepSpeedError for a model whose parts cannot be found.
    """
    mlps = [m for name, m in model.named_modules() if name.rpartition(".")[2] in MLP_NAMES and _has_one_input(m)]
    if mlp_tokens is not None:
        if not mlps:
            raise DeepSpeedError(
                f"tile_model: {type(model).__name__} has no MLP of one input named {' or '.join(MLP_NAMES)}.\n"
                "  Pass mlp_tokens=None, and use TiledMLP in the model's own layers."
            )
        for mlp in mlps:
            _replace_forward(mlp, _in_tiles, mlp_tokens)
    if loss_tokens is not None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None or not hasattr(model, "base_model") or model.base_model is model:
            raise DeepSpeedError(
                f"tile_model: {type(model).__name__} has no language head over a base model.\n  Pass loss_tokens=None."
            )
        scale = getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_scaling", None)
        if scale not in (None, 1, 1.0):
            raise DeepSpeedError(
                f"tile_model: {type(model).__name__} changes its logits after the head (by {scale}); the tiled loss would not.\n"
                "  Pass loss_tokens=None."
            )
        _replace_forward(model, _loss_in_tiles, loss_tokens)
    if returns_memory and get_accelerator().device_name() == "cpu":
        _return_freed_blocks()
    return model


@functools.cache
def _return_freed_blocks() -> None:
    if map_large_blocks(MAPPED_NBYTES):
        log_dist(
            "tile_model: this process returns freed blocks of 1 MiB and larger to the system at once "
            "(glibc's M_MMAP_THRESHOLD; returns_memory=False leaves it as it is)",
            ranks=[0],
        )


def _replace_forward(module: Any, by: Callable[..., Any], tokens: int) -> None:
    """`by(module, its own forward, tokens, ...)`, which those who look take for the forward that was there."""
    made = functools.partial(by, module, module.forward, tokens)
    made.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    module.forward = made


def is_tiled(forward: Any) -> bool:
    """Whether a module's own `forward` is one that `tile_model` put there."""
    return isinstance(forward, functools.partial) and forward.func in (_in_tiles, _loss_in_tiles)


def _has_one_input(module: nn.Module) -> bool:
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    return len(required) == 1


def _in_tiles(module: nn.Module, forward: Callable[..., Tensor], tokens: int, x: Tensor) -> Tensor:
    shards = -(-x.shape[-2] // tokens)
    return forward(x) if shards <= 1 else TiledMLP.apply(lambda _, tile: forward(tile), module, x, shards)


def _loss_in_tiles(model: Any, forward: Callable[..., Any], tokens: int, *args: Any, **kwargs: Any) -> Any:
    """The model's forward: where it is given labels, its loss by tiles; else as it was."""
    from transformers.modeling_outputs import CausalLMOutput

    if args:
        names = [name for name in inspect.signature(forward).parameters if name not in ("args", "kwargs")]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if labels is None and targets is None:
        return forward(**kwargs)
    total = kwargs.pop("num_items_in_batch", None)
    hidden = model.base_model(**kwargs)[0]
    targets = shifted(labels) if targets is None else targets
    head = model.get_output_embeddings()
    reduction = "mean" if total is None else "sum"
    if linear_loss.is_served(head):
        loss = linear_loss.linear_cross_entropy(head, hidden, targets, tokens, reduction=reduction)
        return CausalLMOutput(loss=loss if total is None else loss / total)

    def loss_of(_: Any, tile: Tensor, y: Tensor) -> Tensor:
        logits = head(tile).float()
        return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORED, reduction=reduction)

    shards = -(-hidden.shape[1] // tokens)
    loss = TiledFusedLogitsLoss.apply(loss_of, head, hidden, targets, None, shards, None, reduction)
    return CausalLMOutput(loss=loss if total is None else loss / total)
