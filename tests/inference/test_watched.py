"""What a script may set on modules is noticed, whatever it is set on; what is set back is not held against them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.inference.watched import Watched, own_forward


class Scaled(nn.Module):
    """A product with numbers of its own, a parameter of one element and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.scaling = 1e9
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("offset", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return self.linear(x) * self.gain * self.scaling + self.shift


class Doubled(Scaled):
    """Another class of the same attributes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the product."""
        return super().forward(x) * 2


def put(held: dict[str, Any], name: str, value: Any) -> None:
    """Set an item."""
    held[name] = value


CHANGES: dict[str, Callable[[Any], object]] = {
    "number": lambda m: setattr(m, "scaling", 2.0),
    "array in a number's place": lambda m: put(m.__dict__, "scaling", torch.ones(3)),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "class": lambda m: setattr(m, "__class__", Doubled),
    "attributes": lambda m: setattr(m, "__dict__", m.__dict__ | {"scaling": 2.0}),
    "child": lambda m: setattr(m, "linear", nn.Linear(4, 4, bias=False)),
    "child more": lambda m: setattr(m, "adapter", nn.Linear(4, 4)),
    "child less": lambda m: delattr(m, "linear"),
    "child of a leaf": lambda m: setattr(m.linear, "adapter", nn.Linear(4, 4)),
    "training": lambda m: m.train(False),
    "equal parameter of one element": lambda m: setattr(m, "gain", nn.Parameter(torch.ones(1))),
    "equal buffer of one element": lambda m: setattr(m, "shift", torch.zeros(1)),
    "buffer where none was": lambda m: setattr(m, "offset", torch.zeros(1)),
    "bias where none was": lambda m: setattr(m.linear, "bias", nn.Parameter(torch.ones(4))),
    "parameters": lambda m: put(m.linear.__dict__, "_parameters", {"weight": nn.Parameter(torch.ones(4, 4))}),
    "parameter less": lambda m: delattr(m, "gain"),
    "parameter's data": lambda m: setattr(m.linear.weight, "data", torch.ones(4, 4)),
    "hook": lambda m: m.linear.register_forward_hook(lambda *_: None),
    "hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "hooks": lambda m: put(m.__dict__, "_forward_hooks", {0: print}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str) -> None:
    modules = nn.ModuleList(Scaled() for _ in range(3))
    watched = Watched(modules.modules())
    assert watched.is_as_it_was()
    CHANGES[what](modules[1])
    assert not watched.is_as_it_was()


def test_a_forward_that_a_class_is_given_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(nn.ModuleList([Scaled(), Doubled()]).modules())
    monkeypatch.setattr(Doubled, "forward", Scaled.forward)
    assert not watched.is_as_it_was()
    monkeypatch.undo()
    assert watched.is_as_it_was()


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Calling(nn.Module):
    """A forward that calls a function beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the input."""
        return doubled(x)


@pytest.mark.parametrize(
    ("where", "name"),
    [(Calling, "__call__"), (nn.Module, "__call__"), (nn.Module, "_call_impl"), (sys.modules[__name__], "doubled")],
)
def test_a_call_or_a_function_that_is_replaced_is_noticed(where: Any, name: str, monkeypatch: Any) -> None:
    watched = Watched(nn.ModuleList([Calling()]).modules())
    assert watched.is_as_it_was()
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: real(*args, **kwargs), raising=False)
    assert not watched.is_as_it_was()
    monkeypatch.undo()
    assert watched.is_as_it_was()


def test_a_class_s_own_call_is_told_before_layers_are_described() -> None:
    assert own_forward(nn.Linear(2, 2)) is None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Linear, "__call__", lambda self, x: nn.Module.__call__(self, x) * 2)
        found = own_forward(nn.Linear(2, 2))
        assert found is not None and "whose class's __call__ was replaced by one of" in found


def test_what_is_set_back_is_as_it_was() -> None:
    module = Scaled()
    watched = Watched(module.modules())
    linear, module.scaling = module.linear, 2.0
    module.linear = nn.Linear(4, 4)
    handle = module.register_forward_hook(lambda *_: None)
    assert not watched.is_as_it_was()
    module.linear, module.scaling = linear, float("1e9")
    handle.remove()
    with torch.no_grad():
        linear.weight.add_(1)  # in place: what knows the weight reads it there
    assert watched.is_as_it_was()
