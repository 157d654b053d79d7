"""Small models with experts: ours, and the same as a dense loop in plain PyTorch, which knows nothing of the package."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, NUM_EXPERTS, CLASSES = 8, 4, 5
LONG = pytest.mark.skipif(not os.environ.get("DS_TEST_LONG"), reason="long: make test-experts")
AUX = 0.05


class FeedForward(nn.Module):
    """One expert."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class LoopGate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, NUM_EXPERTS, bias=False)


class LoopExperts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(FeedForward(width) for _ in range(NUM_EXPERTS))


class LoopLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.experts = LoopGate(width), LoopExperts(width)


class Loop(nn.Module):
    """Every token through its k most probable experts, weighed to sum 1 (k > 1); named as `MoE` names its parts."""

    def __init__(self, k: int, use_residual: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.k = k
        self.deepspeed_moe = LoopLayer(width)
        self.use_residual = use_residual
        if use_residual:
            self.mlp, self.coefficient = FeedForward(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = F.softmax(self.deepspeed_moe.gate.wg(x), dim=-1)
        weights, chosen = probabilities.topk(self.k, dim=-1)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for e, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            output = output + weight * expert(x)
        mask = F.one_hot(chosen, NUM_EXPERTS).float()
        counted = mask[:, :1] if self.k == 2 else mask
        shares = counted.sum(1).mean(0) * probabilities.mean(0)
        l_aux = NUM_EXPERTS * shares.sum() / (1 if self.k <= 2 else self.k)
        if self.use_residual:
            mix = F.softmax(self.coefficient(x), dim=-1)
            output = output * mix[:, :1] + self.mlp(x) * mix[:, 1:]
        return output, l_aux, mask.sum((0, 1))


class Model(nn.Module):
    """Two layers with experts between linear ones."""

    def __init__(self, moe: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(moe)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        l_aux = x.new_zeros(())
        for layer in self.layers:
            output, of_layer, _ = layer(x)
            x, l_aux = x + output, l_aux + of_layer
        return F.cross_entropy(self.last(x).float(), y) + AUX * l_aux


def set_values(model: nn.Module, names: dict[str, str] | None = None) -> None:
    """Values that follow from a parameter's name in the whole model, so that all divisions start alike."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            name = (names or {}).get(name, name)
            generator = torch.Generator().manual_seed(sum(ord(c) * 31**i % 10007 for i, c in enumerate(name)))
            param.copy_(torch.randn(param.shape, generator=generator) * 0.4)


def whole_names(model: nn.Module, ep: int, rank: int) -> dict[str, str]:
    """From a rank's names to those in the whole model; experts of one rank are neighbours."""
    here = NUM_EXPERTS // ep
    found = {}
    for name, _ in model.named_parameters():
        head, middle, tail = name.partition(".deepspeed_experts.")
        if middle:
            local, _, rest = tail.partition(".")
            name_ = f"{head}{middle}{int(local) + rank % ep * here}.{rest}"
            found[name] = name_
    return found


def batches(num_steps: int, num_ranks: int, tokens: int = 24) -> list[list[tuple[Tensor, Tensor]]]:
    """Per step, the share of each of `num_ranks`."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(num_steps):
        x = torch.randn(tokens, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (tokens,), generator=generator)
        made.append(list(zip(x.chunk(num_ranks), y.chunk(num_ranks), strict=True)))
    return made
