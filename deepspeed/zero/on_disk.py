"""What `optimizer.state` shows of a state that rests on the nvme tier between steps: it says so to whoever reads or writes it.

Made by `zero.stream`. An empty tensor in its place would be scaled, zeroed, saved and loaded again without effect or a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from deepspeed.utils.errors import NotAvailableError

_QUESTIONS = {
    *(getattr(torch._C.TensorBase, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "data_ptr", "is_floating_point", "__repr__")),
    torch.is_floating_point,
    torch.numel,
}  # fmt: skip
"""About the object, which has no elements."""


@final
class OnDisk(Tensor):
    """A state of no elements, of a dtype."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _QUESTIONS:
            _refuse(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse("copy.deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickle")


def on_disk(dtype: torch.dtype) -> Tensor:
    """In place of a state of this dtype."""
    return torch.empty(0, dtype=dtype).as_subclass(OnDisk)


def _refuse(use: str) -> NoReturn:
    raise NotAvailableError(
        f"optimizer.state[...]: the state rests on the nvme tier between steps, and cannot be used in {use!r}.\n"
        '  Read it by deepspeed.utils.safe_get_full_optimizer_state(param, "exp_avg"), write it by '
        "safe_set_full_optimizer_state(param, value, ...); save and load by engine.save_checkpoint and load_checkpoint; "
        "`optimizer.state.clear()` starts anew."
    )
