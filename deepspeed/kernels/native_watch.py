"""Whether many tensors are where and as they were, in one compiled pass: 5 ns a tensor where a call into torch takes 55.

Asked by `zero.facts` in every step, which looks by torch itself where this says no, or where there is none (`watch` gives None): without
the library, on other interpreters, or where torch's layout is not the one tried here. Torch answers for each tensor through its C interface.

Invariant: a `Watch` keeps the Python objects alive whose memory it reads; a tensor inside of them that was swapped is a change.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from deepspeed.kernels import native

_VERSION, _GRAD = "_ZNK2at10TensorBase8_versionEv", "_ZNK3c1010TensorImpl4gradEv"
"""`at::TensorBase::_version() const` and `c10::TensorImpl::grad() const`, which the C interface has not."""


class _Torch(NamedTuple):
    """The pass, and torch's functions for it."""

    run: Callable[..., int]
    get_pointer: int
    is_contiguous: int
    get_version: int
    get_grad: int
    offset: int
    """Of the tensor's implementation in a Python object, in bytes."""
    no_grad: int
    """What stands for a gradient that is None."""


@final
class Watch:
    """Of tensors with the memory that they have now, or the versions, or without gradients."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        by: _Torch,
        *,
        memory: bool = False,
        versions: bool = False,
        no_grads: bool = False,
    ) -> None:
        self._tensors, num = list(tensors), len(tensors)
        ids = (ctypes.c_void_p * num)(*map(id, self._tensors))
        with torch._C.DisableTorchFunctionSubclass():
            impls = (ctypes.c_void_p * num)(*(tensor._cdata for tensor in self._tensors))
            at = (ctypes.c_void_p * num)(*map(Tensor.data_ptr, self._tensors)) if memory else None
            counts = (ctypes.c_int64 * num)(*(tensor._version for tensor in self._tensors)) if versions else None
        self._run = functools.partial(
            by.run, ids, num, by.offset, impls, at, by.get_pointer, by.is_contiguous, counts, by.get_version,
            by.no_grad if no_grads else None, by.get_grad,
        )  # fmt: skip

    def is_same(self) -> bool:
        """Whether each has the memory, contiguous, or the version that it had, or no gradient."""
        return self._run() == 1


def watch(tensors: Sequence[Tensor], **what: bool) -> Watch | None:
    """A `Watch`; None where only torch can look."""
    found = _torch()
    return Watch(tensors, found, **what) if found is not None and tensors else None


@functools.cache
def _torch() -> _Torch | None:
    library, folder = native.library(), Path(torch.__file__).parent / "lib"
    if library is None or sys.implementation.name != "cpython" or not (folder / "libc10.so").exists():
        return None
    try:
        # Those that are loaded already.
        theirs, core = (ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libc10.so"))
        found = [theirs.aoti_torch_get_data_ptr, theirs.aoti_torch_is_contiguous, theirs[_VERSION], core[_GRAD]]
        run = ctypes.PyDLL(str(native.PATH)).ds_are_as_before
    except (OSError, AttributeError):
        return None
    run.restype = ctypes.c_int64
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 8]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]
    offset = _offset()
    if offset is None:
        return None
    found[3].restype, found[3].argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    no_grad = ctypes.c_void_p.from_address(found[3](torch.zeros(1)._cdata)).value or 0
    made = _Torch(run, addresses[0], addresses[1], addresses[2], addresses[3], offset, no_grad)
    return made if _answers_as_torch(made) else None


def _offset() -> int | None:
    """Where Python's object has its tensor, the same in all that are tried; None: not where it is looked for."""
    tried = [torch.zeros(3), torch.nn.Parameter(torch.zeros(2, 2)), torch.empty(0)]
    for offset in (object.__basicsize__, object.__basicsize__ + 8):
        if all(ctypes.c_void_p.from_address(id(tensor) + offset).value == tensor._cdata for tensor in tried):
            return offset
    return None


def _answers_as_torch(found: _Torch) -> bool:
    """Whether the pass sees what torch says, of tensors that change and such that do not."""
    tensor, other = torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3)
    memory = Watch([other, tensor], found, memory=True)
    versions = Watch([other, tensor], found, versions=True)
    no_grads = Watch([other, tensor], found, no_grads=True)
    said = [memory.is_same(), versions.is_same(), no_grads.is_same()]
    with torch.no_grad():
        tensor.add_(1)
    said += [memory.is_same(), not versions.is_same()]
    other.t_()
    said.append(not memory.is_same())
    other.t_()
    said.append(memory.is_same())
    tensor.data = torch.zeros(2, 3)
    said.append(not memory.is_same())
    tensor.grad = torch.zeros(2, 3)
    said.append(not no_grads.is_same())
    tensor.grad = None
    return all([*said, no_grads.is_same()])
