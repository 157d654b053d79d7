"""The optimizer wrapper: one norm, one decision, one update of this rank's shard, one publication.

Made by the engine around the user's or the configured optimizer; stepped by the engine, or directly (Fabric does).
The wrapped optimizer sees *runs*: for each bucket and parameter group one contiguous 1-D tensor of master weights, so
fused kernels get few large tensors. In fp32 a run is a view of the parameters' own memory and nothing is copied.

    deliver   the reducer's gradients, averaged, at O's placement
    decide    norm over all shards with one all-reduce; an inf or nan in it is an overflow
    update    sub-group by sub-group: gradients to the master dtype, unscaled and clipped; the wrapped optimizer steps
    publish   masters to parameters: nothing (fp32), cast, and an all-gather in place where P is replicated and O not

After ZeRO (arXiv:1910.02054), section 5, and Mixed Precision Training (arXiv:1710.03740), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import Needs, needs_of
from deepspeed.precision import LossScaleFloorError, StaticLossScale
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.layout import BucketLayout, RunSpan
from deepspeed.zero.param import slot_of
from deepspeed.zero.parameter_offload import ParameterOffload
from deepspeed.zero.policy import ZeroPolicy
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.sharding import RunSharding


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """Base of every optimizer the engine returns; `.optimizer` is the wrapped torch optimizer."""

    optimizer: torch.optim.Optimizer


class Members(list[Tensor]):
    """The runs of one parameter group, which also answers for the model's parameters that lie in them."""

    def __init__(self, runs: Iterable[Tensor], owner: ZeroOptimizer, group: int) -> None:
        super().__init__(runs)
        self._owner, self._group = owner, group

    def __contains__(self, tensor: object) -> bool:
        if any(run is tensor for run in self):
            return True
        slot = slot_of(tensor) if isinstance(tensor, nn.Parameter) else None
        trained = slot is not None and any(master.bucket is slot.bucket for master in self._owner.masters)
        return trained and slot.bucket.layout.groups[slot.index] == self._group  # type: ignore[union-attr]

    def __reduce__(self) -> Any:
        """A copy is a plain list."""
        return list, (list(self),)


class Master:
    """One bucket's optimizer-side weights: `tensor` [S] (or [W*S] where O is replicated) and its runs."""

    def __init__(self, bucket: Bucket, policy: ZeroPolicy, source: Tensor | None) -> None:
        self.bucket = bucket
        self.is_sharded = policy.optimizer.is_sharded
        own = bucket.shard if self.is_sharded else bucket.full
        self.is_alias = policy.optimizer.dtype == bucket.dtype
        if self.is_alias:
            self.tensor = own
        elif source is not None:
            self.tensor = (bucket.own_slice(source) if self.is_sharded else source).clone()
        else:
            self.tensor = own.to(policy.optimizer.dtype)
        layout, rank = bucket.layout, bucket.exchange.rank
        if not self.is_sharded:
            layout, rank = BucketLayout(layout.numels, layout.groups, 1), 0
        self.layout, self.rank = layout, rank
        self.spans: tuple[RunSpan, ...] = layout.runs(rank)
        self.runs = [self.tensor.narrow(0, span.start, span.stop - span.start) for span in self.spans]

    def whole_params(self) -> list[tuple[int, Tensor]]:
        """(group, tensor in full shape) per parameter; only where O is replicated."""
        return list(zip(self.bucket.layout.groups, self.bucket.split(self.tensor), strict=True))

    def to_params(self) -> None:
        """Write the parameters' own slice from the master."""
        if not self.is_alias:
            (self.bucket.shard if self.is_sharded else self.bucket.full).copy_(self.tensor)

    def from_params(self) -> None:
        """Take the master from the parameters' own slice, after those were changed from outside."""
        if not self.is_alias:
            self.tensor.copy_(self.bucket.shard if self.is_sharded else self.bucket.full)


