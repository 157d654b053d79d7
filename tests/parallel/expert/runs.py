"""Training runs with experts, as functions that worker processes call, and the same in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.moe.layer import MoE
from tests.engine.runs import engine_of, make_config, mean_over_ranks
from tests.parallel.expert.models import NUM_EXPERTS, WIDTH, FeedForward, Loop, Model, batches, set_values, whole_names

CLIP = 0.5
SGD = {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}}


@dataclass
class Trained:
    """Per step loss and norm, then weights by their names in the whole model."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def ours(ep: int, k: int, use_residual: bool, **arguments: Any) -> Model:
    """The model with `MoE` layers that drop nothing."""
    settings = {"drop_tokens": False, "top2_2nd_expert_sampling": False, **arguments}
    return Model(
        [
            MoE(WIDTH, FeedForward(), NUM_EXPERTS, ep_size=ep, k=k, use_residual=use_residual, **settings)
            for _ in range(2)
        ]
    )


ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "eps": 1e-5}}


def train(
    rank: int,
    world_size: int,
    ep: int,
    k: int,
    stage: int,
    extra: dict[str, Any] | None = None,
    load: str | None = None,
    save: str | None = None,
) -> Trained:
    """Clipped steps of ours, on this rank's share: all three, or the first two up to a save, the third after a load."""
    extra = dict(extra or {})
    use_residual = extra.pop("use_residual", False)
    model = ours(ep, k, use_residual)
    is_data_first = extra.get("use_data_before_expert_parallelism", False)
    names = whole_names(model, ep, rank // (world_size // ep) if is_data_first else rank)
    set_values(model, names)
    config = make_config(stage, micro=1, clip=CLIP, **{"optimizer": SGD, **extra})
    found = Trained()
    with engine_of(model, config) as engine:
        dtype = engine.get_data_types()[0]
        if load is not None:
            engine.load_checkpoint(load)
        steps = slice(2, 3) if load is not None else slice(0, 2) if save is not None else slice(0, 3)
        for step in batches(3, world_size)[steps]:
            x, y = step[rank]
            loss = engine(x.to(dtype), y)
            engine.backward(loss)
            engine.step()
            found.losses.append(mean_over_ranks(loss))
            found.norms.append(engine.get_global_grad_norm())
        if save is not None:
            engine.save_checkpoint(save)
        for name, param in model.named_parameters():
            found.weights[names.get(name, name)] = deepspeed.utils.safe_get_full_fp32_param(param).clone()
    return found


def plain(num_ranks: int, k: int, use_residual: bool = False, is_adam: bool = False, clip: float = CLIP) -> Trained:
    """The same steps of the dense loop in one process, with the mean of the ranks' losses."""
    model = Model([Loop(k, use_residual) for _ in range(2)])
    set_values(model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    if is_adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, eps=1e-5)
    found = Trained()
    for step in batches(3, num_ranks):
        loss = torch.stack([model(x, y) for x, y in step]).mean()
        optimizer.zero_grad()
        loss.backward()
        found.norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        found.losses.append(loss.item())
    found.weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return found


def compare(ranks: list[Trained], expected: Trained) -> None:
    """Losses to 1e-6, norms and weights to 1e-5; together the ranks have every parameter."""
    seen: set[str] = set()
    for found in ranks:
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=1e-6)
        for name, value in found.weights.items():
            torch.testing.assert_close(
                value, expected.weights[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        seen |= set(found.weights)
    assert seen == set(expected.weights)
