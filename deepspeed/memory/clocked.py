"""Seconds of a model's own forward and backward on this machine, from copies of it with few blocks.

Called by the autotuner's first run and by `deepspeed doctor`, in all ranks at once, since ranks of a machine slow each other down. What the engine holds
may be in parts, at other places, or larger than there is room for a second of; so copies are clocked that have the model's structure,
its first blocks, its buffers where they have values, and everything else made up here. A stack's step is affine in its blocks (as `shape` has it) and in its
samples: four kinds of short runs give the whole model's. They take turns, so that what else a machine does for a second meets all four.

Invariant: the model, its gradients, and what is random in the process stay as they were, and no collective is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deepspeed.accelerator import get_accelerator
from deepspeed.activation.blocks import find_blocks
from deepspeed.memory.estimator import as_call
from deepspeed.memory.shape import shortened
from deepspeed.memory.trace import default_loss, fake_copy
from deepspeed.precision.widen import Widening, needs_wide_matmul
from deepspeed.profiling.rates import undisturbed

DEPTHS = (1, 3)
"""Blocks of the copies."""
SAMPLES = (1, 4)
NUM_RUNS = 24
"""Of each; those that were hardly disturbed count."""
ENOUGH_S = 10.0
"""After so long no other turn begins."""


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """Seconds of one micro-batch: so many a call, and so many a sample."""

    forward_call_s: float
    forward_sample_s: float
    backward_call_s: float
    backward_sample_s: float

    def forward_s(self, micro: int) -> float:
        """Of `micro` samples."""
        return self.forward_call_s + micro * self.forward_sample_s

    def backward_s(self, micro: int) -> float:
        """Of `micro` samples."""
        return self.backward_call_s + micro * self.backward_sample_s

    def at_least(self, forward_sample_s: float, backward_sample_s: float) -> Clocked:
        """Samples not faster than that: a machine that was disturbed while few samples ran makes more of them look free.

        What samples get, calls lose, so that the largest batch that was clocked stays as it was, where it can.
        """
        forward = max(0.0, forward_sample_s - self.forward_sample_s)
        backward = max(0.0, backward_sample_s - self.backward_sample_s)
        return Clocked(
            forward_call_s=max(0.0, self.forward_call_s - SAMPLES[-1] * forward),
            forward_sample_s=self.forward_sample_s + forward,
            backward_call_s=max(0.0, self.backward_call_s - SAMPLES[-1] * backward),
            backward_sample_s=self.backward_sample_s + backward,
        )

    def scaled(self, calls: float, work: float) -> Clocked:
        """Of a part of the model that makes `calls` of the calls and `work` of the work."""
        return Clocked(
            forward_call_s=calls * self.forward_call_s,
            forward_sample_s=work * self.forward_sample_s,
            backward_call_s=calls * self.backward_call_s,
            backward_sample_s=work * self.backward_sample_s,
        )


def clocked(model: nn.Module, batch: Any, samples: int, dtype: torch.dtype) -> Clocked:
    """Clock a model, plain or under ZeRO, that is called with `batch` of `samples` samples.

    dtype: what floating parameters compute in. Raises what the model raises where it is called with other numbers of samples.
    """
    blocks = find_blocks(model)
    depths = DEPTHS if len(blocks) > DEPTHS[1] else (len(blocks),)
    with torch.random.fork_rng(), torch.enable_grad():
        short = [_made(shortened(model, depth) if len(depths) > 1 else model, model, dtype) for depth in depths]
        batches = [_with_samples(batch, samples, many, dtype) for many in SAMPLES]
        rows = _together(short, batches)
        del short
    forward, backward = ([_line([pair[way] for pair in row]) for row in rows] for way in (0, 1))
    more = (len(blocks) - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0.0

    def whole(lines: list[tuple[float, float]]) -> tuple[float, float]:
        return tuple(first + more * max(0.0, last - first) for first, last in zip(lines[0], lines[-1], strict=True))  # type: ignore[return-value]

    (forward_call, forward_sample), (backward_call, backward_sample) = whole(forward), whole(backward)
    return Clocked(
        forward_call_s=forward_call,
        forward_sample_s=forward_sample,
        backward_call_s=backward_call,
        backward_sample_s=backward_sample,
    )


class _Run(NamedTuple):
    """One run, by the clock of what computes."""

    forward_s: float
    backward_s: float
    wall_s: float
    """Of both, by the wall."""


def _together(models: Sequence[nn.Module], batches: Sequence[Any]) -> list[list[tuple[float, float]]]:
    """(forward's, backward's) seconds [models][batches], where turns were hardly disturbed.

    Where ranks share processors, they wait for each other as long, for their work, as in such a turn.
    """
    turns: list[list[list[_Run]]] = []
    began_s = time.perf_counter()
    for turn in range(1 + NUM_RUNS):
        if turn > 1 and time.perf_counter() - began_s > ENOUGH_S:
            break
        turns.append([[_seconds(model, batch) for batch in batches] for model in models])
    turns = turns[1:]  # the first finds nothing in the caches
    waiting = undisturbed(_waiting([run for row in turn for run in row]) for turn in turns)

    def seconds(m: int, b: int) -> tuple[float, float]:
        runs = [turn[m][b] for turn in turns]
        return waiting * undisturbed(r.forward_s for r in runs), waiting * undisturbed(r.backward_s for r in runs)

    return [[seconds(m, b) for b in range(len(batches))] for m in range(len(models))]


def _waiting(runs: Sequence[_Run]) -> float:
    """How many times as long as they worked runs took."""
    return sum(run.wall_s for run in runs) / sum(run.forward_s + run.backward_s for run in runs)


def _line(seconds: list[float]) -> tuple[float, float]:
    """(of a call, of a sample), neither below zero."""
    slope = min(max(0.0, (seconds[1] - seconds[0]) / (SAMPLES[1] - SAMPLES[0])), seconds[1] / SAMPLES[1])
    return max(0.0, seconds[0] - slope * SAMPLES[0]), slope


def _made(shape: nn.Module, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the device: the model's buffers, parameters of small numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device(get_accelerator().current_device_name())
    made = fake_copy(shape, FakeTensorMode(allow_non_fake_inputs=True), dtype)
    values = dict(model.named_buffers(remove_duplicate=False))
    filled = {param: _filled(param, device) for param in made.parameters()}  # tied ones stay tied
    for name, module in made.named_modules():
        for key, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, key, filled[param])
        for key in [key for key, buffer in module._buffers.items() if buffer is not None]:
            module._buffers[key] = _held(values[f"{name}.{key}".lstrip(".")], device)
    if device.type == "cpu" and needs_wide_matmul(dtype):
        Widening(made.modules())
    return made


def _filled(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    value = torch.empty(param.shape, dtype=param.dtype, device=device)
    value = value.normal_(std=0.02) if value.is_floating_point() else value.zero_()
    return nn.Parameter(value, requires_grad=param.requires_grad)


def _held(buffer: Tensor, device: torch.device) -> Tensor:
    """A buffer's values; on meta, which has none, some that no index and no root minds."""
    if not buffer.is_meta:
        return buffer.detach().clone()
    return (
        torch.ones_like(buffer, device=device)
        if buffer.is_floating_point()
        else torch.zeros_like(buffer, device=device)
    )


