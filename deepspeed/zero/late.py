"""The optimizer's step without waiting for its norm: made with what the rank knows, and taken back where the norm says so.

Made by the pipeline engine, whose ranks end a batch at different times: waiting for the norm there would have them all end, and
begin the next batch, with the last. Stands on the same parts of `zero.optimizer` as the step that waits.

    begin     gradients delivered -> the norm's sum started -> what the update will write over is copied, gradients too
              -> the update with the factor of a step that is neither skipped nor clipped, and published
    decide    the norm has come: overflow, loss scale, norm, the factor that the step should have had
    settle    the same factor: the copies are dropped. Another: they are put back, and the step is made with it, or skipped

A rank whose own part of the norm is over the limit already, or not finite, does not step in vain. Those that share its
shards do as it does, since publishing is collective over them; ranks of other stages are not asked.

Invariant: after `settle` weights and states have the bits of the step that waits. Costs memory: masters, states, gradients once more.

After Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 4, where a step is undone by arithmetic, which is not exact; here
it is undone by copies.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import math
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import Needs, needs_of
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.zero.norm import CHANGED, Asked, Measured
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.runs import Runs
from deepspeed.zero.unused import Used

_SURELY = 1.01
"""How far above the limit a rank's own part must be for the whole norm to be above it, whatever was rounded."""


class Verdict(enum.Enum):
    """What became of a step that was made early."""

    STOOD = "the weights are what they were taken for"
    REDONE = "they are not: the step was clipped, skipped, or left parameters out"
    FAILED = "a rank failed in the batch: there was no step"


@final
class LateStep:
    """The steps of one engine's optimizer, one under way at a time.

    Collective to make. Raises DeepSpeedConfigError for an optimizer whose steps it cannot take back, or not on one rank alone.
    """

    def __init__(self, optimizer: ZeroOptimizer, mesh: Mesh) -> None:
        _check(optimizer)
        self._optimizer, self._mesh = optimizer, mesh
        self._group = mesh.group("norm" if optimizer.policy.optimizer.is_sharded else "whole", "late")
        self._job = mesh.group("job", "late_failure", "gloo")
        if optimizer.takeover is not None:
            optimizer.takeover.tell_early()
        self._asked: Asked | None = None
        self._failed: tuple[Tensor, Any] | None = None
        self._factor: float | None = 1.0
        self._measured: Measured | None = None
        self._expected = 1.0
        self._used: Used = []
        self._gradients: list[Tensor] = []
        self._before: _Copies | None = None
        self._settings: _Settings | None = None
        self._written: list[int] = []
        self.lost: str | None = None
        """What a script wrote that was put back, as an error's text, until somebody raises it."""

    @property
    def is_pending(self) -> bool:
        """Whether a step was begun and not settled."""
        return self._failed is not None

    @torch.no_grad()
    def begin(self) -> None:
        """Step by what is known here. Collective over the ranks that average."""
        optimizer = self._optimizer
        optimizer.deliver()
        takeover, reducer = optimizer.takeover, optimizer.reducer
        self._used = optimizer.unused.here()
        assert not reducer.left_out, "a script has no turn between a batch's backward passes and its step"
        asked = optimizer.norm.start(takeover.news if takeover is not None else False, self._group)
        self._start(asked, is_failed=False)
        if takeover is not None:
            takeover.follow_written()
        self._expected = 1.0 / optimizer.scale.scale
        self._gradients = [g.rest().view(0, m.numel) for g, m in zip(reducer.gradients, optimizer.masters, strict=True)]  # type: ignore[misc]
        self._gradients = [values.clone() for values in self._gradients]
        self._settings = _Settings(optimizer.param_groups)
        optimizer.taken = (optimizer.scale.scale, self._expected)
        if self._looks_right(asked):
            self._before = _Copies(optimizer.runs)
            optimizer.unused.leave_out(None)
            optimizer.apply(self._expected)
        self._settings.note_end()
        self._written = self._versions()
        reducer.drop()
        if takeover is not None:
            takeover.end_step()

    def begin_failed(self) -> None:
        """Take part in a step that there is nothing to make of on this rank; `settle` will say FAILED on all."""
        device = self._optimizer.norm.device
        both = torch.full((2,), math.nan, device=device)
        work = None
        if self._group is not None:
            work = torch.distributed.all_reduce(both, group=self._group, async_op=True)
        self._start(Asked(both[0], both[1], both, work), is_failed=True)

    def _start(self, asked: Asked, *, is_failed: bool) -> None:
        assert not self.is_pending, "one step at a time"
        flag = torch.tensor([int(is_failed)])
        work = None
        if self._job is not None:
            work = torch.distributed.all_reduce(flag, group=self._job, async_op=True)
        self._asked, self._failed, self._measured = asked, (flag, work), None

    def _looks_right(self, asked: Asked) -> bool:
        """Whether this rank, and those that it shares shards with, know no reason why the step should be another."""
        optimizer, (own, missed) = self._optimizer, torch.stack([asked.own, asked.missed]).tolist()
        is_clipped = optimizer.clip > 0 and own / optimizer.scale.scale > optimizer.clip * _SURELY
        is_skipped = optimizer.skips_non_finite and not math.isfinite(own)
        is_wrong = is_clipped or is_skipped or missed % CHANGED > 0
        return not any(wrong for (wrong,) in self._mesh.agree("average", int(is_wrong)))

    def decide(self) -> bool:
        """Wait for the norm, once: `overflow`, `grad_norm` and the loss scale are this step's then. False where a rank failed.

        Weights are not touched, and nobody else is waited for. Raises LossScaleFloorError, as a step does.
        """
        assert self._failed is not None, "begun"
        assert self._asked is not None, "begun"
        flag, work = self._failed
        if work is not None:
            work.wait()
            self._failed = flag, None
        if flag.item():
            return False
        if self._measured is None:
            self._measured = self._optimizer.norm.finish(self._asked)
            self._factor = None
            self._factor = self._optimizer.decide(self._measured, is_late=True)
        return True

    @torch.no_grad()
    def settle(self) -> Verdict:
        """Have weights and states be what they should be. Collective over the ranks that average, unless the step stood."""
        is_made, asked = self.decide(), self._asked
        assert asked is not None, "begun"
        if not is_made:
            if asked.work is not None:
                asked.work.wait()
            self._note_written()
            self._take_back()
            self._end()
            return Verdict.FAILED
        measured, takeover = self._measured, self._optimizer.takeover
        assert measured is not None, "decided"
        if measured.changed_any and takeover is not None:
            takeover.take_over_told(changed_any=True)
        if self._factor == self._expected and not measured.missed_any:
            self._end()
            return Verdict.STOOD
        self._redo(measured)
        self._end()
        return Verdict.REDONE

    def _redo(self, measured: Measured) -> None:
        self._note_written()
        optimizer = self._optimizer
        optimizer.unused.leave_out(self._used if measured.missed_any else None)
        if self._factor is None:
            self._take_back()
            return
        assert self._settings is not None, "begun"
        with self._settings.as_begun():
            if self._before is not None:
                self._before.put_back()
            optimizer.apply(self._factor, self._gradients)
        if optimizer.takeover is not None:
            optimizer.takeover.end_step()

    def _params(self) -> list[Tensor]:
        return [param for master in self._optimizer.masters for param in master.bucket.params]

    def _versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [param._version for param in self._params()]

    def _note_written(self) -> None:
        """Weights are about to be put back, and a script's own are lost. Collective over the ranks that average."""
        pairs = zip(self._written, self._versions(), strict=True) if self._before is not None else ()
        told = self._mesh.agree("average", next((at for at, (old, new) in enumerate(pairs) if old != new), -1))
        for rank, (at,) in zip(self._mesh.ranks("average"), told, strict=True):
            if at >= 0:
                name = [name for master in self._optimizer.masters for name in master.bucket.names][at]
                self.lost = (
                    f"rank {rank} wrote {name!r} after a step that had to be taken back, since its norm says that it should have "
                    "been clipped or skipped (or a rank failed): what was written is lost.\n"
                    "  Call engine.settle_step() on all ranks before weights are written, or leave pipeline.post_validation out."
                )
                return

    def _take_back(self) -> None:
        if self._before is None or self._settings is None:
            return
        with self._settings.as_begun():
            self._before.put_back()
        self._optimizer.publish()
        if self._optimizer.takeover is not None:
            self._optimizer.takeover.end_step()

    def _end(self) -> None:
        self._asked = self._failed = self._before = self._settings = None
        self._gradients, self._used = [], []


