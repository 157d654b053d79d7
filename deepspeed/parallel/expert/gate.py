"""Gates: from a token's logits to its experts, with capacities, drops, noise and the auxiliary loss.

Used by `layer`; the three functions are public (`deepspeed.moe.sharded_moe`). Each first makes `Routes`, which say for
every token which experts it goes to and by what its results are weighed; the dense tensors that the public functions
return otherwise, [tokens, experts, capacity], are made from those and only on request.

    top-1    argmax (RSample: of logits + Gumbel noise); weighed by its probability; drops at random (RTS) or late-comers
    top-2    the second is drawn with noise; late-comers dropped, second choices behind all first ones; weights sum to 1
    top-k    the k most probable; drops the least probable, or late-comers; weights sum to 1

Invariant: probabilities, weights and the loss are fp32 whatever the model is; what is counted is counted before drops.
After GShard (arXiv:2006.16668) and Switch (arXiv:2101.03961), with the public contract's rules.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.expert.capacity import capacity_of, check_factors, check_k, check_minimum, check_width
from deepspeed.utils.errors import DeepSpeedError

NOISE_POLICIES = (None, "None", "Jitter", "RSample")
JITTER = 1e-2


class Routes(NamedTuple):
    """Where tokens go. k choices of s tokens among `num_experts`."""

    l_aux: Tensor
    """[], the auxiliary loss: 1 where experts are used evenly (for k choices scaled alike)."""
    capacity: int
    """Places of each expert; 0 where nothing is dropped, when nobody has to know."""
    num_experts: int
    indices: Tensor
    """[k, s] int32, the expert of each choice; -1 where it was dropped."""
    locations: Tensor
    """[k, s] int32, the choice's place among those of its expert."""
    gates: Tensor
    """[k, s] fp32, what the expert's result is multiplied by; 0 where dropped."""
    exp_counts: Tensor
    """[experts], tokens that chose each expert, before drops."""


Dense = tuple[Tensor, Tensor, Tensor, Tensor]
"""(l_aux, combine weights [s, e, c], dispatch mask [s, e, c], exp_counts)."""


class Noise:
    """What is drawn for a gate: by each rank for itself, or the first one's for all ranks that have the same tokens."""

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def __deepcopy__(self, memo: Any) -> Noise:
        return self

    def same(self, drawn: Tensor) -> Tensor:
        """`drawn`, or in its place what the group's first rank drew. Collective over the group, if there is one."""
        if self._group is not None:
            torch.distributed.broadcast(drawn, group=self._group, group_src=0)
        return drawn


