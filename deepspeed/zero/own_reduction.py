"""How an optimizer that averages by itself reaches whole parameters under ZeRO 0 and 1, and other ranks.

Made by the optimizer wrapper for optimizers with Needs.OWN_REDUCTION (the 1-bit family); asked by them in every step.
Implements `optim.traits.OwnReduction` over the wrapper's masters.

    ZeRO stage   runs are              momentum                                  variance, masters
    0            whole parameters      the run's own state                       the run's own
    1            pieces of the shard   whole on every rank, once it is           sharded
                                       compressed; the run's state is its piece

At stage 1 every rank needs the whole momentum, because what it sends is its own gradient on top of it; so of Adam's states
stage 1 shards the variance and the masters. Parameters are then all-gathered in their own dtype.

Invariant: `states`, by parameter, are the same on every rank, but for errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.onebit import SignReduction
from deepspeed.mesh import Mesh
from deepspeed.optim.compressed import average_signs, count_steps, state_of
from deepspeed.optim.traits import AveragesItself, RunSpan, Whole
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import logger
from deepspeed.utils.waits import COMMUNICATION
from deepspeed.zero.master import Master

if TYPE_CHECKING:
    from deepspeed.zero.optimizer import ZeroOptimizer


WEIGHTS = "weights"
"""Key of a rank's own weights, where they have left the others'."""


def _on(device: torch.device, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors as copies on a device."""
    return {key: v.to(device, copy=True) if isinstance(v, Tensor) else v for key, v in values.items()}


def check_placements(optimizer: AveragesItself, owner: ZeroOptimizer) -> None:
    """Raise DeepSpeedConfigError, on every rank alike, where gradients or states are not where such an optimizer needs them,
    or ranks have different settings. Collective."""
    name = type(optimizer).__name__
    if owner.policy.gradients.is_sharded:
        raise DeepSpeedConfigError(
            f"{name} averages whole momenta by itself, but under ZeRO stage {owner.zero_stage} a rank keeps a slice of the gradients "
            "only, already averaged.\n  Use stage 0 or 1."
        )
    if any(master.bucket.over != "shard" for master in owner.masters):
        raise DeepSpeedConfigError(
            f"{name} averages momenta over all ranks, but {owner.mesh.size('experts')} ranks hold different experts.\n"
            "  Use ep_size 1 (expert_parallel.autoep_size 1), or Adam."
        )
    if any(master.is_streamed for master in owner.masters):
        raise DeepSpeedConfigError(
            f"{name} averages whole momenta between devices, but its state is offloaded (zero_optimization.offload_optimizer).\n"
            "  Leave the state on the device, or use Adam."
        )
    assert not (optimizer.needs_whole_states and owner.policy.optimizer.is_sharded), "the policy has its states whole"
    everyone = owner.mesh.gather_objects("average", optimizer.agreed_settings)
    for rank, theirs in enumerate(everyone):
        for key in theirs:
            if theirs[key] != everyone[0].get(key):
                raise DeepSpeedConfigError(
                    f"{name}: ranks differ in {key}: {everyone[0].get(key)!r} on rank {owner.mesh.ranks('average')[0]}, "
                    f"{theirs[key]!r} on rank {owner.mesh.ranks('average')[rank]}.\n"
                    "  They would compress in different steps. Give every rank the same settings."
                )