@final
class _Copies:
    """What an update writes over: masters and states."""

    def __init__(self, runs: Runs) -> None:
        self._optimizer = runs.optimizer
        self._runs = [
            (run, run.detach().clone(), self._state_of(run)) for members in runs.steppable for _, run in members
        ]

    def _state_of(self, run: Tensor) -> dict[str, Any] | None:
        state = self._optimizer.state.get(run)
        return None if state is None else {key: _copied(value) for key, value in state.items()}

    def put_back(self) -> None:
        """Have everything as it was; a second time is not possible, since the copies become the states."""
        for run, weights, state in self._runs:
            run.data.copy_(weights)
            if state is None:
                self._optimizer.state.pop(run, None)
            else:
                self._optimizer.state[run] = state


@final
class _Settings:
    """What parameter groups say and count besides their members, for a step that is made once more after schedules have gone on."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups
        self._before, self._after = _settings_of(groups), list[dict[str, Any]]()

    def note_end(self) -> None:
        """The step was made."""
        self._after = _settings_of(self._groups)

    @contextlib.contextmanager
    def as_begun(self) -> Iterator[None]:
        """As they were before the step; in the end what others than the step have changed since is as they left it."""
        changed = [
            {key: value for key, value in group.items() if key != "params" and not _equal(value, after.get(key))}
            for group, after in zip(self._groups, self._after, strict=True)
        ]
        for group, before in zip(self._groups, self._before, strict=True):
            group.update(before)
        yield
        for group, theirs in zip(self._groups, changed, strict=True):
            group.update(theirs)


def _settings_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: _copied(value) for key, value in group.items() if key != "params"} for group in groups]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check(optimizer: ZeroOptimizer) -> None:
    needs, name = needs_of(optimizer.optimizer), type(optimizer.optimizer).__name__
    if needs is None or needs is Needs.OWN_REDUCTION:
        why = "keeps errors of its own messages" if needs else "is not known to keep all that it counts in its states"
        raise DeepSpeedConfigError(
            f"pipeline.post_validation: {name} {why}, so its steps cannot be taken back.\n"
            "  Use Adam, AdamW, SGD, Lamb, Lion, Muon or another optimizer of this package or torch, or leave the key out."
        )
    if optimizer.runs.stream is not None:
        raise DeepSpeedConfigError(
            "pipeline.post_validation: optimizer states on a tier are stepped piece by piece, and would have to be read twice "
            "to be taken back.\n  Leave zero_optimization.offload_optimizer out, or the key."
        )
    if optimizer.policy.optimizer.is_sharded and optimizer.norm.has_replicas:
        raise DeepSpeedConfigError(
            "pipeline.post_validation does not go with MiCS: the norm is agreed on with the replicas of a shard.\n"
            "  Leave one of them out."
        )
