"""Buffers that are views of a parameter's memory: they go where the parameter goes, so that they show its values as before.

Found by `zero.build` before parameters move into buckets; followed by a bucket whenever its parameters get other memory. In
plain PyTorch such a buffer is the parameter by another name (`register_buffer("tied", self.weight.detach())`), and a
buffer that stayed behind would keep the first values for ever without a word.

    the parameter is whole, of its own width    the buffer is the same view of the bucket
    it does not train                           the buffer keeps its values, which do not change
    it takes another dtype                      a copy from then on, as after `module.to(dtype)`; one warning
    it is sharded between uses, or the buffer
    reaches beyond it                           an error that names both

Invariant: ranks have found the same aliases (`engine.agreement`), so that all of them spread the same other buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once


@final
@dataclass(frozen=True, eq=False)
class Alias:
    """One buffer, and where in `param` it lies: `offset` elements behind the first one."""

    owner: nn.Module
    key: str
    name: str
    buffer: Tensor
    param: nn.Parameter
    param_name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    fits: bool
    """Whether the buffer is of elements of the parameter alone, which lie in order."""

    @property
    def is_registered(self) -> bool:
        """Whether the module still has this very buffer."""
        return self.owner._buffers.get(self.key) is self.buffer

    def moved_to(self, memory: Tensor) -> Alias:
        """The same part of `memory`, the parameter's now; the module has it in place of this one."""
        start = memory.storage_offset() + self.offset
        view = memory.detach().as_strided(self.size, self.stride, start)
        return self.replaced(view)

    def replaced(self, buffer: Tensor) -> Alias:
        """Another buffer in place of this one, unless the script has put something else there."""
        if self.is_registered:
            self.owner._buffers[self.key] = buffer
        return replace(self, buffer=buffer)

    def refuse(self, dtype: torch.dtype, is_whole: bool) -> None:
        """Say that it cannot show its parameter, which is in `dtype` now: once, or by a DeepSpeedConfigError."""
        what = f"the buffer {self.name} is a view of the parameter {self.param_name}"
        if not self.is_registered or self.buffer.dtype != dtype:
            warn_once(
                f"{what}, and one of them is kept in another precision here: the buffer keeps the first values from now on, as "
                "after module.to(dtype) in plain PyTorch.\n  Have the module compute it from the parameter in its forward."
            )
            return
        reason = "cannot be laid out so here" if is_whole else "lies in pieces between its uses (ZeRO stage 3)"
        raise DeepSpeedConfigError(
            f"{what}, which {reason}: the buffer would keep the first values.\n"
            "  Have the module compute it from the parameter in its forward, or register a copy (`.clone()`) if it is a constant."
        )


def aliases_of(module: nn.Module) -> list[Alias]:
    """Buffers that lie in the memory of a parameter of the module, in the order of the buffers."""
    buffers = [
        (owner, key, f"{prefix}{'.' if prefix else ''}{key}", buffer)
        for prefix, owner in module.named_modules()
        for key, buffer in owner.named_buffers(recurse=False)
        if _has_memory(buffer)
    ]
    if not buffers:
        return []
    params: dict[int, list[tuple[int, int, nn.Parameter, str]]] = {}
    for name, param in module.named_parameters():
        if _has_memory(param):
            start = param.data_ptr()
            place = (start, start + param.nbytes, param, name)
            params.setdefault(param.untyped_storage().data_ptr(), []).append(place)
    found = []
    for owner, key, name, buffer in buffers:
        at = buffer.data_ptr()
        for start, stop, param, param_name in params.get(buffer.untyped_storage().data_ptr(), ()):
            if start <= at < stop:
                offset = (at - start) // param.element_size()
                fits = _fits(buffer, param, offset)
                found.append(
                    Alias(owner, key, name, buffer, param, param_name, buffer.shape, buffer.stride(), offset, fits)
                )
                break
    return found


def _fits(buffer: Tensor, param: nn.Parameter, offset: int) -> bool:
    last = offset + sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
    return buffer.dtype == param.dtype and not buffer.is_complex() and param.is_contiguous() and last < param.numel()


def _has_memory(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_plain and not tensor.is_meta and not tensor.is_nested and not tensor.is_quantized and tensor.numel() > 0
