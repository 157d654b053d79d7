"""Blocks that keep their experts as a list, as models' own code has them; and training them, spread and plain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from tests.engine.runs import engine_of, make_config, mean_over_ranks
from tests.parallel.expert.models import CLASSES, WIDTH, batches, set_values
from tests.parallel.expert.runs import CLIP, SGD, Trained

EXPERTS = 4


class Expert(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((width, 6), (6, width), (width, 6)))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x)) * self.scale


class Softmax(nn.Module):
    """Softmax over all, the top two to sum 1; a pair with logits."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(EXPERTS))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), chosen

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            place, token = torch.where(mask[e])
            total.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return total

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.view(-1, hidden.shape[-1])
        logits = self.gate(x)
        weights, chosen = self.choose(logits)
        return self.mix(x, weights.to(x.dtype), chosen).view(hidden.shape), logits


class Shared(Softmax):
    """Probabilities as they are, and an expert for every token behind a gate."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.shared_expert, self.shared_expert_gate = Expert(width), nn.Linear(width, 1, bias=False)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)

    def forward(self, hidden: Tensor) -> Any:
        out, logits = super().forward(hidden)
        return out + torch.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert(hidden), logits


class Scaled(Softmax):
    """Sigmoid, a factor, the output alone."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.routed_scaling_factor = 1.5

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = logits.sigmoid().topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True) * self.routed_scaling_factor, chosen

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden)[0]


class OwnRouter(nn.Module):
    """Says which experts by itself: scores with a correction that only chooses, the better of two groups."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, width))
        self.register_buffer("correction", torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight).sigmoid()
        corrected = scores + self.correction
        groups = corrected.view(-1, 2, 2).sum(-1)
        is_best = F.one_hot(groups.argmax(-1), 2).repeat_interleave(2, dim=1).bool()
        chosen = corrected.masked_fill(~is_best, -1e9).topk(2, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


class Routed(Softmax):
    """The router decides; shared experts are added."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.gate, self.shared_experts = OwnRouter(width), Expert(width)

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.view(-1, hidden.shape[-1])
        chosen, weights = self.gate(hidden)
        return self.mix(x, weights, chosen).view(hidden.shape) + self.shared_experts(hidden)


class Strange(Softmax):
    """Nobody's form: the square root of what experts say."""

    def forward(self, hidden: Tensor) -> Any:
        out, logits = super().forward(hidden)
        return out.abs().sqrt(), logits


KINDS = {kind.__name__: kind for kind in (Softmax, Shared, Scaled, Routed, Strange)}


class Model(nn.Module):
    """Two blocks between linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList(KINDS[kind]() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))[:, None]
        for block in self.blocks:
            said = block(x)
            x = x + (said[0] if isinstance(said, tuple) else said)
        return F.cross_entropy(self.last(x[:, 0]), y)


def whole_names(model: nn.Module, ep: int, rank: int) -> dict[str, str]:
    """From a rank's names to those in the whole model."""
    found = {}
    for name, _ in model.named_parameters():
        head, middle, tail = name.partition(".experts.")
        local, _, rest = tail.partition(".")
        found[name] = f"{head}{middle}{int(local) + rank % ep * (EXPERTS // ep)}.{rest}" if middle else name
    return found


def train(
    rank: int,
    world_size: int,
    kind: str,
    ep: int,
    stage: int,
    is_clients: bool = False,
    save: str = "",
    load: str = "",
    extra: dict[str, Any] | None = None,
) -> Trained:
    """Three clipped steps; or two up to a save, the third after a load."""
    model = Model(kind)
    set_values(model)
    config = make_config(
        stage, micro=1, clip=CLIP, optimizer=SGD, expert_parallel={"enabled": True, "autoep_size": ep, **(extra or {})}
    )  # fmt: skip
    options: dict[str, Any] = {}
    if is_clients:
        config.pop("optimizer")
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = Trained()
    with engine_of(model, config, **options) as engine:
        if load:
            engine.load_checkpoint(load)
        for step in batches(3, world_size)[slice(2, 3) if load else slice(0, 2) if save else slice(0, 3)]:
            loss = engine(*step[rank])
            engine.backward(loss)
            engine.step()
            found.losses.append(mean_over_ranks(loss))
            found.norms.append(engine.get_global_grad_norm())
        if save:
            engine.save_checkpoint(save)
        names = whole_names(model, EXPERTS // len(model.blocks[0].experts), rank)
        for name, param in model.named_parameters():
            found.weights[names[name]] = deepspeed.utils.safe_get_full_fp32_param(param).clone()
    return found


def plain(kind: str, num_ranks: int) -> Trained:
    """The same in one process."""
    model = Model(kind)
    set_values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = Trained()
    for step in batches(3, num_ranks):
        loss = torch.stack([model(x, y) for x, y in step]).mean()
        optimizer.zero_grad()
        loss.backward()
        found.norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        found.losses.append(loss.item())
    found.weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return found
