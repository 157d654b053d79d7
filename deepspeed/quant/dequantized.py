"""What the weight of a quantized layer is read as: the weight made whole for the one who asks, which cannot be written.

Used by `linear`. The integers are the weight; values written into a copy of them would be lost without a word, an adapter's merge too.

Invariant: what shares memory with such a tensor is one, what is computed from it is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


class QuantizedWeightError(DeepSpeedError, RuntimeError):
    """A quantized weight was to be written."""


def refuse_writing(what: str) -> None:
    """Raise QuantizedWeightError for what was tried."""
    raise QuantizedWeightError(
        f"writing ({what}) to a quantized layer's weight: what is read there is made from the integers each time, and nothing reads it back.\n"
        "  Change weights, and merge adapters, before they are quantized; or put an nn.Linear in the layer's place."
    )


class Dequantized(Tensor):
    """A weight [rows, width] to be read."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor of its own."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor's."""
        return self.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """As torch's, but for operators that write."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        of_weight = next((value for value in args[:1] if isinstance(value, Dequantized)), None)
        if of_weight is not None and _writes(name) and not (name == "__set__" and func != _SET_DATA):
            refuse_writing(name)
        if isinstance(kwargs.get("out"), Dequantized):
            refuse_writing("out")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if of_weight is not None and type(found) is Tensor and _shares(found, of_weight):
            return found.as_subclass(Dequantized)
        return found


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _writes(name: str) -> bool:
    is_in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return is_in_place or name in ("__set__", "__setitem__") or (name.startswith("__i") and name not in _NOT_WRITTEN)


_NOT_WRITTEN = ("__invert__", "__index__", "__int__", "__init__")


def _shares(found: Tensor, weight: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        if found.device != weight.device or found.is_meta or found.layout is not torch.strided:
            return False
        return found.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
