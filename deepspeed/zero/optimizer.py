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

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import AveragesItself
from deepspeed.precision import LossScaleFloorError, StaticLossScale
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError, TierError, TrainingStateError
from deepspeed.zero.blame import blame, tell_what_is_bad
from deepspeed.zero.gradients import leave_local
from deepspeed.zero.graphed import GraphedUpdate
from deepspeed.zero.hook_switch import ParameterOffload
from deepspeed.zero.local_norm import LocalNorm
from deepspeed.zero.master import Master
from deepspeed.zero.norm import GradientNorm, Measured
from deepspeed.zero.own_reduction import ZeroReduction, check_placements
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import ZeroPolicy
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.runs import Runs
from deepspeed.zero.step_hooks import TORCH_HOOKS, called_once
from deepspeed.zero.unused import Unused
from deepspeed.zero.update import Update

if TYPE_CHECKING:
    from deepspeed.zero.takeover import Takeover

SCALER = (
    "a torch.amp.GradScaler cannot step this optimizer: gradients are unscaled, checked and clipped by the engine's own step.\n"
    '  Call engine.backward(loss) and engine.step() with "fp16": {"enabled": true}, or make it GradScaler(enabled=False).'
)


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """Base of every optimizer the engine returns; `.optimizer` is the wrapped torch optimizer."""

    optimizer: torch.optim.Optimizer

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TrainingStateError(
            "an engine's optimizer cannot be copied or pickled: it owns parts of the model's parameters.\n"
            "  Keep optimizer.state_dict(), or call engine.save_checkpoint(folder) on every rank."
        )