def _with_samples(batch: Any, samples: int, many: int, dtype: torch.dtype) -> Any:
    """A batch of the first sample, `many` times."""
    lowers = dtype in (torch.bfloat16, torch.float16)
    device = torch.device(get_accelerator().current_device_name())

    def like(tensor: Tensor) -> Tensor:
        tensor = torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach()
        if tensor.dim() and tensor.shape[0] == samples:
            tensor = tensor[:1].repeat(many, *[1] * (tensor.dim() - 1))
        return tensor.to(dtype) if lowers and tensor.dtype == torch.float32 else tensor

    return tree_map_only(Tensor, like, batch)


def _seconds(model: nn.Module, batch: Any) -> _Run:
    """One run. On a CPU this thread's own time counts, which what else the machine does hardly changes; backward runs in it, too."""
    args, kwargs = as_call(batch)
    params = [param for param in model.parameters() if param.requires_grad]
    synchronize = get_accelerator().synchronize
    clock = time.thread_time if get_accelerator().device_name() == "cpu" else time.perf_counter
    synchronize()
    began_s, times = time.perf_counter(), [clock()]
    loss = default_loss(model(*args, **kwargs))
    synchronize()
    times.append(clock())
    torch.autograd.grad(loss, params, allow_unused=True)
    synchronize()
    times.append(clock())
    return _Run(times[1] - times[0], times[2] - times[1], time.perf_counter() - began_s)