OWN_NOISE = Noise()


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise."""
    tiny = torch.finfo(torch.float32).tiny
    return -torch.empty_like(logits, dtype=torch.float32).exponential_().clamp_min_(tiny).log_()


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
    sparse_routes: bool = False,
    use_tutel: bool = False,
    noise: Noise = OWN_NOISE,
) -> Dense | Routes:
    """Each of [s, experts] logits to one expert. `used_token` [s] of 0 and 1 leaves tokens out."""
    s, num_experts = logits.shape
    gates = F.softmax(logits.float(), dim=1)
    noisy = logits.float() + noise.same(gumbel_like(logits)) if noisy_gate_policy == "RSample" else gates
    chosen = noisy.argmax(dim=1)
    mask = F.one_hot(chosen, num_experts)
    if used_token is not None:
        mask = mask * used_token.reshape(-1, 1).to(mask.dtype)
    counts = mask.sum(dim=0)
    l_aux = _evenness(gates, mask).sum() * num_experts
    if drop_tokens:
        capacity = capacity_of(s, num_experts, capacity_factor, min_capacity)
        priority = mask * noise.same(torch.rand_like(gates)) if use_rts else mask.float()
        mask = mask * _first(priority, min(capacity, s))
    else:
        capacity = 0 if sparse_routes else _largest(counts, ep_group)
    places = _places(mask)
    weights = (gates * mask).sum(dim=1)
    kept = mask.sum(dim=1) > 0
    indices = torch.where(kept, chosen, -1)
    return _routes(l_aux, capacity, [indices], [places.gather(1, chosen[:, None])[:, 0]], [weights], counts, sparse_routes)  # fmt: skip


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
    sparse_routes: bool = False,
    noise: Noise = OWN_NOISE,
) -> Dense | Routes:
    """Each of [s, experts] logits to two experts, the second drawn by its probability."""
    s, num_experts = logits.shape
    logits = logits.float()
    gates = F.softmax(logits, dim=1)
    first = gates.argmax(dim=1)
    mask1 = F.one_hot(first, num_experts)
    noisy = logits + noise.same(gumbel_like(logits)) if top2_2nd_expert_sampling else logits
    second = noisy.masked_fill(mask1.bool(), float("-inf")).argmax(dim=1)
    mask2 = F.one_hot(second, num_experts)
    l_aux = _evenness(gates, mask1).mean() * num_experts * num_experts
    counts = (mask1 + mask2).sum(dim=0)
    places1, places2 = _places(mask1), _places(mask2) + mask1.sum(dim=0, keepdim=True)
    if drop_tokens:
        capacity = capacity_of(s, num_experts, 2 * capacity_factor, min_capacity)
        mask1, mask2 = mask1 * (places1 < capacity), mask2 * (places2 < capacity)
    else:
        capacity = 0 if sparse_routes else _largest(counts, ep_group)
    weights1, weights2 = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
    total = (weights1 + weights2).clamp_min(torch.finfo(gates.dtype).eps)
    return _routes(
        l_aux,
        capacity,
        [torch.where(mask.sum(dim=1) > 0, index, -1) for mask, index in ((mask1, first), (mask2, second))],
        [places1.gather(1, first[:, None])[:, 0], places2.gather(1, second[:, None])[:, 0]],
        [weights1 / total, weights2 / total],
        counts,
        sparse_routes,
    )


def topkgating(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    drop_policy: Literal["probs", "position"] = "probs",
    sparse_routes: bool = False,
) -> Dense | Routes:
    """Each of [s, experts] logits to its k most probable experts."""
    if drop_policy not in ("probs", "position"):
        raise DeepSpeedError(f"Invalid drop_policy: {drop_policy!r}.\n  Use 'probs' or 'position'.")
    s, num_experts = logits.shape
    check_k(k, num_experts)
    gates = F.softmax(logits.float(), dim=1)
    values, chosen = torch.topk(gates, k=k, dim=1)
    mask = torch.zeros_like(gates, dtype=torch.int64).scatter_(1, chosen, 1)
    counts = mask.sum(dim=0)
    l_aux = _evenness(gates, mask).mean() * num_experts * num_experts / k
    if drop_tokens:
        capacity = capacity_of(s, num_experts, k * capacity_factor, min_capacity)
        if drop_policy == "probs":
            mask = mask * _first(torch.zeros_like(gates).scatter(1, chosen, values).detach(), min(capacity, s))
        else:
            mask = mask * (_places(mask) < capacity)
    else:
        capacity = 0 if sparse_routes else _largest(counts, ep_group)
    places = _places(mask)
    kept = mask.gather(1, chosen) > 0
    weights = torch.where(kept, values, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(gates.dtype).eps)
    indices, located = torch.where(kept, chosen, -1), places.gather(1, chosen)
    return _routes(
        l_aux, capacity, list(indices.T), list(located.T), list(weights.T), counts, sparse_routes
    )  # fmt: skip


def _evenness(gates: Tensor, mask: Tensor) -> Tensor:
    """[experts] mean probability times mean choice; zeros of a rank without tokens, whose means would be no numbers."""
    num_tokens = max(1, len(gates))
    return gates.sum(dim=0) / num_tokens * (mask.float().sum(dim=0) / num_tokens)


def _first(priority: Tensor, number: int) -> Tensor:
    """[s, experts] of 0 and 1: of each expert's tokens the `number` of highest priority, among equals the earlier ones."""
    order = priority.sort(dim=0, descending=True, stable=True).indices[:number]
    return torch.zeros_like(priority, dtype=torch.int64).scatter_(0, order, 1)


