"""Two parameters that lie in the same memory, all of it or a part: in plain PyTorch a step of one moves the other.

Asked by `engine.build` before anything is laid into buckets, where each would get memory of its own and train apart from
then on without a word. Which steps plain PyTorch would make of the shared elements (one per parameter, each with its own
states) no bucket can repeat, so they are refused by name. One parameter that two modules have is not meant: it is one object.

    same address, other shape or order    `b.weight.data = a.weight.data`, `nn.Parameter(a.weight.detach().t())`
    a part                                `nn.Parameter(a.weight.detach()[:2])`
    interlaced, or side by side           share a storage, not an element: no overlap

Invariant: reads addresses, no values, but where two parameters' extents meet.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from deepspeed.zero.param import slot_of


def overlap_of(model: nn.Module) -> str | None:
    """Why a model cannot be trained: two of its parameters share memory, and at least one of them trains."""
    by_storage: dict[int, list[tuple[int, int, str, nn.Parameter]]] = defaultdict(list)
    for name, param in model.named_parameters():
        if _has_memory(param):
            start = param.data_ptr()
            by_storage[param.untyped_storage().data_ptr()].append((start, start + _extent_nbytes(param), name, param))
    for places in by_storage.values():
        places.sort(key=lambda place: place[:2])
        for i, (_, stop, name, param) in enumerate(places):
            for start, _, other_name, other in places[i + 1 :]:
                if start >= stop:
                    break
                if (param.requires_grad or other.requires_grad) and _meet(param, other):
                    return _told(name, param, other_name, other)
    return None


def _told(name: str, param: nn.Parameter, other_name: str, other: nn.Parameter) -> str:
    is_same = (param.data_ptr(), param.numel()) == (other.data_ptr(), other.numel())
    return (
        f"the parameters {name} and {other_name} lie in the same memory{'' if is_same else ', or a part of it'}: in plain "
        "PyTorch a step of one moves the other, here each would train by itself.\n"
        f"  Tie them by making them one parameter (module.weight = other.weight) and compute views of it in the forward; or give "
        f"one memory of its own: {other_name}.data = {other_name}.data.clone()."
    )


def _has_memory(param: nn.Parameter) -> bool:
    is_plain = slot_of(param) is None and param.layout is torch.strided and not param.is_meta
    return (
        is_plain
        and not param.is_nested
        and not param.is_quantized
        and type(param) is nn.Parameter
        and param.numel() > 0
    )


def _extent_nbytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether any byte belongs to both. Seldom asked: their extents meet."""
    first = min(one.data_ptr(), other.data_ptr())
    stop = max(tensor.data_ptr() + _extent_nbytes(tensor) for tensor in (one, other))
    marks = [torch.zeros(stop - first, dtype=torch.bool) for _ in range(2)]
    for mark, tensor in zip(marks, (one, other), strict=True):
        nbytes = tensor.element_size()
        size = (*tensor.shape, nbytes)
        stride = (*(step * nbytes for step in tensor.stride()), 1)
        mark.as_strided(size, stride, tensor.data_ptr() - first).fill_(True)
    return bool((marks[0] & marks[1]).any())
