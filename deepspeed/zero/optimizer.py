"""The optimizer wrapper: one norm, one decision, one update of this rank's shard, one publication.

Made by the engine around the user's or the configured optimizer; stepped by the engine, or directly (Fabric does).
The wrapped optimizer sees *runs*: for each bucket and parameter group one contiguous 1-D tensor of master weights, so
fused kernels get few large tensors. In fp32 a run is a view of the parameters' own memory and nothing is copied.

    deliver   the reducer's gradients, averaged, at O's placement
    decide    one norm (`zero.norm`); an inf or nan in it is an overflow: skip, or unscale and clip by one factor
    update    sub-group by sub-group: gradients to the master dtype, unscaled and clipped; the wrapped optimizer steps
    publish   masters to parameters: nothing (fp32), cast, and an all-gather in place where P is replicated and O not

After ZeRO (arXiv:1910.02054), section 5, and Mixed Precision Training (arXiv:1710.03740), section 3.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import AveragesItself, FusedRun, Needs, StepsFused, needs_of
from deepspeed.precision import LossScaleFloorError, StaticLossScale
from deepspeed.tiers import Tier
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError, TierError, TrainingStateError
from deepspeed.utils.logging import logger, warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.layout import RunSpan
from deepspeed.zero.local_norm import LocalNorm
from deepspeed.zero.master import Master, read
from deepspeed.zero.norm import GradientNorm, Measured
from deepspeed.zero.own_reduction import ZeroReduction, check_placements
from deepspeed.zero.param import slot_of
from deepspeed.zero.parameter_offload import ParameterOffload
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import ZeroPolicy
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.sharding import RunSharding
from deepspeed.zero.stream import Segment, TileStream

if TYPE_CHECKING:
    from deepspeed.zero.takeover import Takeover


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
        placing: Placing | None = None,
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
        self.takeover: Takeover | None = None
        """Takes over what a script has changed about the model, before each step and after its norm."""
        self.parameter_offload: ParameterOffload | None = None
        """Stage 3: the hooks on the model's modules, for libraries that take them off for a while."""
        self._kept = (1.0, 1.0)
        """What the last step's gradients were larger by, and what it multiplied them by where it changed them in place."""
        self._unused: list[tuple[int, int]] = []
        self._skip_non_finite = skip_non_finite or self.scale.is_dynamic
        self._sub_group_numel = sub_group_numel
        self._own_group = (
            mesh.group("shard", "control" if self._device.type == "cpu" else "norm") if self._is_sharded else None
        )
        self._norm = GradientNorm(reducer.gradients, self.masters, mesh, self._device, is_sharded=self._is_sharded)
        self.is_away = False
        """Whether `engine.offload_states` has put masters or states away."""
        self.stream: TileStream | None = None
        """The step of masters that rest on a tier, if there are any."""
        self._install_runs(allow_untested, placing)
        self.own_reduction: ZeroReduction | None = None
        """Of an optimizer that averages by itself."""
        if isinstance(optimizer, AveragesItself):
            check_placements(optimizer, self)
            self._local_norm = LocalNorm(reducer.gradients, mesh, self._device)
            self.own_reduction = optimizer.reduction = ZeroReduction(self, mesh)
            self._skip_non_finite = True  # errors would carry it on for ever
            self._choose_reduction()

    @property
    def _takes_local(self) -> bool:
        """Whether this step's gradients are each rank's own."""
        return isinstance(self.optimizer, AveragesItself) and self.optimizer.takes_local

    def _choose_reduction(self) -> None:
        """Have the next step's gradients reduced, or left to the optimizer's own reduction."""
        if self.own_reduction is not None:
            self.reducer.leave_local(self._takes_local)

    def states_loaded(self) -> None:
        """The optimizer's states were replaced. Collective."""
        if self.own_reduction is not None:
            self.own_reduction.loaded()
            self._choose_reduction()

    @property
    def _is_sharded(self) -> bool:
        return self.policy.optimizer.is_sharded

    @property
    def _device(self) -> torch.device:
        return self.masters[0].bucket.full.device if self.masters else torch.device("cpu")

    def _install_runs(self, allow_untested: bool, placing: Placing | None) -> None:
        needs = needs_of(self.optimizer)
        if needs is None and self._is_sharded and not allow_untested:
            name = type(self.optimizer).__name__
            raise DeepSpeedConfigError(
                f"{name} is not known to work on flat shards: under ZeRO stage {self.zero_stage} it would step 1-D pieces that "
                "hold parts of several parameters, which is right only for element-wise optimizers.\n"
                '  If it is element-wise set "zero_allow_untested_optimizer": true; otherwise use stage 0.'
            )
        if needs is None and self._is_sharded:
            warn_once(
                f"{type(self.optimizer).__name__} is not known to be element-wise. Under ZeRO stage {self.zero_stage} it steps 1-D "
                "pieces that hold parts of several parameters; if it looks at shapes or norms of parameters, as Adafactor does, "
                "it trains with other numbers than at stage 0. zero_allow_untested_optimizer allows it; some libraries set that key."
            )
        gives_whole = not self._is_sharded and needs is not Needs.ELEMENTWISE
        self._refuse_tiers(needs)
        is_elementwise = needs is Needs.ELEMENTWISE or (needs is None and allow_untested)
        self._stream_placing = placing if is_elementwise else None
        self._gives_whole = gives_whole
        self.steppable: list[list[tuple[int, Tensor]]] = []
        """Per master in the device's memory, (group, tensor) that the wrapped optimizer steps; else none."""
        self._list_runs()
        if self.optimizer.state:
            warn_once(
                f"{type(self.optimizer).__name__} was given with state from earlier steps; it starts anew, since its parameters "
                "are laid out differently now."
            )
        self.optimizer.state.clear()

    def add(self, masters: Sequence[Master]) -> None:
        """Train these too, beginning without state. The reducer has their gradients already. The same on every rank."""
        self.masters += masters
        self._refuse_tiers(needs_of(self.optimizer))
        self._norm.add()
        self._list_runs()
        self._choose_reduction()

    def _list_runs(self) -> None:
        """Make the runs of masters that have none yet, and have every group list its own: those and no other tensors."""
        if self.stream is not None:
            self.stream.add()
        elif self._stream_placing is not None and any(master.is_streamed for master in self.masters):
            self.stream = TileStream(
                self.optimizer, self.masters, self.reducer.gradients, self._stream_placing, self._sub_group_numel
            )
        for master in self.masters[len(self.steppable) :]:
            mine = self._cut(master)
            self.steppable.append([(group, nn.Parameter(tensor, requires_grad=True)) for group, tensor in mine])
        tensors = self.runs()
        for i, (param_group, members) in enumerate(zip(self.optimizer.param_groups, tensors, strict=True)):
            param_group["params"] = Members(members, self, i)
        if needs_of(self.optimizer) in (Needs.PARAMETER_NORMS, Needs.WHOLE_MATRICES) and not self._gives_whole:
            self.optimizer.sharding = RunSharding(self)  # type: ignore[attr-defined]

    def _cut(self, master: Master) -> list[tuple[int, Tensor]]:
        """(group, piece of the masters) as the wrapped optimizer steps them, where they are in memory."""
        if self._gives_whole:
            return master.whole_params()
        if self._is_streamed(master):
            return []
        return [(s.group, master.tensor.narrow(0, s.start, s.stop - s.start)) for s in master.spans]

    def follow_memory(self, bucket: Bucket) -> None:
        """A bucket has other memory: masters that are its parameters, and their runs, are there now."""
        for i, master in enumerate(self.masters):
            if master.bucket is bucket and master.is_alias:
                master.follow_memory()
                for (_, run), (_, piece) in zip(self.steppable[i], self._cut(master), strict=True):
                    run.data = piece
                if self.stream is not None:
                    self.stream.show(i)

    def runs(self) -> list[list[Tensor]]:
        """Per group, the tensors that its `params` has to list."""
        tensors: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        for i in range(len(self.masters)):
            streamed = self.stream.segments(i) if self.stream else ()
            for group, tensor in [*self.steppable[i], *((segment.group, segment.param) for segment in streamed)]:
                tensors[group].append(tensor)
        return tensors

    def _refuse_tiers(self, needs: Needs | None) -> None:
        """Optimizers that ask for more than elements cannot stream tile by tile from a disk."""
        if needs in (Needs.PARAMETER_NORMS, Needs.WHOLE_MATRICES) and any(m.tier is Tier.NVME for m in self.masters):
            raise DeepSpeedConfigError(
                f"{type(self.optimizer).__name__} needs {needs.value}, but on the nvme tier a step sees one tile at a time.\n"
                '  Use "offload_optimizer": {"device": "cpu"}, or an element-wise optimizer such as Adam.'
            )

    def _is_streamed(self, master: Master) -> bool:
        return self.stream is not None and master.is_streamed

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

    def gradient_scale(self, index: int) -> float:
        """By how much the reducer's results for one bucket are larger than gradients: until a step by the loss scale; then
        they stay as the step left them until the next backward."""
        if self.reducer.saw_backward:
            return self.scale.scale
        scale, factor = self._kept
        is_changed = self.policy.gradients.dtype == self.policy.optimizer.dtype
        return scale * factor if is_changed and not self._is_streamed(self.masters[index]) else scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes by itself."""
        return self.scale.is_dynamic

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's fp32 masters, one flat tensor per bucket; copies where they rest on the nvme tier."""
        return [master.tensor for master in self.masters]

    fp32_partitioned_groups_flat = single_partition_of_fp32_groups

    @property
    def nbytes(self) -> int:
        """Bytes of masters (but for those that are the parameters) and states, on whatever tier."""
        on_tier = [rest for states in self.stream.states for rest in states.values()] if self.stream else []
        rests = [*on_tier, *(master.weights for master in self.masters if not master.is_alias)]
        resident = [
            value for members in self.steppable for _, tensor in members for value in self.optimizer.state.get(tensor, {}).values()
        ]  # fmt: skip
        return sum(rest.numel * rest.dtype.itemsize for rest in rests) + sum(
            value.nbytes for value in resident if isinstance(value, Tensor) and value.dim() > 0
        )

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
        if self.takeover is not None:
            self.takeover.begin_step()
        self.reducer.finish()
        self._agree_on_failure(self.reducer.failure)
        scale, factor = self.scale.scale, self._decide()
        self._kept = (scale, factor or 1.0)
        if self.takeover is not None:
            self.takeover.follow_written()
        if factor is not None:
            self._update(factor)
            self._publish()
        self.reducer.drop()
        self._choose_reduction()
        if self.takeover is not None:
            self.takeover.end_step()
        return loss

    def _decide(self) -> float | None:
        """The factor that unscales and clips, or None to skip the step. The host waits for the norm here."""
        norm, missed_any, _ = self._measure()
        unscaled = norm / self.scale.scale
        self.overflow = self._skip_non_finite and not math.isfinite(norm)
        try:
            scale_used = self.scale.scale
            self.scale.update(self.overflow)
        except LossScaleFloorError as error:
            raise LossScaleFloorError(f"{error}\n{self._blame()}") from None
        self.grad_norm = unscaled
        if self.overflow and not self.scale.is_dynamic:
            self._tell_what_is_bad()
        unused = self._agree_on_unused() if missed_any else []
        self._unused = [*unused, *(pair for pair in self.reducer.left_out if pair not in unused)]
        if self.overflow:
            return None
        clip = max(1.0, (unscaled + 1e-6) / self.clip) if self.clip > 0 else 1.0
        return 1.0 / (scale_used * clip)

    def _measure(self) -> Measured:
        """The norm, with the gradients of parameters that join in this step."""
        norm: GradientNorm | LocalNorm = self._local_norm if self._takes_local else self._norm
        if self.takeover is None:
            return norm.measure()
        measured = norm.measure(self.takeover.waits)
        if measured.changed_any:
            self.takeover.take_over()
            self.reducer.finish()
            measured = norm.measure()
        return measured

    def _agree_on_unused(self) -> list[tuple[int, int]]:
        """(bucket, parameter) that had no gradient on any rank: like plain PyTorch, they are not stepped. Collective."""
        mine = [sorted(g.arrivals.used) if g.arrivals.misses_any else None for g in self.reducer.gradients]
        # Usually a parameter misses its gradient on every rank, step after step: then a digest says all there is to say.
        digest = zlib.crc32(repr(mine).encode())
        is_same = all(theirs == digest for (theirs,) in self.mesh.agree("average", digest))
        everyone: list[Any] = [mine] if is_same else self.mesh.gather_objects("average", mine)
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
            f"  [rank {self.mesh.ranks('shard')[i]}] {text}"
            for i, text in enumerate(self.mesh.gather_objects("shard", found))
            if text
        ]
        largest = max((m.tensor.abs().max().item() for m in self.masters if m.numel), default=0.0)
        hint = "the weights themselves exceed fp16's largest value" if largest > 65504 else "values of fp16's range"
        return "\n".join(
            [*lines, f"  Largest weight {largest:.4g} (fp16 ends at 65504): {hint}. A model pretrained in bf16 often overflows in "
             'fp16: use "bf16": {"enabled": true}, or lower the learning rate.']
        )  # fmt: skip

    def _tell_what_is_bad(self) -> None:
        """Warn of a skipped step, where nothing else would say why. Collective."""
        if self.own_reduction is not None and self._takes_local:
            self.own_reduction.tell_what_is_bad()
            return
        found = next((text for i in range(len(self.masters)) if (text := self._first_non_finite(i))), None)
        ranks = self.mesh.ranks("shard")
        told = [f"[rank {ranks[i]}] {text}" for i, text in enumerate(self.mesh.gather_objects("shard", found)) if text]
        logger.warning("the step is skipped: %s", "; ".join(told) or "a gradient is not finite on another rank")

    def _first_non_finite(self, index: int) -> str | None:
        master, result = self.masters[index], self.reducer.gradients[index].values()
        for piece in master.layout.pieces(master.rank):
            part = result.narrow(0, piece.in_shard, piece.numel)
            if not torch.isfinite(part).all():
                kind = "nan" if torch.isnan(part).any() else "inf"
                return f"first bad gradient: {master.bucket.names[piece.param]} has {kind}"
        return None

    def _update(self, factor: float) -> None:
        if self.own_reduction is not None and self._takes_local:
            self.own_reduction.factor = factor
            self.optimizer.step()
            return
        for members in self._sub_groups():
            stepped = [pair for i in members for pair in self._with_gradients(i, factor)]
            if len(members) == len(self.masters):
                self.optimizer.step()
            else:
                self._step_only(stepped)
            for _, tensor in stepped:
                tensor.grad = None
        if self.stream is not None:
            failure = None
            skipped = {
                segment
                for i, j in self._unused
                if self._is_streamed(self.masters[i])
                for segment in self._cut_out(i, j)
            }
            try:
                self.stream.step(functools.partial(self._step_segments, factor, skipped))
            except TierError as error:
                failure = error
            self._agree_on_failure(failure)

    def _agree_on_failure(self, failure: TierError | None) -> None:
        """Raise TierError on every rank if bytes could not be moved on one. Collective where there is an nvme tier."""
        if not any(master.tier is Tier.NVME for master in self.masters):
            return
        # The texts travel only where there is one.
        if not any(has_failed for (has_failed,) in self.mesh.agree("job", int(failure is not None))):
            return
        messages = self.mesh.gather_objects("job", str(failure) if failure else None)
        failed = {rank: message for rank, message in enumerate(messages) if message}
        told = "\n".join(f"  [rank {rank}] {message}" for rank, message in failed.items())
        raise TierError(
            f"the step failed on {len(failed)} of {len(messages)} ranks, because bytes could not be moved to or from a tier:\n"
            f"{told}\n  Weights are inconsistent now: mend the cause and resume from the last checkpoint."
        ) from failure

    def _cut_out(self, index: int, param: int) -> list[Segment]:
        """The segments of one parameter, made segments of their own."""
        assert self.stream is not None
        master = self.masters[index]
        return [
            segment
            for piece in master.layout.pieces(master.rank)
            if piece.param == param
            for segment in self.stream.isolate(index, piece.in_shard, piece.in_shard + piece.numel)
        ]

    def _step_segments(
        self,
        factor: float,
        skipped: set[Segment],
        segments: list[Segment],
        gradients: dict[int, Tensor],
        low: dict[int, Tensor | None],
    ) -> None:
        """Step loaded segments; their parameters in low precision go to `low`."""
        stepped = [i for i, segment in enumerate(segments) if segment not in skipped]
        rounds = isinstance(self.optimizer, StepsFused)
        if isinstance(self.optimizer, StepsFused):
            runs = [(i, FusedRun(segments[i].param, gradients[i], _if_narrow(low[i]))) for i in stepped]
            self.optimizer.step_fused([(self.param_groups[segments[i].group], run) for i, run in runs], factor)
            # What torch's learning-rate schedulers look for: they watch `step`, which a fused step does not go through.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            for i in stepped:
                grad = gradients[i].to(segments[i].param.dtype)
                segments[i].param.grad = grad.mul(factor) if factor != 1.0 else grad
            self._step_only([(segments[i].group, segments[i].param) for i in stepped])
        for i, segment in enumerate(segments):
            segment.param.grad = None
            target = low[i]
            is_written = rounds and _if_narrow(target) is not None and segment not in skipped
            if target is not None and not is_written:
                target.copy_(segment.param.data)

    def _sub_groups(self) -> Iterator[list[int]]:
        members: list[int] = []
        numel = 0
        for i, master in enumerate(self.masters):
            if self._is_streamed(master):
                continue
            if members and numel + master.numel > self._sub_group_numel and not self._is_one_step:
                yield members
                members, numel = [], 0
            members.append(i)
            numel += master.numel
        if members:
            yield members

    @property
    def _is_one_step(self) -> bool:
        """Whether the wrapped optimizer may count its calls, so that a step must be one call."""
        return needs_of(self.optimizer) is not Needs.ELEMENTWISE

    def _with_gradients(self, index: int, factor: float) -> list[tuple[int, Tensor]]:
        """Give one bucket's runs their gradients in the master dtype, times `factor`."""
        master, gradients = self.masters[index], self.reducer.gradients[index]
        result = gradients.rest().view(0, master.numel)
        assert result is not None, "what is not streamed is in memory"
        result = result.to(master.weights.dtype)
        if factor != 1.0:
            result.mul_(factor)
        if self._gives_whole:
            pieces = master.bucket.split_numbers(result)
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
            if not self._is_streamed(master):
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
        if any(master.tier is Tier.NVME for master in self.masters):
            raise NotAvailableError(
                "the optimizer's state rests on the nvme tier and does not fit a dictionary of tensors.\n"
                "  Use engine.save_checkpoint(folder), which streams it."
            )
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
            master.weights.start_store(0, flat.to(master.weights.dtype)).wait()
        self._publish()
        self.states_loaded()

    def state_kinds(self, index: int) -> list[str]:
        """Names of the states that are as long as the masters of one bucket: "exp_avg", ...; none before the first step."""
        if self._is_streamed(self.masters[index]):
            assert self.stream is not None
            return list(self.stream.states[index])
        found: dict[str, None] = {}
        for _, tensor in self.steppable[index]:
            state = self.optimizer.state.get(tensor, {})
            found.update((k, None) for k, v in state.items() if isinstance(v, Tensor) and v.shape == tensor.shape)
        return list(found)

    def require_here(self) -> None:
        """Raise TrainingStateError, on every rank alike, while masters or states are put away."""
        if self.is_away:
            raise TrainingStateError(
                "masters or states were put away by engine.offload_states.\n  Call engine.reload_states() first."
            )

    def has_state(self, index: int, kind: str, position: int) -> bool:
        """Whether element `position` of a master's shard has a state of this kind."""
        if self._is_streamed(self.masters[index]):
            assert self.stream is not None
            return any(s.start <= position < s.stop and kind in s.states for s in self.stream.segments(index))
        try:
            self._state_around(index, kind, position)
        except KeyError:
            return False
        return True

    def read_state(self, index: int, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a master's shard, of `kind` "master" or one of `state_kinds`: a view where they are in
        memory. They lie in one run. Raises KeyError for a state that does not exist."""
        master = self.masters[index]
        self.require_here()
        if kind == "master":
            return read(master.weights, start, stop)
        if self._is_streamed(master):
            assert self.stream is not None
            return read(self.stream.states[index][kind], start, stop)
        span_start, value = self._state_around(index, kind, start)
        return value.view(-1)[start - span_start : stop - span_start]

    def write_state(self, index: int, kind: str, start: int, values: Tensor) -> None:
        """Replace the elements from `start` on; see `read_state`. The caller has asked `require_here`."""
        master = self.masters[index]
        rest = master.weights if kind == "master" else None
        if rest is None and self._is_streamed(master):
            assert self.stream is not None
            rest = self.stream.states[index][kind]
        if rest is not None:
            rest.start_store(start, values.to(rest.dtype).contiguous()).wait()
        else:
            self.read_state(index, kind, start, start + values.numel()).copy_(values)

    def _state_around(self, index: int, kind: str, position: int) -> tuple[int, Tensor]:
        """The state tensor that holds element `position` of the shard, and its first element's position."""
        master = self.masters[index]
        layout = master.layout
        starts = layout.starts if self._gives_whole else [span.start for span in master.spans]
        for start, (_, tensor) in zip(starts, self.steppable[index], strict=True):
            if start <= position < start + tensor.numel():
                return start, self.optimizer.state[tensor][kind]
        raise KeyError(kind)

    def refresh_from_params(self, buckets: Sequence[Bucket]) -> None:
        """Take masters anew from parameters that were changed from outside."""
        for master in self.masters:
            if master.bucket in buckets:
                master.follow_params()


def _if_narrow(low: Tensor | None) -> Tensor | None:
    """`low` where it is narrower than fp32, which is what a fused step can write."""
    return low if low is not None and low.dtype.itemsize < 4 else None


def _cut(value: Any, old: Tensor, start: int, numel: int) -> Any:
    """A piece of an optimizer state: of tensors as long as the run a view, of everything else a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.narrow(0, start, numel) if value.shape == old.shape else value.clone()
