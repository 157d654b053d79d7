"""Base of the optimizers whose parameters and state rest in main memory.

Its classes are built by `optim.build` where optimizer state is offloaded, or by the user, and stepped as any
torch.optim.Optimizer (`step`) or by ZeRO's offloaded step (`step_fused`). Both end in `_update`, which a class writes
once on lists of tensors.

Invariant: `step` and `step_fused` give the same bits for the same gradients, in whatever portions runs are stepped.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from deepspeed.kernels.native_optimizers import Lows
from deepspeed.optim.traits import FusedRun, ShardableOptimizer, StepsFused, loss_of, with_gradients
from deepspeed.utils.errors import DeepSpeedError

State = dict[str, Tensor]


class Batch(NamedTuple):
    """What is stepped together: tensors of one parameter group, with their gradients and complete states."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    lows: Lows | None = None
    """Where the updated parameters go as well, in low precision."""
    grad_factor: float = 1.0
    """What gradients are multiplied by."""

    @property
    def steps(self) -> list[Tensor]:
        """The tensors' counts of steps."""
        return self.column("step")

    def column(self, key: str) -> list[Tensor]:
        """One state of every tensor."""
        return [state[key] for state in self.states]


class CpuOptimizer(ShardableOptimizer, StepsFused):
    """See the module's text. A subclass names its state and writes `_update`."""

    state_keys: ClassVar[tuple[str, ...]] = ()
    """State tensors with their parameter's numel, where they are the same for every group."""

    fp32_optimizer_states = True
    """Whether those are fp32 (or wider, where a parameter is). Otherwise they have the parameter's dtype; of an fp32
    master, which stands for low-precision parameters, bf16."""

    @abc.abstractmethod
    def _update(self, batch: Batch) -> None:
        """One step of a group's tensors."""

    def state_keys_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State tensors with their parameter's numel."""
        return self.state_keys

    @property
    def state_names(self) -> dict[str, torch.dtype]:
        """The state tensors of an fp32 master, in any group, and their dtypes."""
        names = (key for group in self.param_groups for key in self.state_keys_of(group))
        return dict.fromkeys(names, torch.float32 if self.fp32_optimizer_states else torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Raises DeepSpeedError for a tensor not on the CPU."""
        loss = loss_of(closure)
        for group in self.param_groups:
            self._step_tensors(group)
        return loss

    @torch.no_grad()
    def step_subgroup(self, subgroup_id: int) -> None:
        """Update only the tensor at this position, counted through all groups."""
        group, param = self._subgroup(subgroup_id)
        self._step_tensors({**group, "params": [param]})

    @torch.no_grad()
    def step_fused(self, runs: Sequence[tuple[dict[str, Any], FusedRun]], grad_factor: float) -> None:
        """One step of each (parameter group, run), from `grad * grad_factor`; see `StepsFused`."""
        for group, members in by_group(runs):
            for run in members:
                check_run(self, run)
            states = [self._complete(group, run.master, is_master=True) for run in members]
            lows = [run.low for run in members]
            masters, grads = [run.master for run in members], [run.grad for run in members]
            self._update(Batch(group, masters, grads, states, lows, grad_factor))

    def _step_tensors(self, group: dict[str, Any]) -> None:
        params, grads = with_gradients(group)
        for param in params:
            check_on_cpu(self, param.device)
        states = [self._complete(group, param, is_master=False) for param in params]
        if params:
            self._update(Batch(group, params, grads, states))

    def _complete(self, group: dict[str, Any], param: Tensor, *, is_master: bool) -> State:
        """A tensor's state, with zeros for what it lacks."""
        if self.fp32_optimizer_states:
            dtype = state_dtype(param)
        else:
            dtype = torch.bfloat16 if is_master and param.dtype is torch.float32 else param.dtype
        return complete_state(self.state[param], param, self.state_keys_of(group), dtype)

    def _subgroup(self, subgroup_id: int) -> tuple[dict[str, Any], Tensor]:
        members = [(group, param) for group in self.param_groups for param in group["params"]]
        if not 0 <= subgroup_id < len(members):
            raise DeepSpeedError(f"sub-group {subgroup_id} does not exist: this optimizer has {len(members)} tensors.")
        return members[subgroup_id]


def state_dtype(param: Tensor) -> torch.dtype:
    """fp32, or wider where the parameter is."""
    return torch.promote_types(param.dtype, torch.float32)


def complete_state(state: State, param: Tensor, keys: Sequence[str], dtype: torch.dtype) -> State:
    """`state`, after giving it a count of steps and zeros like `param` for the keys it lacks."""
    if not state.keys() >= {"step", *keys}:
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=param.device))
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return state


def by_group(runs: Sequence[tuple[dict[str, Any], FusedRun]]) -> list[tuple[dict[str, Any], list[FusedRun]]]:
    """The runs of each parameter group, in order."""
    found: dict[int, tuple[dict[str, Any], list[FusedRun]]] = {}
    for group, run in runs:
        found.setdefault(id(group), (group, []))[1].append(run)
    return list(found.values())


def check_on_cpu(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise DeepSpeedError where a CPU optimizer is stepped on a tensor elsewhere."""
    if device.type != "cpu":
        name = type(optimizer).__name__
        raise DeepSpeedError(
            f"{name} updates parameters in main memory, this one is on {device}.\n"
            '  Set "zero_optimization": {"offload_optimizer": {"device": "cpu"}}, or use the optimizer\'s device variant.'
        )


def check_run(optimizer: torch.optim.Optimizer, run: FusedRun) -> None:
    """Raise DeepSpeedError for a run whose tensors are not in main memory, or not alike."""
    for what, tensor in (("master", run.master), ("grad", run.grad), ("low", run.low)):
        if tensor is None:
            continue
        check_on_cpu(optimizer, tensor.device)
        if tensor.shape != run.master.shape or not tensor.is_contiguous():
            raise DeepSpeedError(
                f"{type(optimizer).__name__}.step_fused: {what} has shape {tuple(tensor.shape)} and stride {tensor.stride()}, "
                f"its master has shape {tuple(run.master.shape)}.\n  All tensors of a run have one shape and no gaps."
            )