class ZeroReduction:
    """The reduction of one wrapped optimizer. Collective to make."""

    def __init__(self, owner: ZeroOptimizer, mesh: Mesh) -> None:
        self._owner, self._mesh = owner, mesh
        self.num_ranks = mesh.size("average")
        self._signs = SignReduction(mesh.group("average", "reduce"))
        self._group = mesh.group("average", "reduce")
        self._is_whole = not owner.policy.optimizer.is_sharded
        self.factor = 1.0
        """Unscales and clips this step's gradients."""
        self._states: dict[tuple[int, int], dict[str, Any]] = {}
        """By (master, parameter), where runs are not whole parameters."""
        self._has_moments = False
        """Whether `_states` has the whole momenta."""

    # What the optimizer asks. --------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """See OwnReduction."""
        states = self._owner.optimizer.state.values() if self._is_whole else self._states.values()
        return max((int(state.get("step", 0)) for state in states), default=0)

    def parameters(self) -> Sequence[Whole]:
        """See OwnReduction."""
        unused = set(self._owner.unused.pairs)
        found = []
        for i, master in enumerate(self._owner.masters):
            spans = self._spans(i)
            found += [self._whole(i, j, spans[j]) for j, _ in master.bucket.members() if (i, j) not in unused]
        return found

    def momentum(self, whole: Whole) -> Tensor:
        """See OwnReduction."""
        if not self._is_whole and not self._has_moments:
            self._gather_moments()
        key = "exp_avg"
        if key not in whole.state:
            whole.state[key] = torch.zeros(whole.shape.numel(), device=self._owner._device, dtype=self._moment_dtype)
            if self._is_whole:
                whole.state[key] = whole.state[key].view(whole.shape)
        found: Tensor = whole.state[key]
        return found.view(-1)

    def end_step(self, wholes: Sequence[Whole]) -> None:
        """See OwnReduction. At stage 1 all runs have the same states, and the steps of the parameter that has had most: a
        run holds spans of several."""
        count_steps(wholes)
        if self._is_whole:
            return
        num_steps = self.num_steps
        for runs in self._owner.runs.steppable:
            for _, run in runs:
                state = self._owner.optimizer.state[run]
                state["step"] = num_steps
                for key in self._optimizer.run_states:
                    state_of(state, key, run)
        for whole in wholes if self._has_moments else ():
            for span in whole.spans:
                moment = self._owner.optimizer.state[span.run]["exp_avg"]
                span.of_run(moment).copy_(span.of_param(whole.state["exp_avg"]))

    def total(self, values: Tensor) -> Tensor:
        """See OwnReduction."""
        return self._over_shards(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """See OwnReduction."""
        return self._over_shards(values, dist.ReduceOp.MAX)

    def _over_shards(self, values: Tensor, op: Any) -> Tensor:
        group = None if self._is_whole else self._mesh.group("shard", "control", "gloo")
        if group is not None:
            dist.all_reduce(values, op=op, group=group)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See OwnReduction."""
        if self._group is None or not tensors:
            return
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        with COMMUNICATION.during("zero.average", flat.nbytes):
            dist.all_reduce(flat, group=self._group)
        flat.div_(self.num_ranks)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def average_signs(self, tensors: Sequence[Tensor], owners: Sequence[dict[str, Any]]) -> None:
        """See OwnReduction."""
        average_signs(self._signs, tensors, owners)

    # What the wrapper and checkpoints ask. -------------------------------------------------------------------------

    def tell_what_is_bad(self) -> None:
        """Warn of this step's gradients that are not finite, by rank. Collective."""
        found = next(
            (
                f"{gradients.bucket.names[j]} has {'nan' if torch.isnan(gradients.local_views[j]).any() else 'inf'}"
                for gradients in self._owner.reducer.gradients
                for j, _ in gradients.bucket.members()
                if not torch.isfinite(gradients.local_views[j]).all()
            ),
            None,
        )
        everyone = self._mesh.gather_objects("average", found)
        ranks = self._mesh.ranks("average")
        told = "; ".join(f"[rank {ranks[i]}] the gradient of {text}" for i, text in enumerate(everyone) if text)
        logger.warning("the step is skipped, since what cannot be compressed would stay in the errors: %s", told)

    def loaded(self) -> None:
        """The runs' states were replaced. Collective."""
        if self._is_whole:
            return
        self._states.clear()
        self._has_moments = False
        mine: dict[tuple[int, int], int] = {}
        for i, master in enumerate(self._owner.masters):
            spans = self._spans(i)
            for j, _ in master.bucket.members():
                for span in spans[j]:
                    step = int(self._owner.optimizer.state.get(span.run, {}).get("step", 0))
                    mine[i, j] = max(mine.get((i, j), 0), step)
        for theirs in self._mesh.gather_objects("shard", mine):
            for key, step in theirs.items():
                state = self._states.setdefault(key, {})
                state["step"] = max(step, state.get("step", 0))

    def private_states(self) -> dict[str, Any]:
        """What is this rank's own, and (`shared`) what all ranks know of parameters whose runs do not keep it; by the
        parameters' local names."""
        own, shared = {}, {}
        diverged = ("exp_avg",) if self._optimizer.has_diverged else ()
        for name, state, run in self._by_name():
            own[name] = {key: state[key] for key in (*self._optimizer.private_states, *diverged) if key in state}
            if diverged and run is not None:
                own[name][WEIGHTS] = run.detach()
            if run is None:
                shared[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        return {"own": own, "shared": shared, "common": dict(self._optimizer.common)}

    def take_private_states(self, saved: Mapping[str, Any], is_own: bool) -> None:
        """Take back what `private_states` gave on this rank, or (not `is_own`) on another, of which only `shared` is of use.
        Parameters that are not in it begin without."""
        own = saved.get("own", {}) if is_own else {}
        self._optimizer.common.clear()
        self._optimizer.common.update(_on(self._owner._device, saved.get("common", {}) if is_own else {}))
        for name, state, run in self._by_name():
            for key in self._optimizer.private_states:
                state.pop(key, None)
            mine = _on(self._owner._device, own.get(name, {}))
            if run is not None and WEIGHTS in mine:
                run.data.copy_(mine.pop(WEIGHTS))
            state.update(mine)
            if run is None:
                state.update(saved.get("shared", {}).get(name, {}))
        if own and self._optimizer.has_diverged:
            for master in self._owner.masters:
                master.to_params()
        self._owner._choose_reduction()

    def _by_name(self) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
        """(local name, state, the run that is the whole parameter if there is one)."""
        for i, master in enumerate(self._owner.masters):
            for j, _ in master.bucket.members():
                run = self._owner.runs.steppable[i][j][1] if self._is_whole else None
                yield master.bucket.names[j], self._state(i, j), run

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> AveragesItself:
        optimizer = self._owner.optimizer
        assert isinstance(optimizer, AveragesItself), "only those have an own reduction"
        return optimizer

    @property
    def _moment_dtype(self) -> torch.dtype:
        return torch.promote_types(self._owner.policy.optimizer.dtype, torch.float32)

    def _state(self, i: int, j: int) -> dict[str, Any]:
        if not self._is_whole:
            return self._states.setdefault((i, j), {})
        state: dict[str, Any] = self._owner.optimizer.state[self._owner.runs.steppable[i][j][1]]
        return state

    def _whole(self, i: int, j: int, spans: Sequence[RunSpan]) -> Whole:
        master = self._owner.masters[i]
        group = self._owner.param_groups[master.bucket.layout.groups[j]]
        shape = master.bucket.shape_of_numbers(j)
        return Whole(shape, group, self._state(i, j), partial(self._read, i, j), spans)

    def _read(self, i: int, j: int) -> Tensor:
        gradient = self._owner.reducer.gradients[i].local_views[j].reshape(-1)
        values = gradient.to(self._moment_dtype, copy=True)
        return values.mul_(self.factor) if self.factor != 1.0 else values

    def _spans(self, i: int) -> list[list[RunSpan]]:
        """Where the parameters of one master lie in this rank's runs."""
        master: Master = self._owner.masters[i]
        runs = self._owner.runs.steppable[i]
        if self._is_whole:
            numels = master.layout.numels
            return [[RunSpan(run, 0, numel, 0)] for (_, run), numel in zip(runs, numels, strict=True)]
        found: list[list[RunSpan]] = [[] for _ in master.layout.numels]
        for piece in master.layout.pieces(master.rank):
            for span, (_, run) in zip(master.spans, runs, strict=True):
                if span.start <= piece.in_shard < span.stop:
                    at = piece.in_shard - span.start
                    found[piece.param].append(RunSpan(run, at, at + piece.numel, piece.in_param))
        return found

    def _gather_moments(self) -> None:
        """Have whole momenta, from every rank's pieces."""
        for i, master in enumerate(self._owner.masters):
            layout = master.layout
            full = torch.zeros(layout.padded_numel, dtype=self._moment_dtype, device=self._owner._device)
            own = full.narrow(0, master.rank * layout.shard_numel, layout.shard_numel)
            for span, (_, run) in zip(master.spans, self._owner.runs.steppable[i], strict=True):
                moment = self._owner.optimizer.state.get(run, {}).get("exp_avg")
                if moment is not None:
                    own[span.start : span.stop].copy_(moment)
            master.bucket.exchange.start_all_gather(full, None).wait()
            views = master.bucket.split_numbers(full)
            for j, _ in master.bucket.members():
                self._state(i, j)["exp_avg"] = views[j].reshape(-1)
        self._has_moments = True
