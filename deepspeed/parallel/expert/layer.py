"""`MoE`: a layer of experts, of which each token visits a few. The public contract's layer, `deepspeed.moe.layer.MoE`.

Built by scripts; works by itself with all experts here (ep_size 1). With ep_size > 1 an engine gives it its ranks.

    MoE                  the whole layer, with its residual form (PR-MoE)
    deepspeed_moe        MOELayer
      gate.wg            TopKGate, fp32
      experts            Experts
    mlp, coefficient     residual: the given expert itself, shared by all ranks, and how to mix

After DeepSpeed-MoE (arXiv:2201.05596).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.parallel.expert.capacity import num_local
from deepspeed.parallel.expert.dispatch import apart, run_experts
from deepspeed.parallel.expert.experts import Experts
from deepspeed.parallel.expert.gate import NOISE_POLICIES, Routes, TopKGate
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedError, TrainingStateError
from deepspeed.utils.logging import warn_once


class MOELayer(nn.Module):
    """Gate, exchange and experts. `l_aux` and `exp_counts` are the last forward's.

    So are, with `wall_clock_breakdown`, the milliseconds of the whole (`time_moe`), of sending tokens to their experts
    (`time_falltoall`) and of what comes back (`time_salltoall`), and the gate's (`gate.gate_time`); 0.0 without.
    """

    def __init__(
        self,
        gate: TopKGate,
        experts: Experts,
        ep_group_name: str,
        ep_size: int,
        num_local_experts: int,
        use_tutel: bool = False,
    ) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.ep_group_name, self.ep_size, self.num_local_experts = ep_group_name, ep_size, num_local_experts
        self.ep_group: Any = None
        self.place = ExpertPlace(ep_size * num_local_experts)
        self.wall_clock_breakdown = False
        self.time_moe = self.time_falltoall = self.time_salltoall = 0.0
        self.l_aux: Tensor | float = 0.0
        self.exp_counts: Tensor | int = 0
        self._routes: Routes | None = None

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[..., width] to [..., width]; tokens that were dropped give zeros."""
        times = self.place.times
        times.is_on = self.wall_clock_breakdown
        with times.during("layer"):
            result = self._forward(hidden, used_token)
        if times.is_on:
            self.time_moe, self.gate.gate_time = times["layer"], times["gate"]
            self.time_falltoall, self.time_salltoall = times["first exchange"], times["second exchange"]
        return result

    def _forward(self, hidden: Tensor, used_token: Tensor | None) -> Tensor:
        if self.ep_size > 1 and self.place.size != self.ep_size:
            raise TrainingStateError(
                f"a layer of {self.place.num_experts} experts on ep_size = {self.ep_size} ranks does not know its ranks yet.\n"
                "  Pass the model to deepspeed.initialize before its first forward."
            )
        tokens = hidden.reshape(-1, hidden.shape[-1])
        with self.place.times.during("gate"):
            routes = self.gate(tokens, used_token, sparse_routes=True)
        assert isinstance(routes, Routes), "asked for sparse routes"
        self.l_aux, self.exp_counts = routes.l_aux, routes.exp_counts
        self.place.load.note_auxiliary(routes.l_aux)
        choices, weights = routes.indices.T.long(), routes.gates.T
        result = run_experts(tokens, choices, weights, self.place, apart(self.experts), routes.exp_counts)
        return result.reshape(*hidden.shape[:-1], result.shape[-1])

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = self.place.group = ep_group
        self.gate.ep_group = ep_group


class MoE(nn.Module):
    """A layer with `num_experts` copies of `expert`, of which each token visits k; see the module's text.

    hidden_size: width of tokens. expert: a module from [n, hidden_size] to as much, deep-copied; results that are tuples
    count by their first item. ep_size: ranks that share the experts; divides num_experts. capacity_factor (training),
    eval_capacity_factor, min_capacity: tokens an expert takes of a rank. use_residual: mix with `expert` as a dense
    layer. noisy_gate_policy: None, 'Jitter' or 'RSample', in training. drop_tokens: False for no limit. use_rts: drop at
    random instead of the late ones (k = 1). use_tutel: accepted, has no effect. enable_expert_tensor_parallelism: cut
    experts over ranks that share layers; else each of those has whole ones. top2_2nd_expert_sampling: draw the second of
    two.

    `forward(hidden_states, used_token=None)` gives (output, l_aux, exp_counts): add l_aux, times a small coefficient, to
    the loss. Raises DeepSpeedError (a ValueError and AssertionError) for arguments that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        _check_expert(expert, noisy_gate_policy)
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.num_experts, self.ep_size, self.k = num_experts, ep_size, k
        self.num_local_experts = num_local(num_experts, ep_size)
        self.expert_group_name = f"ep_size_{ep_size}"
        if use_tutel:
            warn_once("use_tutel = True has no effect: tokens are dispatched by their indices at the same cost.")
        gate = TopKGate(
            hidden_size, num_experts, k, capacity_factor, eval_capacity_factor, min_capacity, noisy_gate_policy,
            drop_tokens, use_rts, None, top2_2nd_expert_sampling,
        )  # fmt: skip
        experts = Experts(expert, self.num_local_experts, self.expert_group_name)
        self.deepspeed_moe = MOELayer(gate, experts, self.expert_group_name, ep_size, self.num_local_experts, use_tutel)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Of the public contract: the engine gives layers their ranks by itself, so there is nothing to do."""

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Any, Any]:
        """[..., hidden_size] -> (output of the same shape, auxiliary loss [], tokens per expert [experts])."""
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            dense = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense
            mix = torch.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * mix[..., 0:1] + dense * mix[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


def _check_expert(expert: Any, noisy_gate_policy: Any) -> None:
    if not isinstance(expert, nn.Module):
        raise DeepSpeedError(f"MoE(expert=...) is a {type(expert).__name__}, not an nn.Module: a gate without experts.")
    if noisy_gate_policy not in NOISE_POLICIES:
        raise DeepSpeedError(
            f"Unsupported noisy_gate_policy: {noisy_gate_policy!r}.\n  Use None, 'None', 'Jitter' or 'RSample'."
        )
