"""What a block with a list of experts does with a token, found out by trying: its router, weights and shared experts.

Used by `listed`. Such blocks loop over experts in a forward of their own, which cannot be spread over ranks; what it computes
has few forms. Each is tried on some random tokens, with dropout and without, and what gives the block's own output is its
recipe. No family is known by name, and none is taken for another: a block that no form equals has no recipe.

    choices     the router says which experts and by what (a tuple of integers and floats); or its scores, softmax or
                sigmoid in fp32, say: the top k, to sum 1 or as they are, times a factor
    beside      nothing; children that every token visits are added, behind a sigmoid gate of one column if there is one
    returns     the tokens; or a pair with the router's logits

Invariant: trying changes no weight, no mode and no random number of the model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

NUM_TRIED = 24
"""Tokens of a trial."""
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "k")
_SCALE = ("routed_scaling_factor", "route_scale")


@dataclass(frozen=True)
class Recipe:
    """One form of a block."""

    router: str
    """The child that is the router."""
    by: Literal["router", "softmax", "sigmoid"]
    top_k: int
    sums_to_one: bool
    scale: float
    shared: tuple[str, ...] = ()
    """Children that every token visits."""
    shared_gate: str = ""
    returns_logits: bool = False

    def choose(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(experts [s, k], weights [s, k], logits [s, experts] if the block returns them) of tokens [s, width]."""
        said = block.get_submodule(self.router)(tokens)
        if self.by == "router":
            parts = [part for part in said if isinstance(part, Tensor) and part.dim() > 1]
            chosen = next(part for part in parts if not part.is_floating_point())
            weights = next(part for part in parts if part.is_floating_point() and part.shape == chosen.shape)
            return chosen.long(), weights, None
        logits = said if isinstance(said, Tensor) else said[0]
        scores = logits.float().softmax(-1) if self.by == "softmax" else logits.float().sigmoid()
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.sums_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, (weights * self.scale).to(tokens.dtype), logits

    def beside(self, block: nn.Module, tokens: Tensor) -> Tensor | None:
        """What is added to what experts say."""
        total: Tensor | None = None
        for name in self.shared:
            value = block.get_submodule(name)(tokens)
            if self.shared_gate:
                value = block.get_submodule(self.shared_gate)(tokens).sigmoid() * value
            total = value if total is None else total + value
        return total


def dense(block: nn.Module, experts: nn.ModuleList, recipe: Recipe, hidden: Tensor) -> Tensor:
    """The recipe, with all experts here, in the loop of a block: [1, s, width] to as much."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    chosen, weights, _ = recipe.choose(block, tokens)
    result = torch.zeros_like(tokens)
    for number, expert in enumerate(experts):
        token, choice = (chosen == number).nonzero(as_tuple=True)
        if token.numel():
            result.index_add_(0, token, (expert(tokens[token]) * weights[token, choice, None]).to(result.dtype))
    beside = recipe.beside(block, tokens)
    return (result if beside is None else result + beside).view(hidden.shape)


def find_recipe(block: nn.Module, experts: nn.ModuleList, router: str, owners: list[Any]) -> Recipe | None:
    """The form that equals the block, None for none. `owners`: what may say `top_k` and factors, the nearest first."""
    weight = block.get_submodule(router).get_parameter("weight")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}.get(weight.dtype, 2e-2)
    modes = {module: module.training for module in block.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(0)
        hidden = torch.randn(1, NUM_TRIED, weight.shape[1]).to(weight)
        try:
            wanted = [_answer(block, hidden, trains) for trains in (False, True)]
            errors = [
                (_error(block, experts, recipe, hidden, wanted), recipe)
                for recipe in _forms(block, experts, router, owners, wanted)
            ]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None  # a forward that wants more than tokens
        finally:
            for module, trains in modes.items():
                module.training = trains
    best, recipe = min(errors, key=lambda pair: pair[0], default=(float("inf"), None))
    return recipe if best <= tolerance else None


def _answer(block: nn.Module, hidden: Tensor, trains: bool) -> Any:
    block.train(trains)
    torch.manual_seed(1)
    return block(hidden)


def _error(block: nn.Module, experts: nn.ModuleList, recipe: Recipe, hidden: Tensor, wanted: list[Any]) -> float:
    worst = 0.0
    for trains, answer in zip((False, True), wanted, strict=True):
        block.train(trains)
        torch.manual_seed(1)
        expected = answer[0] if isinstance(answer, tuple) else answer
        try:
            found = dense(block, experts, recipe, hidden)
        except (RuntimeError, TypeError, ValueError, StopIteration, IndexError):
            return float("inf")
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    return worst


def _forms(
    block: nn.Module, experts: nn.ModuleList, router: str, owners: list[Any], wanted: list[Any]
) -> Iterator[Recipe]:
    """The forms that can be, from the structure."""
    answer = wanted[0]
    if isinstance(answer, tuple) and (len(answer) != 2 or not _are_logits(answer[1], len(experts))):
        return
    others = [name for name, child in block.named_children() if name != router and child is not experts]
    others = [name for name in others if any(True for _ in block.get_submodule(name).parameters())]
    gates = [name for name in others if _is_gate(block.get_submodule(name))]
    if len(gates) > 1:
        return
    shared = tuple(name for name in others if name not in gates)
    k = next((int(value) for value in _said(owners, _TOP_K) if isinstance(value, int)), 0)
    scales = {1.0, *(float(value) for value in _said(owners, _SCALE) if isinstance(value, (int, float)))}
    own = Recipe(router, "router", k, False, 1.0, shared, gates[0] if gates else "")
    if not isinstance(answer, tuple):
        yield own
    ways: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    for by, sums_to_one, scale in itertools.product(ways, (True, False), sorted(scales)) if k else ():
        is_pair = isinstance(answer, tuple)
        yield replace(own, by=by, sums_to_one=sums_to_one, scale=scale, returns_logits=is_pair)


def _are_logits(value: Any, num_experts: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (NUM_TRIED, num_experts)


def _is_gate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 1


def _said(owners: list[Any], names: tuple[str, ...]) -> Iterator[Any]:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if value is not None and not isinstance(value, (nn.Module, bool)):
                yield value