class ZeroOptimizer(DeepSpeedOptimizer):
    """Wraps a torch optimizer for one engine; see the module's text.

    `sources[bucket]`, where given, are the parameters' flat fp32 values before they were cast down, so that masters
    start exact. `clip` is the norm above which gradients are scaled down, 0 for never.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Sequence[Master],
        reducer: Reducer,
        policy: ZeroPolicy,
        mesh: Mesh,
        *,
        scale: StaticLossScale | None = None,
        clip: float = 0.0,
        skip_non_finite: bool = False,
        sub_group_numel: int = 10**9,
        allow_untested: bool = False,
        zero_stage: int = 0,
    ) -> None:
        # Not Optimizer.__init__: parameter groups, state and defaults are the wrapped optimizer's.
        self.optimizer = optimizer
        self.masters = list(masters)
        self.reducer = reducer
        self.policy = policy
        self.mesh = mesh
        self.scale = scale or StaticLossScale()
        self.clip = clip
        self.zero_stage = zero_stage
        self.overflow = False
        """Whether the last step was skipped."""
        self.grad_norm: float | None = None
        """Norm of the last step's gradients, unscaled, before clipping."""
        self.before_update: Callable[[], None] | None = None
        self.parameter_offload: ParameterOffload | None = None
        """Stage 3: the hooks on the model's modules, for libraries that take them off for a while."""
        self._kept_scale = 1.0
        self._unused: list[tuple[int, int]] = []
        self._skip_non_finite = skip_non_finite or self.scale.is_dynamic
        self._sub_group_numel = sub_group_numel
        self._own_group = (
            mesh.group("dp_shard", "control" if self._device.type == "cpu" else "norm") if self._is_sharded else None
        )
        self._install_runs(allow_untested)

    @property
    def _is_sharded(self) -> bool:
        return self.policy.optimizer.is_sharded

    @property
    def _device(self) -> torch.device:
        return self.masters[0].tensor.device if self.masters else torch.device("cpu")

    def _install_runs(self, allow_untested: bool) -> None:
        needs = needs_of(self.optimizer)
        if needs is None and self._is_sharded and not allow_untested:
            name = type(self.optimizer).__name__
            raise DeepSpeedConfigError(
                f"{name} is not known to work on flat shards: under ZeRO stage {self.zero_stage} it would step 1-D pieces that "
                "hold parts of several parameters, which is right only for element-wise optimizers.\n"
                '  If it is element-wise set "zero_allow_untested_optimizer": true; otherwise use stage 0.'
            )
        gives_whole = not self._is_sharded and needs is not Needs.ELEMENTWISE
        tensors: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        self.steppable: list[list[tuple[int, Tensor]]] = []
        for master in self.masters:
            mine = (
                master.whole_params()
                if gives_whole
                else [(s.group, run) for s, run in zip(master.spans, master.runs, strict=True)]
            )
            self.steppable.append([(group, nn.Parameter(tensor, requires_grad=True)) for group, tensor in mine])
            for group, tensor in self.steppable[-1]:
                tensors[group].append(tensor)
        for i, (param_group, members) in enumerate(zip(self.optimizer.param_groups, tensors, strict=True)):
            param_group["params"] = Members(members, self, i)
        if self.optimizer.state:
            warn_once(
                f"{type(self.optimizer).__name__} was given with state from earlier steps; it starts anew, since its parameters "
                "are laid out differently now."
            )
        self.optimizer.state.clear()
        self._gives_whole = gives_whole
        if needs in (Needs.PARAMETER_NORMS, Needs.WHOLE_MATRICES) and not gives_whole:
            self.optimizer.sharding = RunSharding(self)  # type: ignore[attr-defined]

    # What other libraries read. ------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; their params are runs."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state, by run."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        """By how much the loss is multiplied before backward."""
        return self.scale.scale

    cur_scale = loss_scale

    @property
    def gradient_scale(self) -> float:
        """By how much the reducer's results are larger than gradients: until a step by the loss scale; after it they stay,
        as the step left them, until the next backward."""
        return self.scale.scale if self.reducer.saw_backward else self._kept_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes by itself."""
        return self.scale.is_dynamic

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's fp32 masters, one flat tensor per bucket."""
        return [master.tensor for master in self.masters]

    fp32_partitioned_groups_flat = single_partition_of_fp32_groups

    def __repr__(self) -> str:
        return f"ZeroOptimizer(stage {self.zero_stage}, {self.optimizer!r})"

    # The step. -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update from this step's gradients. Collective. Sets `overflow` and `grad_norm`.

        Raises LossScaleFloorError if gradients overflow at the smallest loss scale.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.before_update is not None:
            self.before_update()
        self.reducer.finish()
        scale, factor = self.scale.scale, self._decide()
        self._kept_scale = scale
        if factor is not None:
            self._update(factor)
            self._publish()
            if self.policy.gradients.dtype == self.policy.optimizer.dtype:
                self._kept_scale *= factor
        self.reducer.drop()
        return loss

    def _decide(self) -> float | None:
        """The factor that unscales and clips, or None to skip the step. The host waits for the norm here."""
        norm, missed = torch.stack(self._norm_and_missed()).tolist()
        unscaled = norm / self.scale.scale
        self.overflow = self._skip_non_finite and not math.isfinite(norm)
        try:
            scale_used = self.scale.scale
            self.scale.update(self.overflow)
        except LossScaleFloorError as error:
            raise LossScaleFloorError(f"{error}\n{self._blame()}") from None
        self.grad_norm = unscaled
        self._unused = self._agree_on_unused() if missed else []
        if self.overflow:
            return None
        clip = max(1.0, (unscaled + 1e-6) / self.clip) if self.clip > 0 else 1.0
        return 1.0 / (scale_used * clip)

    def _norm_and_missed(self) -> list[Tensor]:
        """Two scalars that all ranks agree on: the norm, and whether a gradient was missing anywhere (above 0)."""
        gradients = self.reducer.gradients
        if not gradients:
            return [torch.zeros((), device=self._device)] * 2
        missed = torch.tensor(float(any(g.misses_any for g in gradients)), device=self._device)
        if not self._is_sharded and self.mesh.dp_world_size > 1:
            missed = torch.cat([g.take_missed_flag() for g in gradients]).float().sum()
        norms = torch._foreach_norm([g.result for g in gradients], 2, dtype=torch.float32)
        total = torch.linalg.vector_norm(torch.stack(list(norms)))
        if self._own_group is not None:
            both = torch.stack([total.square(), missed])
            torch.distributed.all_reduce(both, group=self._own_group)
            total, missed = both[0].sqrt(), both[1]
        if self._is_sharded and self.mesh.num_replicas > 1:
            missed = torch.tensor(
                float(max(m for (m,) in self.mesh.agree("dp", int(missed.item() > 0)))), device=self._device
            )
        return [total, missed]

    def _agree_on_unused(self) -> list[tuple[int, int]]:
        """(bucket, parameter) that had no gradient on any rank: like plain PyTorch, they are not stepped. Collective."""
        mine = [None if g.all_used else sorted(g.used) for g in self.reducer.gradients]
        everyone = self.mesh.gather_objects("dp", mine)
        unused: list[tuple[int, int]] = []
        for i, master in enumerate(self.masters):
            used = [theirs[i] for theirs in everyone]
            if all(indices is not None for indices in used):
                seen = set().union(*used)
                unused += [(i, j) for j in range(len(master.bucket.params)) if j not in seen]
        return unused

    def _blame(self) -> str:
        """Which gradients are not finite, from all ranks, and what usually helps."""
        found = next((self._first_non_finite(i) for i in range(len(self.masters)) if self._first_non_finite(i)), None)
        lines = [
            f"  [rank {self.mesh.ranks_of('dp_shard')[i]}] {text}"
            for i, text in enumerate(self.mesh.gather_objects("dp_shard", found))
            if text
        ]
        largest = max((m.tensor.abs().max().item() for m in self.masters if m.tensor.numel()), default=0.0)
        hint = "the weights themselves exceed fp16's largest value" if largest > 65504 else "values of fp16's range"
        return "\n".join(
            [*lines, f"  Largest weight {largest:.4g} (fp16 ends at 65504): {hint}. A model pretrained in bf16 often overflows in "
             'fp16: use "bf16": {"enabled": true}, or lower the learning rate.']
        )  # fmt: skip

    def _first_non_finite(self, index: int) -> str | None:
        master, result = self.masters[index], self.reducer.gradients[index].result
        for piece in master.layout.pieces(master.rank):
            part = result.narrow(0, piece.in_shard, piece.numel)
            if not torch.isfinite(part).all():
                kind = "nan" if torch.isnan(part).any() else "inf"
                return f"first bad gradient: {master.bucket.names[piece.param]} has {kind}"
        return None

    def _update(self, factor: float) -> None:
        for members in self._sub_groups():
            stepped = [pair for i in members for pair in self._with_gradients(i, factor)]
            if len(members) == len(self.masters):
                self.optimizer.step()
            else:
                self._step_only(stepped)
            for _, tensor in stepped:
                tensor.grad = None

    def _sub_groups(self) -> Iterator[list[int]]:
        members: list[int] = []
        numel = 0
        for i, master in enumerate(self.masters):
            if members and numel + master.tensor.numel() > self._sub_group_numel and not self._is_one_step:
                yield members
                members, numel = [], 0
            members.append(i)
            numel += master.tensor.numel()
        if members:
            yield members

    @property
    def _is_one_step(self) -> bool:
        """Whether the wrapped optimizer may count its calls, so that a step must be one call."""
        return needs_of(self.optimizer) is not Needs.ELEMENTWISE

    def _with_gradients(self, index: int, factor: float) -> list[tuple[int, Tensor]]:
        """Give one bucket's runs their gradients in the master dtype, times `factor`."""
        master, gradients = self.masters[index], self.reducer.gradients[index]
        result = gradients.result.to(master.tensor.dtype)
        if factor != 1.0:
            result.mul_(factor)
        if self._gives_whole:
            pieces = master.bucket.split(result)
        else:
            pieces = [result.narrow(0, span.start, span.stop - span.start) for span in master.spans]
        for (_, tensor), piece in zip(self.steppable[index], pieces, strict=True):
            tensor.grad = piece
        for j in [j for i, j in self._unused if i == index]:
            self._leave_out(index, j)
        return self.steppable[index]

    def _leave_out(self, index: int, param: int) -> None:
        """Keep a parameter without gradients out of this step: its run has no gradient, and is its own from now on."""
        if self._gives_whole:
            self.steppable[index][param][1].grad = None
        elif needs_of(self.optimizer) is Needs.ELEMENTWISE:
            master = self.masters[index]
            for piece in master.layout.pieces(master.rank):
                if piece.param == param:
                    position = self._isolate(index, piece.in_shard, piece.in_shard + piece.numel)
                    self.steppable[index][position][1].grad = None

    def _isolate(self, index: int, start: int, stop: int) -> int:
        """Have the elements [start, stop) of a shard be a run of their own; returns its position."""
        master, steppable = self.masters[index], self.steppable[index]
        position = next(i for i, span in enumerate(master.spans) if span.start <= start and stop <= span.stop)
        span, (group, old) = master.spans[position], steppable[position]
        cuts = [(a, b) for a, b in ((span.start, start), (start, stop), (stop, span.stop)) if a < b]
        if len(cuts) == 1:
            return position
        state = self.optimizer.state.pop(old, {})
        made = []
        for a, b in cuts:
            run = nn.Parameter(master.tensor.narrow(0, a, b - a), requires_grad=True)
            run.grad = None if old.grad is None else old.grad.narrow(0, a - span.start, b - a)
            if state:
                self.optimizer.state[run] = {key: _cut(v, old, a - span.start, b - a) for key, v in state.items()}
            made.append((group, run))
        master.spans = (
            *master.spans[:position],
            *(RunSpan(group, a, b) for a, b in cuts),
            *master.spans[position + 1 :],
        )
        steppable[position : position + 1] = made
        params = self.optimizer.param_groups[group]["params"]
        at = next(i for i, tensor in enumerate(params) if tensor is old)
        params[at : at + 1] = [run for _, run in made]
        return position + cuts.index((start, stop))

    def _step_only(self, members: Sequence[tuple[int, Tensor]]) -> None:
        everything = [group["params"] for group in self.optimizer.param_groups]
        try:
            for i, group in enumerate(self.optimizer.param_groups):
                group["params"] = [tensor for index, tensor in members if index == i]
            self.optimizer.step()
        finally:
            for group, params in zip(self.optimizer.param_groups, everything, strict=True):
                group["params"] = params

    def _publish(self) -> None:
        pending = []
        for master in self.masters:
            master.to_params()
            if master.is_sharded:
                pending.append(master.bucket.publish())
        for gather in pending:
            if gather is not None:
                gather.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step."""
        self.reducer.drop()

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of the scaled loss, for callers that hold the optimizer alone."""
        (loss * self.scale.scale).backward(retain_graph=retain_graph)

    # State. --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: base state, masters, loss scale. Tensors are not copied."""
        return {
            "zero_stage": self.zero_stage,
            "loss_scaler": self.scale.state_dict(),
            "base_optimizer_state": self.optimizer.state_dict(),
            "overflow": self.overflow,
            "fp32_flat_groups": self.single_partition_of_fp32_groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a `state_dict` of the same stage and world size, and publish its masters. Collective."""
        theirs = [tuple(flat.shape) for flat in state["fp32_flat_groups"]]
        ours = [tuple(master.tensor.shape) for master in self.masters]
        if theirs != ours:
            raise DeepSpeedConfigError(
                f"optimizer state has flat shards {theirs}, this run has {ours}: another model, stage or world size."
            )
        self.scale.load_state_dict(state["loss_scaler"])
        self.optimizer.load_state_dict(state["base_optimizer_state"])
        for master, flat in zip(self.masters, state["fp32_flat_groups"], strict=True):
            master.tensor.copy_(flat)
        self._publish()

    def refresh_from_params(self, buckets: Sequence[Bucket]) -> None:
        """Take masters anew from parameters that were changed from outside."""
        for master in self.masters:
            if master.bucket in buckets:
                master.from_params()


def _cut(value: Any, old: Tensor, start: int, numel: int) -> Any:
    """A piece of an optimizer state: of tensors as long as the run a view, of everything else a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.narrow(0, start, numel) if value.shape == old.shape else value.clone()
