"""The checkpoint call: run a function, keep its inputs, and run it again in backward.

Called by users (`deepspeed.checkpointing.checkpoint`), by pipeline modules, and by the engine's blocks. The work is
torch's (`torch.utils.checkpoint`, reentrant or not); this file adds where inputs rest (`activation.saved`), the named
random states, waiting and timing.

    checkpoint(f, x, mask=m)
        tensors of (args, kwargs)      -> torch's checkpoint, under saved-tensor hooks that move its inputs
        f, its other arguments         -> `_Call`, which torch runs once in forward and once in backward

Note [Hooks see the inputs only]
    Torch saves the tensors it is given before it runs the function: by save_for_backward (reentrant), or as saved
    tensors of its own (not reentrant). Inside, a reentrant forward records nothing, and the other one puts its own hooks
    on top of ours. So ours see exactly the inputs, in order.

Invariant: forward and recomputation draw the same random numbers: the CPU's and the device's (torch), the named ones
(here). They multiply in the same precision (`precision.widen`). Different from the original: where no input requires grad, a reentrant checkpoint would cut the gradients of
the parameters inside; then the other kind is used. Tensors in nested arguments and keywords take part in autograd.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from deepspeed.accelerator import get_accelerator
from deepspeed.activation import settings as configured
from deepspeed.activation.rng import get_cuda_rng_tracker, restored
from deepspeed.activation.saved import Saver
from deepspeed.activation.settings import Settings
from deepspeed.precision.widen import carried
from deepspeed.utils.logging import log_dist

__all__ = ["CheckpointFunction", "checkpoint", "non_reentrant_checkpoint", "run_checkpointed"]


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, recomputed in backward from its inputs; kept as `configure` said. Reentrant.

    Returns what the function returns; a tuple of one is unwrapped.
    """
    return _unwrap(run_checkpointed(function, args, kwargs, configured.current(), use_reentrant=True))


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `checkpoint`, by torch's non-reentrant kind: works with `torch.autograd.grad`, and stops recomputing early."""
    return _unwrap(run_checkpointed(function, args, kwargs, configured.current(), use_reentrant=False))


def _unwrap(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and type(output) is tuple and len(output) == 1 else output


def run_checkpointed(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    *,
    use_reentrant: bool,
    context_fn: Callable[[], tuple[Any, Any]] | None = None,
) -> Any:
    """Run a function under a checkpoint with these settings. `context_fn` is torch's, for selective recomputation.

    Without grad mode the function is just run. Collective in backward if inputs are partitioned.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in at]
    use_reentrant = use_reentrant and any(tensor.requires_grad for tensor in tensors)
    for i in at:
        leaves[i] = None  # torch keeps them, and only torch: a reference here would keep what moves elsewhere
    call = _Call(function, leaves, spec, at, settings, flattens=use_reentrant)
    hooks: Any = contextlib.nullcontext()
    if settings.moves_inputs:
        moves = [tensor.requires_grad and tensor.is_floating_point() for tensor in tensors]
        saver = Saver(
            moves,
            partition=settings.partition_activations,
            in_cpu=settings.checkpoint_in_cpu,
            ranks=settings.ranks,
            arena=settings.arena,
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(saver.pack, saver.unpack)
    extra: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
    with hooks:
        output = torch_checkpoint.checkpoint(call, *tensors, use_reentrant=use_reentrant, **extra)
    return call.restore(output) if use_reentrant else output


class _Call:
    """The function as torch runs it: once in forward, then for recomputation with the named random states of then."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        at: list[int],
        settings: Settings,
        *,
        flattens: bool,
    ) -> None:
        self._function = function
        self._leaves, self._spec, self._at = leaves, spec, at
        self._settings = settings
        self._flattens = flattens
        self._states: dict[str, Tensor] | None = None
        self._carried = carried()
        self._output: tuple[list[Any], Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._states is None:
            self._states = get_cuda_rng_tracker().get_states()
            return self._run("forward", tensors)
        with restored(self._states):
            return self._run("recompute", tensors)

    def _run(self, what: str, tensors: tuple[Tensor, ...]) -> Any:
        leaves = list(self._leaves)
        for i, tensor in zip(self._at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        with torch.profiler.record_function(f"activation.{what}"), self._timed(what), self._carried():
            output = self._function(*args, **kwargs)
        return self._flatten(output) if self._flattens else output

    def _flatten(self, output: Any) -> tuple[Tensor, ...]:
        """The tensors of an output: a reentrant checkpoint answers those alone. The rest waits for `restore`."""
        leaves, spec = tree_flatten(output)
        self._output = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def restore(self, tensors: tuple[Tensor, ...]) -> Any:
        """The function's output, with the tensors that torch answered."""
        assert self._output is not None, "the function ran"
        (leaves, spec), self._output = self._output, None
        given = iter(tensors)
        return tree_unflatten(
            [next(given) if is_tensor else leaf for leaf, is_tensor in zip(leaves, self._is_tensor, strict=True)], spec
        )

    @contextlib.contextmanager
    def _timed(self, what: str) -> Any:
        waits = self._settings.synchronize or self._settings.profile
        if waits:
            get_accelerator().synchronize()
        start_s = time.perf_counter()
        try:
            yield
        finally:
            if waits:
                get_accelerator().synchronize()
            if self._settings.profile:
                name = getattr(self._function, "__qualname__", type(self._function).__name__)
                passed_ms = (time.perf_counter() - start_s) * 1e3
                log_dist(f"checkpoint {name}: {what} {passed_ms:.2f} ms", ranks=[0], level=logging.WARNING)
