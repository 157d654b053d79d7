"""Models that run over tensor-parallel ranks: which ranks, what is cut, and that they stay together.

Called by the engine, which asks `decide` for each module before anything is changed, and has it `cut` then. The layers are those of
`parallel.tensor`; a user's injection policy takes the place of its rules: what the policy names is summed over ranks, every other
linear layer of such a block is a column. Ranks that sample draw the same numbers (`same_draws`), and the first forward compares
what they were given.

Invariant: all ranks decide alike, from the model and the configuration alone, before a collective.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.init import init_distributed
from deepspeed.inference.calls import Calls, calls_of, tell_all
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.policy import row_names
from deepspeed.memory.fit import check_fit
from deepspeed.mesh import Mesh, data_parallel_mesh
from deepspeed.mesh.door import tensor_coordinate
from deepspeed.mesh.mesh import world_size
from deepspeed.parallel.tensor.apply import PARSED, Drawn, carry_out, draw
from deepspeed.parallel.tensor.choose import Chosen, Decision, Wishes, require_found, tell_fused
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.inputs import INCONSISTENT, check_first_forward, digest
from deepspeed.parallel.tensor.layers import is_linear
from deepspeed.parallel.tensor.refusal import CutRefusedError, Why
from deepspeed.parallel.tensor.rules import Action
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import log_dist

_WHOLE = re.compile(r"(mlp\.gate|block_sparse_moe\.gate|shared_expert_gate|router|q_a_proj|kv_a_proj_with_mqa)$")
"""Layers that stay whole under an injection policy, as the contract names them."""

_POLICY = "Give init_inference an injection_policy, {LayerClass: names of the layers whose outputs are summed}, or run it on one rank."
_ALONE = "Run it on one rank."
_CURES: Mapping[Why, str] = {
    Why.FAMILY: _ALONE,  # of the types that are refused, LED does not run by a policy either
    Why.NOTHING: _POLICY,
    Why.PLAN: _POLICY,
    Why.FUSED: _ALONE,  # a policy cannot tell the order either
    Why.KIND: _ALONE,
    Why.KEYS: "Choose a size of at most as many, or run it on one rank.",
    Why.SHARED: _ALONE,
    Why.NORM: _ALONE,
    Why.REPLACED: "Have its class's forward back before init_inference, or run it on one rank.",
    Why.FIT: "Choose another number of ranks, or run it on one.",
}
"""What a caller of init_inference can do; the errors' own ways out are keys of training."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that have pieces of each layer; `mesh` where the groups are ours, to be released."""

    tensor: TensorGroup
    mesh: Mesh | None = None
    calls: Calls | None = None
    """How one that fails inside of a call tells the others; None where waiting does not stop the host."""

    def call(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward or a generation, on all ranks."""
        return contextlib.nullcontext() if self.calls is None else self.calls

    def release(self) -> None:
        """The engine is done."""
        if self.calls is not None:
            self.calls.leave(self.tensor)
        if self.mesh is not None:
            self.mesh.release()

    def same_draws(self) -> None:
        """The first rank's random state on all of them, so that they sample the same tokens. Collective."""
        states = [torch.get_rng_state()]
        accelerator = get_accelerator()
        has_own = accelerator.device_name() != "cpu"
        if has_own:
            states.append(accelerator.get_rng_state())
        for state in states:
            sent = state.to(self._device)
            self.tensor.broadcast_(sent)
            state.copy_(sent)
        torch.set_rng_state(states[0])
        if has_own:
            accelerator.set_rng_state(states[1])

    @property
    def _device(self) -> str:
        """Where tensors have to be to be sent."""
        return get_accelerator().current_device_name() if dist.get_backend(self.tensor.group) == "nccl" else "cpu"

    def gather(self, value: Any) -> list[Any]:
        """See `agreed.Gather`."""
        return tell_all(self.tensor, value, self._device)

    def compare_first_inputs(self, module: nn.Module) -> None:
        """Have the module's first forward refuse, on all ranks, inputs that differ between them."""

        check_first_forward(module, self._tell_all)

    def compare(self, given: Iterable[Any]) -> None:
        """Raise AssertionError, on all ranks, where tensors among what they were given differ. Collective."""
        if len(set(self._tell_all(digest([value for value in given if isinstance(value, torch.Tensor)])))) > 1:
            raise AssertionError(INCONSISTENT)

    def _tell_all(self, digest: str) -> list[str]:
        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self._device)
        every = self.tensor.joined(own, [own.numel()] * self.tensor.size)
        return [bytes(part.tolist()).hex() for part in every.chunk(self.tensor.size)]


