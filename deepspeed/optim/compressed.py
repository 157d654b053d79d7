"""What the 1-bit optimizers share: their settings, states and masks, and a reduction for one that is used without ZeRO.

Base of `OnebitAdam`, `ZeroOneAdam` and `OnebitLamb`. Where ZeRO steps them it installs a reduction of its own
(`zero.own_reduction`); alone they hold whole parameters, and average over the default process group if there is one.

Invariant: whatever is decided here (what is averaged, and how) follows from values that all ranks share.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.onebit import SignReduction
from deepspeed.optim.traits import AveragesItself, Needs, OwnReduction, RunSpan, ShardableOptimizer, Whole
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError, RankMismatchError
from deepspeed.utils.logging import logger, warn_once


class CompressedOptimizer(ShardableOptimizer, AveragesItself):
    """Base of the 1-bit optimizers.

    deepspeed: accepted for its place in the signature; the engine that steps an optimizer installs itself.
    """

    needs = Needs.OWN_REDUCTION

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, cuda_aware: bool, backend: str) -> None:
        name = type(self).__name__
        if defaults["max_grad_norm"] > 0:
            raise DeepSpeedError(
                f"max_grad_norm = {defaults['max_grad_norm']}: {name} does not clip; the engine does.\n"
                f'  Remove max_grad_norm and set "gradient_clipping" at the top of the configuration.'
            )
        if cuda_aware:
            warn_once(f"{name}: cuda_aware has no effect: messages go through torch.distributed on whatever device.")
        self.common: dict[str, Any] = {}
        self.has_agreed = False
        """Whether ranks that step it alone have told each other its settings."""
        self.comm_backend_name = backend
        """As it was given: messages go through torch.distributed, whatever this says."""
        super().__init__(params, defaults)

    @property
    def agreed_settings(self) -> dict[str, Any]:
        """See AveragesItself."""
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "lr", "exp_avg_mask")} for group in self.param_groups
        ]
        return {"class": type(self).__name__, "groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch's. Masks stay the script's own; those of the saved run are ignored."""
        masks = [group.get("exp_avg_mask") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mask in zip(self.param_groups, masks, strict=True):
            group.pop("exp_avg_mask", None)
            if mask is not None:
                group["exp_avg_mask"] = mask

    def _warn_unsettled(self, name: str, num_steps: int) -> None:
        """Say once that a variance stays before it has seen the steps that its own average reaches back over."""
        beta2 = max(float(group["betas"][1]) for group in self.param_groups)
        if beta2 < 1 and num_steps * (1 - beta2) < 1:
            warn_once(
                f"{type(self).__name__}: {name} = {num_steps}, but with betas[1] = {beta2:g} the variance needs about "
                f"{round(1 / (1 - beta2))} steps to settle; frozen sooner it is too small, and steps are too large for ever.\n"
                f"  Set {name} to 15 to 25 % of the run and betas[1] to what settles within it, such as 0.95 for a few hundred steps."
            )

    def _own(self) -> OwnReduction:
        return self.reduction if self.reduction is not None else Alone(self)


class Alone:
    """The reduction of an optimizer that holds whole parameters, and is stepped by the script itself."""

    def __init__(self, optimizer: CompressedOptimizer) -> None:
        self._optimizer = optimizer
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self._signs = SignReduction(group if group is not None and group.size() > 1 else None)
        self._group = group
        self.num_ranks = self._signs.world_size

    @property
    def num_steps(self) -> int:
        """See OwnReduction."""
        return max((int(state.get("step", 0)) for state in self._optimizer.state.values()), default=0)

    def parameters(self) -> Sequence[Whole]:
        """See OwnReduction. None where a rank has a gradient that is not finite once there is compression: the step is skipped.

        Collective at the first step, and once there is compression. Raises RankMismatchError for settings that differ.
        """
        if self.num_ranks > 1:
            self._agree()
            if self._optimizer.takes_local and self._is_any_bad():
                return []
        state = self._optimizer.state
        return [
            Whole(p.shape, group, state[p], partial(_gradient_of, p), (RunSpan(p, 0, p.numel(), 0),))
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and _is_dense(p)
        ]

    def _agree(self) -> None:
        """Once: a rank that freezes later than another would leave it waiting."""
        if self._optimizer.has_agreed:
            return
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, self._optimizer.agreed_settings, group=self._group)
        for rank, theirs in enumerate(everyone):
            first, other = ({name: value[name] for name in value if value[name] != than.get(name)} for value, than in
                            ((everyone[0], theirs), (theirs, everyone[0])))  # fmt: skip
            if first or other:
                raise RankMismatchError(
                    f"ranks do not have the same optimizer: rank {rank} has {other} where rank 0 has {first}.\n"
                    "  Make it with the same settings on every rank."
                )
        self._optimizer.has_agreed = True

    def _is_any_bad(self) -> bool:
        """Whether a gradient of any rank is not finite, told by the rank that has it: it would stay in the errors for ever."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        found = next((i for i, p in enumerate(params) if p.grad is not None and not torch.isfinite(p.grad).all()), None)
        flag = torch.tensor([found is not None], dtype=torch.float32, device=params[0].device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        if found is not None:
            grad = params[found].grad
            logger.warning(
                "[rank %d] the step is skipped on all ranks: the gradient of parameter %d, of shape %s, has %s",
                dist.get_rank(), found, tuple(grad.shape), "nan" if torch.isnan(grad).any() else "inf",
            )  # fmt: skip
        return bool(flag.item())

    def momentum(self, whole: Whole) -> Tensor:
        """See OwnReduction."""
        return state_of(whole.state, "exp_avg", whole.spans[0].run).view(-1)

    def end_step(self, wholes: Sequence[Whole]) -> None:
        """See OwnReduction. Their states are the runs' own."""
        count_steps(wholes)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See OwnReduction."""
        for tensor in tensors if self.num_ranks > 1 else ():
            dist.all_reduce(tensor, group=self._group)
            tensor.div_(self.num_ranks)

    def total(self, values: Tensor) -> Tensor:
        """See OwnReduction. Parameters are whole here."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """See OwnReduction. Parameters are whole here."""
        return values

    def average_signs(self, tensors: Sequence[Tensor], owners: Sequence[dict[str, Any]]) -> None:
        """See OwnReduction."""
        average_signs(self._signs, tensors, owners)


def average_signs(signs: SignReduction, tensors: Sequence[Tensor], owners: Sequence[dict[str, Any]]) -> None:
    """`OwnReduction.average_signs` by a `SignReduction`; nothing is compressed where there is one rank."""
    if signs.world_size == 1:
        return
    for tensor, owner in zip(tensors, owners, strict=True):
        if "worker_error" not in owner:
            owner["worker_error"], owner["server_error"] = signs.errors(tensor.numel(), tensor.device)
    signs.average(tensors, [o["worker_error"] for o in owners], [o["server_error"] for o in owners])


def _is_dense(param: Tensor) -> bool:
    """True. Raises NotAvailableError for a gradient that is sparse."""
    if param.grad is not None and param.grad.is_sparse:
        raise NotAvailableError(
            f"the gradient of a parameter of shape {tuple(param.shape)} is sparse, which 1-bit optimizers do not take.\n"
            "  Make the embedding with sparse=False."
        )
    return True


def _gradient_of(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None, "only parameters with a gradient are listed"
    return grad.reshape(-1).to(state_dtype(param))


def state_dtype(param: Tensor) -> torch.dtype:
    """Of moments: fp32, or what is wider."""
    return torch.promote_types(param.dtype, torch.float32)


def state_of(state: dict[str, Any], key: str, param: Tensor) -> Tensor:
    """A state as long as the parameter, made of zeros at first."""
    if key not in state:
        state[key] = torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.contiguous_format)
    found: Tensor = state[key]
    return found


def mask_(momentum: Tensor, whole: Whole) -> None:
    """Multiply a flat momentum by its group's `exp_avg_mask`, if there is one: rows whose gradient is always zero would get
    what compression makes of zero."""
    mask = whole.group.get("exp_avg_mask")
    if mask is not None:
        momentum.view(whole.shape).mul_(mask.to(momentum.device, momentum.dtype))


def count_steps(wholes: Sequence[Whole]) -> None:
    """One step more of each parameter."""
    for whole in wholes:
        whole.state["step"] = int(whole.state.get("step", 0)) + 1


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`. Raises DeepSpeedError."""
    is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value).is_integer()
    if not is_whole or value < least:
        raise DeepSpeedError(f"{name} = {value!r} is not a whole number of at least {least}.\n  Give one.")
    return int(value)


def denominators(squares: Sequence[Tensor], eps: float, inside: bool) -> list[Tensor]:
    """sqrt(v) + eps of each, or sqrt(v + eps)."""
    if inside:
        found = torch._foreach_add(list(squares), eps)
        torch._foreach_sqrt_(found)
        return list(found)
    found = torch._foreach_sqrt(list(squares))
    torch._foreach_add_(found, eps)
    return list(found)


def gradient_in(run: Tensor) -> Tensor:
    """The averaged gradient of a run."""
    assert run.grad is not None, "only parameters with a gradient are listed"
    return run.grad


def advance_(moments: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """m = beta m + (1 - beta) g."""
    if moments:
        torch._foreach_mul_(moments, beta)
        torch._foreach_add_(moments, grads, alpha=1 - beta)


def advance_squares_(squares: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """v = beta v + (1 - beta) g^2."""
    if squares:
        torch._foreach_mul_(squares, beta)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta)


Closure = Callable[[], Any]
