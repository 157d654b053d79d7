"""The compiled look at many tensors sees what torch sees, and says "changed" wherever only torch can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deepspeed.kernels import native, native_watch
from deepspeed.kernels.native_watch import Watch, watch
from deepspeed.zero.param import ZeroParameter

Edit = Callable[[nn.Parameter], object]

needs_library = pytest.mark.skipif(native.library() is None, reason="the package was built without a compiler")


def tensors() -> list[Tensor]:
    params: list[Tensor] = [nn.Parameter(torch.randn(3, 3)) for _ in range(20)]
    params[3].__class__ = ZeroParameter
    return [*params, torch.randn(5), torch.zeros(0), torch.tensor(1.0), torch.zeros(2, 2, dtype=torch.bfloat16)]


def write(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.mul_(2)


def assign(param: nn.Parameter) -> None:
    param.data = param.data.clone()


def transpose(param: nn.Parameter) -> None:
    param.data = param.data.t()


def swap(param: nn.Parameter) -> None:
    torch.utils.swap_tensors(param, nn.Parameter(torch.zeros(3, 3)))


def give_grad(param: nn.Parameter) -> None:
    param.grad = torch.zeros(3, 3)


def write_view(param: nn.Parameter) -> None:
    param.detach()[0].zero_()


def of_class(param: nn.Parameter) -> None:
    param.__class__ = nn.Parameter


@needs_library
@pytest.mark.parametrize("at", [0, 3, 19])
@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (write, {"versions"}),
        (write_view, {"versions"}),
        (assign, {"memory"}),
        (transpose, {"memory"}),
        (swap, {"memory", "versions", "no_grads"}),
        (give_grad, {"no_grads"}),
        (of_class, set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_sees_an_edit_of_one_tensor(edit: Edit, seen: set[str], at: int) -> None:
    every = tensors()
    watches = {what: watch(every, **{what: True}) for what in ("memory", "versions", "no_grads")}
    assert all(isinstance(made, Watch) and made.is_same() for made in watches.values())
    edit(every[at])  # type: ignore[arg-type]
    assert {what for what, made in watches.items() if made is not None and not made.is_same()} == seen


@needs_library
def test_what_torch_refuses_to_say_is_a_change() -> None:
    with torch.inference_mode():
        made = torch.zeros(3)
    param = nn.Parameter(torch.zeros(3), requires_grad=False)
    versions = watch([param], versions=True)
    param.data = made
    torch.utils.swap_tensors(param, nn.Parameter(made, requires_grad=False))
    assert versions is not None and not versions.is_same()


def test_without_a_library_torch_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    native_watch._torch.cache_clear()
    try:
        assert watch(tensors(), memory=True) is None
    finally:
        monkeypatch.undo()
        native_watch._torch.cache_clear()


def test_of_no_tensors_there_is_none() -> None:
    assert watch([], memory=True) is None
