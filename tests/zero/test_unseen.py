"""A backward that reaches a module by another way than its outputs trains as in plain PyTorch, at stage 3 as elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.zero.sharded import whole_values

WIDTH = 8
LossOf = Callable[[Any, Tensor], Tensor]


class Answer:
    """An object that no tree of containers opens."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Shift(nn.Module):
    """Autograd saves nothing of what is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.by + self.by).sum(0)


class Net(nn.Module):
    """Blocks in a container, a convolution and a norm, whose weights autograd saves as they are, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), Shift(), nn.Tanh()) for _ in range(3)])
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.kept: Any = None

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.blocks(x).unsqueeze(-2)).sum(-2))

    def forward(self, x: Tensor, how: str = "") -> Any:
        y = self.features(x)
        if how == "generator":
            return self.steps(y)
        if how == "closure":
            return lambda: self.head(y)
        if how == "forces":
            energy = self.head(y).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]
        if how == "inner transform":
            return torch.func.vmap(lambda row: self.head(row))(y)
        if how == "inner grad":
            return torch.func.vmap(torch.func.grad(lambda row: self.head(self.norm(row)).pow(2).sum()))(y)
        if how == "checkpoint":
            for block in self.blocks:
                y = checkpoint(lambda y, first=block[0]: y @ first.weight, y, use_reentrant=False)
        out = self.head(y)
        if how == "attribute":
            self.kept = out.pow(2).mean()
            return y.detach()
        if how == "both":
            self.kept = (self.blocks[0](x) * self.norm(x)).pow(2).mean()
            return out
        if how == "object":
            return Answer(out)
        if how == "iterator":
            return iter([out, y])
        if how == "distribution":
            return torch.distributions.Normal(out, 1.0)
        if how == "memory":
            self.kept, before = out, self.kept
            return out if before is None else out + before
        return out

    def steps(self, y: Tensor) -> Iterator[Tensor]:
        for _ in range(2):
            y = self.head(y)
            yield y


def mean_square(value: Tensor) -> Tensor:
    return value.pow(2).mean()


def kept(model: Any) -> Tensor:
    return (model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model).kept


def inner(model: Any) -> Net:
    return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model


def by_hook(model: Any, x: Tensor, name: str = "blocks.1.0") -> Tensor:
    found: list[Tensor] = []
    handle = inner(model).get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output))
    model(x)
    handle.remove()
    return mean_square(found[0])


def penalty(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return mean_square(out) + gradient.pow(2).sum(1).mean()


def hessian_vector(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return mean_square(second) + mean_square(model(x))


def two_forwards(model: Any, x: Tensor) -> Tensor:
    inner(model).kept = None
    model(x, "memory")
    loss = mean_square(model(x * 2, "memory"))
    inner(model).kept = None
    return loss


def both(model: Any, x: Tensor) -> Tensor:
    return mean_square(model(x, "both")) + kept(model)


def attribute_alone(model: Any, x: Tensor) -> Tensor:
    model(x, "both")
    return kept(model)


def attribute(model: Any, x: Tensor) -> Tensor:
    model(x, "attribute")
    return kept(model)


def jvp(model: Any, x: Tensor) -> Tensor:
    return mean_square(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1])


def size_of_weights(model: Any) -> Tensor:
    """Of what a script gathers and computes with itself."""
    params = list(inner(model).parameters())
    with deepspeed.zero.GatheredParameters(params):
        head = inner(model).head.weight
        loss = torch.as_tensor(sum(param.pow(2).sum() for param in params) + (head @ head.t()).norm())
    return loss


LOSSES: dict[str, LossOf] = {
    "object": lambda m, x: mean_square(m(x, "object").value),
    "distribution": lambda m, x: -m(x, "distribution").log_prob(x).mean(),
    "closure": lambda m, x: mean_square(m(x, "closure")()),
    "iterator": lambda m, x: sum(mean_square(y) for y in m(x, "iterator")),
    "generator": lambda m, x: sum(mean_square(y) for y in m(x, "generator")),
    "attribute": attribute,
    "both": both,
    "attribute alone": attribute_alone,
    "feature by hook": by_hook,
    "first feature by hook": lambda m, x: by_hook(m, x, "blocks.0.0"),
    "sum by hook": lambda m, x: by_hook(m, x, "blocks.1.1"),
    "hidden state": two_forwards,
    "penalty": penalty,
    "hessian": hessian_vector,
    "forces": lambda m, x: mean_square(m(x.clone().requires_grad_(True), "forces")),
    "vmap inside": lambda m, x: mean_square(m(x, "inner transform")),
    "grad inside": lambda m, x: mean_square(m(x, "inner grad")),
    "vmap": lambda m, x: mean_square(torch.func.vmap(m)(x)),
    "jvp": jvp,
    "grad": lambda m, x: mean_square(torch.func.grad(lambda z: m(z).pow(2).sum())(x)),
    "gathered": lambda m, x: mean_square(m(x)) + 0.1 * size_of_weights(m),
    "gathered alone": lambda m, x: 0.1 * size_of_weights(m),
    "checkpoint": lambda m, x: mean_square(checkpoint(m, x, "checkpoint", use_reentrant=False)),
    "submodule": lambda m, x: mean_square(inner(m).head(inner(m).blocks(x))),
}


def losses_of(model: Any, name: str, backward: Callable[[Tensor], Any], step: Callable[[], Any]) -> list[float]:
    found = []
    for i in range(3):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i))
        loss = LOSSES[name](model, x)
        found.append(float(loss.detach()))
        backward(loss)
        step()
    return found


def train(rank: int, world_size: int, stage: int, name: str, is_plain_call: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)

    def step_plain() -> None:
        optimizer.step()
        optimizer.zero_grad()

    expected = losses_of(plain, name, lambda loss: loss.backward(), step_plain)
    config = make_config(
        stage,
        micro=4,
        optimizer={"type": "SGD", "params": {"lr": 0.1}},
        gradient_clipping=0.0,
        zero={"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    )
    with engine_of(model, config) as engine:
        backward = (lambda loss: loss.backward()) if is_plain_call else engine.backward
        assert losses_of(engine, name, backward, engine.step) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for key, value in whole_values(engine.module).items():
            torch.testing.assert_close(value, plain.get_parameter(key).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_a_module_hands_out_unseen_trains_at_stage_3(name: str, world_size: int) -> None:
    run_ranks(world_size, train, 3, name, False)


@pytest.mark.parametrize("name", ["attribute", "closure", "penalty", "vmap"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_plain_backward_does_too_at_every_stage(name: str, stage: int) -> None:
    run_ranks(2, train, stage, name, True)