def _places(mask: Tensor) -> Tensor:
    """Each token's place among the tokens of an expert."""
    return mask.cumsum(dim=0) - 1


def _largest(counts: Tensor, ep_group: Any) -> int:
    """The capacity that drops nothing, for all ranks of a group, which exchange buffers of that size."""
    largest = counts.max()
    if ep_group is not None and torch.distributed.get_world_size(ep_group) > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=ep_group)
    return int(largest)


def _routes(
    l_aux: Tensor,
    capacity: int,
    indices: list[Tensor],
    locations: list[Tensor],
    weights: list[Tensor],
    counts: Tensor,
    is_sparse: bool,
) -> Dense | Routes:
    index, place = torch.stack(indices).int(), torch.stack(locations).int()
    place = torch.where(index >= 0, place, 0)
    routes = Routes(l_aux, capacity, counts.numel(), index, place, torch.stack(weights), counts)
    return routes if is_sparse else dense(routes)


def dense(routes: Routes) -> Dense:
    """The tensors [s, experts, capacity] of the original papers."""
    _, s = routes.indices.shape
    combine = routes.gates.new_zeros(s, routes.num_experts * routes.capacity)
    kept = routes.indices >= 0
    flat = torch.where(kept, routes.indices * routes.capacity + routes.locations, 0).long()
    combine = combine.scatter_add(1, flat.T, torch.where(kept, routes.gates, 0.0).T)
    combine = combine.view(s, routes.num_experts, routes.capacity)
    return routes.l_aux, combine, combine.bool(), routes.exp_counts


class Router(nn.Linear):
    """A Linear that multiplies in fp32 whatever its weight's dtype, so that close experts are told apart."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., model_dim] of any dtype to fp32 [..., experts]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class TopKGate(nn.Module):
    """The gate of `MoE`: `forward(tokens [s, model_dim])` gives `Dense`, or with `sparse_routes=True` `Routes`."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group: Any = None,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        if noisy_gate_policy not in NOISE_POLICIES:
            raise DeepSpeedError(
                f"Unsupported noisy_gate_policy: {noisy_gate_policy!r}.\n  Use None, 'None', 'Jitter' or 'RSample'."
            )
        if drop_tokens:
            check_factors(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
            check_minimum(min_capacity)
        check_k(k, num_experts)
        check_width(model_dim)
        self.wg = Router(model_dim, num_experts, bias=False)
        self.ep_group = ep_group
        self.model_dim, self.k = model_dim, k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens, self.use_rts = drop_tokens, use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.wall_clock_breakdown = False
        self.gate_time = 0.0
        self.noise = OWN_NOISE

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, use_tutel: bool = False, sparse_routes: bool = False
    ) -> Dense | Routes:
        """Route [s, model_dim] tokens. `used_token` is for k = 1."""
        if used_token is not None and self.k != 1:
            raise DeepSpeedError(f"used_token is for k = 1; this gate has k = {self.k}.\n  Leave it out.")
        if input.shape[-1] != self.model_dim:
            raise DeepSpeedError(
                f"a gate of hidden_size = {self.model_dim} was given tokens {list(input.shape)}, of width {input.shape[-1]}.\n"
                "  Build the layer with the width of the tokens that it gets."
            )
        if self.noisy_gate_policy == "Jitter" and self.training:
            input = input * self.noise.same(torch.empty_like(input).uniform_(1.0 - JITTER, 1.0 + JITTER))
        logits = self.wg(input)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        limits = (factor, self.min_capacity)
        common: dict[str, Any] = {
            "drop_tokens": self.drop_tokens,
            "ep_group": self.ep_group,
            "sparse_routes": sparse_routes,
        }
        if self.k == 1:
            policy = self.noisy_gate_policy if self.training else None
            return top1gating(logits, *limits, used_token, policy, use_rts=self.use_rts, noise=self.noise, **common)
        if self.k == 2:
            sampled = self.top2_2nd_expert_sampling
            return top2gating(logits, *limits, top2_2nd_expert_sampling=sampled, noise=self.noise, **common)
        return topkgating(logits, self.k, *limits, **common)