class LossScaled:
    """What scripts read and write of an optimizer's loss scale."""

    scale: StaticLossScale
    reducer: Reducer
    before_scaled: Callable[[], None] | None = None
    """Told that the backward which begins next is of a scaled loss."""

    @property
    def loss_scale(self) -> float:
        """By how much the loss is multiplied before backward."""
        return self.scale.scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        if self.reducer.saw_backward or not self.scale.is_used:
            raise TrainingStateError(
                f"optimizer.loss_scale = {scale}: "
                + (
                    "gradients of a backward are there, scaled by the one before."
                    if self.reducer.saw_backward
                    else "only fp16 scales losses."
                )
                + "\n  Set it with fp16, the same on every rank, between engine.step() and the next backward."
            )
        self.scale.scale = float(scale)

    cur_scale = loss_scale
    loss_scaler = property(lambda self: self.scale, doc="The loss scale, under the name that scripts have for it.")

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes by itself."""
        return self.scale.is_dynamic


class ZeroOptimizer(LossScaled, DeepSpeedOptimizer):
    """Wraps a torch optimizer for one engine; see the module's text.

    `sources[bucket]`, where given, are the parameters' flat fp32 values before they were cast down, so that masters
    start exact. `clip` is the norm above which gradients are scaled down, 0 for never.
    """

    graphed: GraphedUpdate | None = None
    """The update by a graph of the device, where the configuration asks for it."""

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
        self.taken = (1.0, 1.0)
        """What the last step's gradients were larger by, and what it multiplied them by where it changed them in place."""
        self.unused = Unused(self.masters, reducer, mesh)
        self.skips_non_finite = skip_non_finite or self.scale.is_dynamic
        self.norm = GradientNorm(reducer.gradients, self.masters, mesh, self._device, is_sharded=self._is_sharded)
        self.runs = Runs(
            optimizer,
            self.masters,
            reducer.gradients,
            mesh,
            is_sharded=self._is_sharded,
            sub_group_numel=sub_group_numel,
            placing=placing,
            allow_untested=allow_untested,
            zero_stage=zero_stage,
        )
        """What the wrapped optimizer steps, and its states."""
        self.own_reduction: ZeroReduction | None = None
        """Of an optimizer that averages by itself."""
        if isinstance(optimizer, AveragesItself):
            check_placements(optimizer, self)
            self._local_norm = LocalNorm(reducer.gradients, mesh, self._device)
            self.own_reduction = optimizer.reduction = ZeroReduction(self, mesh)
            self.skips_non_finite = True  # errors would carry it on for ever
            self._choose_reduction()

    @property
    def _takes_local(self) -> bool:
        """Whether this step's gradients are each rank's own."""
        return isinstance(self.optimizer, AveragesItself) and self.optimizer.takes_local

    def _choose_reduction(self) -> None:
        """Have the next step's gradients reduced, or left to the optimizer's own reduction."""
        if self.own_reduction is not None:
            leave_local(self.reducer.gradients, self._takes_local)

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

    def add(self, masters: Sequence[Master]) -> None:
        """Train these too, beginning without state. The reducer has their gradients already. The same on every rank."""
        self.masters += masters
        self.runs.refuse_tiers()
        self.norm.add()
        self.runs.refresh()
        self._choose_reduction()

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

    def gradient_scale(self, index: int) -> float:
        """By how much the reducer's results for one bucket are larger than gradients: until a step by the loss scale; then
        they stay as the step left them until the next backward."""
        if self.reducer.saw_backward:
            return self.scale.scale
        scale, factor = self.taken
        is_changed = self.policy.gradients.dtype == self.policy.optimizer.dtype
        return scale * factor if is_changed and not self.runs.is_streamed(self.masters[index]) else scale

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's fp32 masters, one flat tensor per bucket; copies where they rest on the nvme tier."""
        for master in self.masters:
            if master.may_lag and not self.runs.is_away:
                master.follow_params()
        return [master.tensor for master in self.masters]

    fp32_partitioned_groups_flat = single_partition_of_fp32_groups

    @property
    def nbytes(self) -> int:
        """Bytes of masters (but for those that are the parameters) and states, on whatever tier."""
        return self.runs.nbytes

    def __getattr__(self, name: str) -> Any:
        """What an optimizer that averages by itself says of itself: `adam_freeze_key`, `get_lamb_coeffs`, ...; and where torch's
        own `register_step_post_hook` and the like keep hooks: with the wrapped optimizer."""
        optimizer = self.__dict__.get("optimizer")
        if name in TORCH_HOOKS and optimizer is not None:
            return getattr(optimizer, name)
        if name == "_step_supports_amp_scaling":
            raise TrainingStateError(SCALER)
        if isinstance(optimizer, AveragesItself) and not name.startswith("_"):
            return getattr(optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        self.deliver()
        scale, factor = self.scale.scale, self.decide(self._measure())
        self.taken = (scale, factor or 1.0)
        if self.takeover is not None:
            self.takeover.follow_written()
        if factor is not None:
            self.apply(factor)
        self.reducer.drop()
        self._choose_reduction()
        if self.takeover is not None:
            self.takeover.end_step()
        return loss

    def deliver(self) -> None:
        """Have this step's gradients averaged, at the optimizer's placement. Collective over "average"."""
        if self.before_update is not None:
            self.before_update()
        if self.takeover is not None:
            self.takeover.begin_step()
        self.reducer.finish()
        self._agree_on_failure(self.reducer.failure)

    def decide(self, measured: Measured, *, is_late: bool = False) -> float | None:
        """The factor that unscales and clips, or None to skip the step. Collective where a gradient is missing.

        is_late: the gradients have been dropped since, so none is blamed by name, and `unused.leave_out` is the caller's to call.
        """
        norm, missed_any, _ = measured
        unscaled = norm / self.scale.scale
        self.overflow = self.skips_non_finite and not math.isfinite(norm)
        try:
            scale_used = self.scale.scale
            self.scale.update(self.overflow)
        except LossScaleFloorError as error:
            told = "" if is_late else f"\n{blame(self.masters, self.reducer.gradients, self.mesh)}"
            raise LossScaleFloorError(f"{error}{told}") from None
        self.grad_norm = unscaled
        if self.overflow and not self.scale.is_dynamic and not is_late:
            if self.own_reduction is not None and self._takes_local:
                self.own_reduction.tell_what_is_bad()
            else:
                tell_what_is_bad(self.masters, self.reducer.gradients, self.mesh)
        if not is_late:
            self.unused.leave_out(self.unused.here() if missed_any else None)
        if self.overflow:
            return None
        clip = max(1.0, (unscaled + 1e-6) / self.clip) if self.clip > 0 else 1.0
        return 1.0 / (scale_used * clip)

    def apply(self, factor: float, kept: Sequence[Tensor] | None = None) -> None:
        """Update from this step's gradients, or from those `kept` of it, and publish. Collective where O is sharded."""
        has_all = kept is None and not self.unused.pairs
        with called_once(self.optimizer):
            if self.graphed is not None and has_all and self.graphed.run(factor):
                self.publish(is_written=True)
            else:
                self._update(factor, kept)
                self.publish()

    def _measure(self) -> Measured:
        """The norm, with the gradients of parameters that join in this step."""
        norm: GradientNorm | LocalNorm = self._local_norm if self._takes_local else self.norm
        if self.takeover is None:
            return norm.measure()
        measured = norm.measure(self.takeover.news)
        if self.takeover.take_over_told(measured.changed_any):
            self.reducer.finish()
            again = norm.measure()  # the flags of those that were reduced before have been taken
            measured = again._replace(missed_any=measured.missed_any or again.missed_any)
        return measured

    def _update(self, factor: float, kept: Sequence[Tensor] | None) -> None:
        if self.own_reduction is not None and self._takes_local:
            self.own_reduction.factor = factor
            self.optimizer.step()
            return
        failure = Update(self.runs).run(factor, self.unused.pairs, kept)
        if self.runs.stream is not None:
            self._agree_on_failure(failure)

    def _agree_on_failure(self, failure: TierError | None) -> None:
        """Raise TierError on every rank if bytes could not be moved on one. Collective where there is an nvme tier."""
        if not any(master.tier.is_on_disk for master in self.masters):
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

    def publish(self, *, is_written: bool = False) -> None:
        """Have the parameters be their masters again, on every rank. Collective where O is sharded.

        is_written: this rank's own are that already.
        """
        pending = []
        for master in self.masters:
            if not is_written and not self.runs.is_streamed(master):
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
        if self.before_scaled is not None:
            self.before_scaled()
        self.scale.times(loss).backward(retain_graph=retain_graph)

    # State. --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: base state, masters, loss scale. Tensors are not copied."""
        if any(master.tier.is_on_disk for master in self.masters):
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
        self.runs.show_states()
        for master, flat in zip(self.masters, state["fp32_flat_groups"], strict=True):
            master.weights.start_store(0, flat.to(master.weights.dtype)).wait()
            master.to_params()
        self.publish(is_written=True)
        self.states_loaded()
