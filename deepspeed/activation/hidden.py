"""The hidden states that activation checkpoints keep, in main memory: `get_checkpoint_hidden_states_offloading_ctx_manager`.

A context for a model's forward, on scripts' request; uses autograd's hooks on saved tensors. With every block checkpointed, what
a step keeps is one [batch, sequence, hidden] per block: at long sequences more than everything else. They are copied out as they
are saved, on a stream of their own beside the computation, and back as backward reaches them.

Parameters, small tensors and those that are in main memory already stay as they are.
After ALST (arXiv:2506.13996).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

MIN_BYTES = 1024


class _Away:
    """A tensor in main memory. `done`: the copy's event, before which the bytes are not all there."""

    __slots__ = ("copy", "device", "done", "source")

    def __init__(self, source: Tensor, copy: Tensor, done: Any) -> None:
        self.device, self.copy, self.done = source.device, copy, done
        self.source = source if done is not None else None  # alive until its bytes have left


class _HiddenStates:
    def __init__(self, use_pin_memory: bool, use_streams: bool, min_offload_bytes: int) -> None:
        self._pins, self._uses_streams, self._min_bytes = use_pin_memory, use_streams, min_offload_bytes
        self._stream: Any = None
        self._leaving: list[_Away] = []

    def pack(self, tensor: Tensor) -> Any:
        """Copy out what is large, computed, and on a device."""
        if tensor.device.type == "cpu" or isinstance(tensor, nn.Parameter) or tensor.nbytes < self._min_bytes:
            return tensor
        if not tensor.is_floating_point():
            return tensor
        device = torch.get_device_module(tensor.device)
        copy = torch.empty_like(tensor, device="cpu", pin_memory=self._pins)
        if not self._uses_streams:
            return _Away(tensor, copy.copy_(tensor), None)
        self._stream = self._stream or device.Stream()
        self._stream.wait_stream(device.current_stream())
        with device.stream(self._stream):
            copy.copy_(tensor.detach(), non_blocking=True)
            done = device.Event()
            done.record()
        away = _Away(tensor, copy, done)
        for left in self._leaving:
            left.source = left.source if left.done is not None and not left.done.query() else None
        self._leaving = [left for left in self._leaving if left.source is not None] + [away]
        return away

    def unpack(self, held: Any) -> Tensor:
        """The tensor, back on its device."""
        if not isinstance(held, _Away):
            assert isinstance(held, Tensor), "packed as it was"
            return held
        if held.done is not None:
            if self._pins:  # the copy back is queued after the copy out: the host does not wait
                held.done.wait(torch.get_device_module(held.device).current_stream())
            else:  # pageable memory is read by the host, when the copy is asked for
                held.done.synchronize()
            held.source = None
        return held.copy.to(held.device, non_blocking=True)


def get_checkpoint_hidden_states_offloading_ctx_manager(
    use_pin_memory: bool = True, use_streams: bool = True, min_offload_bytes: int = MIN_BYTES
) -> contextlib.AbstractContextManager[Any]:
    """A context in which what autograd saves goes to main memory, if it is of at least `min_offload_bytes`.

    use_pin_memory: page-locked, so that copies run beside the computation. use_streams: on a stream of their own.
    """
    states = _HiddenStates(use_pin_memory, use_streams, min_offload_bytes)
    return torch.autograd.graph.saved_tensors_hooks(states.pack, states.unpack)
