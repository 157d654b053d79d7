"""What each layer takes, in time and memory, from one forward and backward of it: for `partition_method` "time" and "memory".

Called by `module.PipelineModule` on every rank; the first rank alone runs the layers, one after another, so that one layer is in memory
at a time where they are descriptions, and all hear the same numbers.

    time      seconds of a forward and a backward, the least of three
    memory    bytes of parameters, gradients and two moments, and what autograd keeps of a micro-batch, as often as there are stages:
              the first stage of 1F1B keeps so many alive

Invariant: nothing is left behind: gradients, buffers and random states are as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec, TiedLayerSpec
from deepspeed.parallel.pipeline.saved import Saved

ROUNDS = 3


class Taken(NamedTuple):
    """One layer's."""

    seconds: float
    saved_nbytes: int
    trained_nbytes: int


def costs_of(layers: Sequence[Any], inputs: Any, method: str, num_stages: int) -> list[float]:
    """A cost per layer by `method`, "time" or "memory". Collective over the job. Raises LayerError on all ranks."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [measure(layers, inputs)]
        except Exception as error:
            told = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, 0)
    if isinstance(told[0], str):
        raise LayerError(f'partition_method = "{method}": the layers do not run on sample_inputs: {told[0]}')
    taken: list[Taken] = told[0]
    if method == "time":
        return [layer.seconds for layer in taken]
    return [4.0 * layer.trained_nbytes + layer.saved_nbytes * num_stages for layer in taken]


def measure(layers: Sequence[Any], inputs: Any) -> list[Taken]:
    """Run each layer on what the one before gave. `inputs`: a micro-batch's, as the first stage gets them."""
    device = torch.device(get_accelerator().current_device_name())
    tied: dict[str, nn.Module] = {}
    taken = []
    with torch.random.fork_rng():
        value = _moved(tuple(inputs) if isinstance(inputs, list) else inputs, device)
        for layer in layers:
            module: Any = layer.build() if isinstance(layer, LayerSpec) and not _is_known(layer, tied) else layer
            function = module
            if isinstance(layer, TiedLayerSpec):
                module = tied.setdefault(layer.key, module)
                function = module if layer.forward_fn is None else lambda x, m=module, f=layer.forward_fn: f(m, x)
            if isinstance(module, nn.Module):
                module.to(device)
            with _as_it_was(module):
                found, value = _run(function, value)
            trained = (
                sum(p.nbytes for p in module.parameters() if p.requires_grad) if isinstance(module, nn.Module) else 0
            )
            taken.append(Taken(found.seconds, found.saved_nbytes, trained))
    return taken


def _is_known(layer: LayerSpec, tied: dict[str, nn.Module]) -> bool:
    return isinstance(layer, TiedLayerSpec) and layer.key in tied


def _run(function: Any, value: Any) -> tuple[Taken, Any]:
    synchronize = get_accelerator().synchronize
    best, nbytes, output = float("inf"), 0, None
    for _ in range(ROUNDS):
        given = _fresh(value)
        synchronize()
        began = time.perf_counter()
        saved = Saved()
        with saved:
            output = function(given)
        outputs = [v for v in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(v, Tensor)]
        roots = [v for v in outputs if v.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(v) for v in roots])
        synchronize()
        best, nbytes = min(best, time.perf_counter() - began), max(nbytes, saved.nbytes)
    return Taken(best, nbytes, 0), output


def _fresh(value: Any) -> Any:
    """The same values as leaves, floating ones with gradients, which a layer may write into."""
    if isinstance(value, (tuple, list)):
        return tuple(_fresh(v) for v in value)
    if not isinstance(value, Tensor):
        return value
    detached = value.detach().clone()
    return detached.requires_grad_().clone() if detached.is_floating_point() else detached


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _as_it_was(module: Any) -> Iterator[None]:
    if not isinstance(module, nn.Module):
        yield
        return
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gradients = [(param, param.grad) for param in module.parameters()]
    for param, _ in gradients:
        param.grad = None
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for param, gradient in gradients:
            param.grad = gradient