@dataclass(frozen=True)
class Decided:
    """What will be cut of one module."""

    chosen: Chosen
    drawn: Drawn


def ranks_of(config: DeepSpeedInferenceConfig) -> Ranks | None:
    """The ranks that the configuration says; None for one alone. Starts torch.distributed where a launcher's ranks have not.

    Collective where groups are made. Raises DeepSpeedConfigError, on every rank, for a size that does not fit.
    """
    section = config.tensor_parallel
    if not section.enabled:
        return None
    given = section.tp_group
    if given is None and section.mpu is not None:
        given = tensor_coordinate(section.mpu)[1]
    size = section.tp_size
    if given is not None:
        return _of_group(given, size if "tp_size" in section.model_fields_set else None)
    if size == 1:
        return None
    init_distributed(verbose=False)
    if world_size() % size:
        raise DeepSpeedConfigError(
            f"tensor_parallel.tp_size = {size}, but the job has {world_size()} ranks.\n"
            f"  Start a multiple of {size} ranks (deepspeed --num_accelerators {size} script.py), or choose a divisor."
        )
    mesh = data_parallel_mesh(tp=size)
    group = TensorGroup(mesh.group("tensor", "tensor"), mesh.rank("tensor"), size)
    return Ranks(group, mesh, calls_of(group, mesh.replace))


def _of_group(group: Any, stated: int | None) -> Ranks | None:
    size = dist.get_world_size(group)
    if stated is not None and stated != size:
        raise DeepSpeedConfigError(
            f"tensor_parallel.tp_size = {stated}, but the group that was given has {size} ranks.\n  Leave tp_size out."
        )
    ranks = TensorGroup(group, dist.get_rank(group), size)
    return Ranks(ranks, None, calls_of(ranks, lambda before, after: None)) if size > 1 else None


def decide(module: nn.Module, config: DeepSpeedInferenceConfig, ranks: Ranks) -> Decided:
    """What becomes of each layer; nothing is changed. Raises DeepSpeedConfigError where nothing can be cut, or not so."""
    if PARSED in module.__dict__:
        raise DeepSpeedConfigError(
            f"{type(module).__name__} is cut over ranks already.\n  Give init_inference the whole model."
        )
    policy = config.injection_policy
    wishes = Wishes(grain=config.tensor_parallel.tp_grain_size, size_key="tensor_parallel.tp_size", copies_shared=True)
    try:
        chosen, drawn = draw(module, ranks.tensor, wishes, None if policy is None else _by_policy(module, policy))
        require_found(module, [chosen])
        check_fit(module, ranks.tensor.size, wishes, chosen)
    except CutRefusedError as error:
        raise CutRefusedError(error.why, error.what, _CURES[error.why]) from error
    return Decided(chosen, drawn)


def cut(module: nn.Module, ranks: Ranks, decided: Decided) -> None:
    """Do it. Collective."""
    carry_out(module, ranks.tensor, decided.drawn, lambda param: None)
    acted = sum(d.action is not Action.WHOLE for d in decided.chosen.decisions.values())
    log_dist(f"over {ranks.tensor.size} ranks: {acted} layers by the model's {decided.chosen.source}", ranks=[0])


def _by_policy(module: nn.Module, policy: Any) -> Chosen:
    rows = set(row_names(module, policy))
    decisions: dict[str, Decision] = {}
    for prefix, block in module.named_modules():
        is_named = isinstance(block, tuple(policy))
        for name, layer in block.named_modules() if is_named else ():
            full = f"{prefix}.{name}".lstrip(".")
            if is_linear(layer) and not _WHOLE.search(full):
                decisions[full] = Decision(Action.ROW if full in rows else Action.COLUMN)
    if not any(d.action is Action.ROW for d in decisions.values()):
        raise DeepSpeedConfigError(
            f"injection_policy names {', '.join(sorted(rows))}, none of which is a linear layer that can be cut over ranks.\n"
            "  Name the layers whose outputs are summed."
        )
    chosen = Chosen("injection_policy", decisions)
    tell_fused(module, chosen)
    return chosen
