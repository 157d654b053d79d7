"""Reading and writing what is sharded: whole parameters, whole optimizer states, whole gradients.

Public: `deepspeed.zero.GatheredParameters`, `register_external_parameter` and the `safe_*` functions of
`deepspeed.utils`. Works alike at every stage, because a slot leads to a bucket and a bucket to the optimizer's shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import ShardError, TrainingStateError
from deepspeed.zero.bucket import Bucket, num_views
from deepspeed.zero.hook_switch import EXTERNALS
from deepspeed.zero.hooks import Memory, SavedWeights
from deepspeed.zero.layout import Piece
from deepspeed.zero.modes import plain_modes
from deepspeed.zero.param import buckets_of, slot_of
from deepspeed.zero.read_only import ReadOnly, note_kept
from deepspeed.zero.written import keep_if_written

if TYPE_CHECKING:
    from deepspeed.zero.optimizer import Master, ZeroOptimizer


class Trainers:
    """Which optimizer trains a bucket: filled by the engine, asked by the functions here."""

    def __init__(self) -> None:
        self._by_bucket: dict[int, tuple[ZeroOptimizer, int]] = {}

    def add(self, optimizer: ZeroOptimizer) -> None:
        """Register the buckets of an engine's optimizer."""
        for i, master in enumerate(optimizer.masters):
            self._by_bucket[id(master.bucket)] = (optimizer, i)

    def remove(self, optimizer: ZeroOptimizer) -> None:
        """Forget an engine's optimizer."""
        for master in optimizer.masters:
            self._by_bucket.pop(id(master.bucket), None)

    def find(self, bucket: Bucket) -> tuple[ZeroOptimizer, int] | None:
        """The optimizer that trains `bucket`, and the bucket's position there."""
        return self._by_bucket.get(id(bucket))


trainers = Trainers()


class GatheredParameters:
    """Context: the listed parameters are whole inside, on every rank.

    params: one parameter, or any iterable of them; those that ZeRO does not shard are left as they are.
    modifier_rank: keep what this data-parallel rank changed in place, on every rank, in the fp32 masters too;
        None discards changes, with a warning that names them (a single rank has no other copy to return to: there they stay in
        the parameters).
    fwd_module: also have the parameters whole around every forward of this module from now on.
    Collective: all ranks enter and leave with the same parameters. Contexts may nest.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.params: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        self.modifier_rank = modifier_rank
        self.enabled = enabled
        self._buckets: list[Bucket] = []
        self._num_views: list[int] = []
        self._read_only: ReadOnly | None = None
        self._saved = SavedWeights(ask=None, unseen=lambda: None)
        self._outer: list[Memory] | None = None
        if fwd_module is not None and enabled:
            for param in self.params:
                register_external_parameter(fwd_module, param)

    def __enter__(self) -> None:
        if self.enabled:
            self._buckets = buckets_of(param for param in self.params if isinstance(param, Tensor))
            with plain_modes():
                for bucket in self._buckets:
                    if bucket.is_unsharded and not bucket.holders:  # left so by a module that ran
                        keep_if_written(bucket)
                    bucket.start_unshard()
                    bucket.hold()
                for bucket in self._buckets:
                    bucket.finish_unshard()
            self._num_views = [num_views(bucket) for bucket in self._buckets]
            if self.modifier_rank is None and self._buckets:
                self._read_only = ReadOnly(self.params)
            if self._buckets and torch.is_grad_enabled():
                self._outer = self._saved.enter(self._buckets)
                for bucket in self._buckets:
                    if bucket.use_around is not None:
                        bucket.use_around(None)

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._outer is not None:
            self._saved.leave(self._outer)
            self._outer = None
        if self.enabled and kind is None and self.modifier_rank is not None:
            self._keep_changes(self.modifier_rank)
        if self._read_only is not None:
            if kind is None:
                self._read_only.warn_of_changes()
                self._keep_assigned()
            self._read_only.close()
            self._read_only = None
        for bucket, num_before in zip(self._buckets, self._num_views, strict=True):
            bucket.unhold()
            if bucket.holders == 0:
                if num_views(bucket) > num_before:
                    bucket.leave_full()
                bucket.reshard()
        self._buckets = []

    def _keep_assigned(self) -> None:
        """One rank alone keeps what was written in place, and so what was assigned."""
        for bucket in self._buckets:
            values = bucket.assigned() if bucket.layout.world_size == 1 else []
            if values:
                _take_assigned(bucket, values)
                bucket.write_shard()

    def _keep_changes(self, modifier_rank: int) -> None:
        slots = (slot_of(param) for param in self.params if isinstance(param, Tensor))
        assigned = {bucket: bucket.assigned() for bucket in dict.fromkeys(slot.bucket for slot in slots if slot)}
        for bucket, values in assigned.items():
            _take_assigned(bucket, values)
            bucket.exchange.broadcast(bucket.full, modifier_rank)
            bucket.write_shard()
            # Masters follow when they are asked: what is put back leaves them as they were.
            bucket.written.is_in_shard = True
        note_kept()


def _take_assigned(bucket: Bucket, assigned: Sequence[Any]) -> None:
    """Take over what a script assigned (`Bucket.assigned`); what it took away before, to put it back later, stays as it is."""
    if assigned:
        bucket.leave_memory()
        found = trainers.find(bucket)
        if found is not None:
            found[0].runs.follow_memory(bucket)
    bucket.take_assigned(assigned)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Have `parameter`, owned by another module, whole around every forward and backward of `module`, from now on: before
    `initialize`, after it, or while a forward runs.

    Rarely needed: a use outside the owner is noticed and registered by itself. Raises RuntimeError for other types.
    """
    if not isinstance(module, nn.Module):
        raise RuntimeError(
            f"register_external_parameter: the first argument is a {type(module).__name__}, not an nn.Module."
        )
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(
            f"register_external_parameter: the second argument is a {type(parameter).__name__}, not an nn.Parameter."
        )
    externals = module.__dict__.setdefault(EXTERNALS, {})
    externals[id(parameter)] = parameter
    slot = slot_of(parameter)
    if slot and slot.bucket.use_around is not None:
        slot.bucket.use_around(module)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter`. Raises RuntimeError if it was not registered."""
    if module.__dict__.get(EXTERNALS, {}).pop(id(parameter), None) is None:
        raise RuntimeError(
            f"unregister_external_parameter: the parameter was not registered with {type(module).__name__}."
        )
    slot = slot_of(parameter)
    if slot and slot.bucket.use_around is not None:
        slot.bucket.use_around(module, is_used=False)


# Optimizer-side values. --------------------------------------------------------------------------------------------


class _Pieces:
    """A trained parameter's pieces in the optimizer's shard of its bucket."""

    def __init__(self, param: nn.Parameter, optimizer: ZeroOptimizer, position: int, index: int) -> None:
        self.param, self.optimizer, self.position, self.index = param, optimizer, position, index
        self.master: Master = optimizer.masters[position]
        self.shape = self.master.bucket.shape_of_numbers(index)
        self._dtype = torch.promote_types(self.master.bucket.dtype, torch.float32)
        self.pieces: list[Piece] = [p for p in self.master.layout.pieces(self.master.rank) if p.param == index]

    def gather(self, read: Callable[[int, int], Tensor]) -> Tensor:
        """The full value, fp32 (or what is wider), on the device; `read(start, stop)` gives elements of this rank's shard. Collective where
        O is sharded."""
        full = torch.zeros(self.shape.numel(), dtype=self._dtype, device=self.master.bucket.full.device)
        for piece in self.pieces:
            values = read(piece.in_shard, piece.in_shard + piece.numel)
            full.narrow(0, piece.in_param, piece.numel).copy_(values)
        if self.master.is_sharded:
            # Every element is non-zero on one rank alone, so the sum is exact.
            self.master.bucket.exchange.start_all_reduce(full).wait()
        full = full.view(self.shape)
        return torch.view_as_complex(full) if self.param.is_complex() else full

    def cut(self, value: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """This rank's pieces of a full value. Raises ShardError for a value of another size."""
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        if value.numel() != self.shape.numel():
            raise ShardError(
                f"value has {value.numel()} elements, the parameter {tuple(self.shape)} has {self.shape.numel()}."
            )
        for piece in self.pieces:
            yield piece, value.reshape(-1).narrow(0, piece.in_param, piece.numel)

    def reader(self, kind: str) -> Callable[[int, int], Tensor]:
        """Reads "master" or a state of the optimizer. The KeyError of a state that does not exist is raised when read; that
        they are put away is told at once, to ranks that hold nothing of the parameter too."""
        self.optimizer.runs.require_here()
        if kind == "master" and self.master.may_lag:
            for piece in self.pieces:
                self.master.follow_params(piece.in_shard, piece.in_shard + piece.numel)
        return functools.partial(self.optimizer.runs.read_state, self.position, kind)

    def require_state(self, kind: str) -> None:
        """Raise KeyError on every rank if a rank lacks its part of a state. Collective where O is sharded."""
        self.optimizer.runs.require_here()
        has_all = all(self.optimizer.runs.has_state(self.position, kind, piece.in_shard) for piece in self.pieces)
        everyone = (
            self.optimizer.mesh.agree(self.master.bucket.over, int(has_all))
            if self.master.is_sharded
            else [(int(has_all),)]
        )
        if not all(has for (has,) in everyone):
            name = self.master.bucket.names[self.index]
            raise KeyError(
                f"{name} has no optimizer state {kind!r} (it has {self.optimizer.runs.state_kinds(self.position) or 'none'}): "
                "states appear with a parameter's first step."
            )

    def write(self, kind: str, value: Tensor) -> None:
        """Write this rank's pieces of a full value into the masters or a state."""
        self._require_here(kind)
        for piece, part in self.cut(value):
            self.optimizer.runs.write_state(self.position, kind, piece.in_shard, part)

    def publish(self, value: Tensor) -> None:
        """Write this rank's part of a full value, the same on every rank, into the parameter; all of it where it is whole."""
        bucket = self.master.bucket
        if bucket.is_sharded:
            for piece, part in self.cut(value):
                bucket.rest.start_store(piece.in_shard, part.to(bucket.dtype).contiguous()).wait()
            bucket.shard_changed()
        if bucket.has_full:  # other ranks' parts too, which no gather may bring before the next step
            bucket.views[self.index].copy_(value.reshape(bucket.shapes[self.index]))
            note_kept()

    def _require_here(self, kind: str) -> None:
        """Raise TrainingStateError, before anything is written and on every rank alike, for what is put away: a master is
        written with its parameter."""
        self.optimizer.runs.require_here()
        bucket = self.master.bucket
        if kind == "master" and bucket.is_away:
            raise TrainingStateError(
                f"{bucket.names[self.index]} was put away by engine.offload_states.\n  Call engine.reload_states() first."
            )

    def publish_local(self, value: Tensor) -> None:
        """Write this rank's piece into the shard of the parameter."""
        bucket = self.master.bucket
        for piece in self.pieces:
            bucket.rest.start_store(piece.in_shard, value.reshape(-1).to(bucket.dtype).contiguous()).wait()
        bucket.shard_changed()
        if bucket.holders == 0:
            bucket.reshard()

    def local(self, read: Callable[[int, int], Tensor]) -> Tensor:
        """This rank's piece, 1-D: a view where it is in memory."""
        for piece in self.pieces:
            return read(piece.in_shard, piece.in_shard + piece.numel)
        return torch.empty(0, device=self.master.bucket.full.device)

    def write_local(self, kind: str, value: Tensor) -> None:
        """Write this rank's piece."""
        self._require_here(kind)
        for piece in self.pieces:
            self.optimizer.runs.write_state(self.position, kind, piece.in_shard, value.reshape(-1))

    def gradients(self) -> Tensor:
        """This rank's reduced gradients [S]; delivers them first. Collective."""
        if self.optimizer.reducer.saw_backward:
            self.optimizer.reducer.finish()
        return self.optimizer.reducer.gradients[self.position].values()

    def replace_gradients(self, values: Tensor) -> None:
        """Put back what `gradients` gave, changed."""
        self.optimizer.reducer.gradients[self.position].replace(values)


def _pieces(param: nn.Parameter) -> _Pieces | None:
    slot = slot_of(param)
    found = trainers.find(slot.bucket) if slot else None
    return _Pieces(param, *found, slot.index) if slot and found else None


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The full fp32 master value of a parameter, in its shape; None if no engine trains it. Collective."""
    pieces = _pieces(param)
    return pieces.gather(pieces.reader("master")) if pieces else None


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The full optimizer state ("exp_avg", ...) of a parameter, fp32, in its shape. Collective.

    Raises KeyError on every rank if there is no such state (yet), also on ranks that hold nothing of the parameter.
    """
    pieces = _pieces(param)
    if pieces is None:
        return None
    pieces.require_state(optim_state_key)
    return pieces.gather(pieces.reader(optim_state_key))


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The full gradient, averaged over all ranks; from backward at the boundary to the next backward. Collective."""
    pieces = _pieces(param)
    if pieces is None:
        return param.grad
    scale = pieces.optimizer.gradient_scale(pieces.position)
    mine = pieces.gradients()
    full = pieces.gather(lambda start, stop: mine[start:stop])
    return full if scale == 1.0 else full / scale


@torch.no_grad()
def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Write a full value, the same on every rank, into the fp32 master and the parameter."""
    pieces = _pieces(param)
    if pieces is not None:
        pieces.write("master", value)
        pieces.publish(value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Write a full value, the same on every rank, into an optimizer state. Collective.

    Raises KeyError on every rank if there is no such state (yet).
    """
    pieces = _pieces(param)
    if pieces is not None:
        pieces.require_state(optim_state_key)
        pieces.write(optim_state_key, value)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Write a full gradient, the same on every rank, before step. Collective."""
    pieces = _pieces(param)
    if pieces is None:
        param.grad = value
    else:
        mine = pieces.gradients()
        for piece, part in pieces.cut(value * pieces.optimizer.scale.scale):
            mine.narrow(0, piece.in_shard, piece.numel).copy_(part)
        pieces.replace_gradients(mine)


def safe_update_full_grad_vectorized(
    params: Sequence[nn.Parameter], fn: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replace each parameter's gradient by `fn(gradient, param)`, both full. Collective."""
    for param in params:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, fn(gradient, param))


def _local_pieces(param: nn.Parameter) -> _Pieces:
    pieces = _pieces(param)
    if pieces is None or not pieces.master.bucket.is_sharded:
        raise ShardError(
            "safe_get_local_* and safe_set_local_* are for parameters sharded by ZeRO stage 3; this one is whole on every "
            "rank.\n  Use the safe_get_full_* functions, which work at every stage."
        )
    return pieces


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor:
    """This rank's part of the fp32 master, 1-D. Stage 3."""
    pieces = _local_pieces(param)
    return pieces.local(pieces.reader("master"))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor:
    """This rank's part of an optimizer state, 1-D. Stage 3."""
    pieces = _local_pieces(param)
    return pieces.local(pieces.reader(optim_state_key))


def safe_get_local_grad(param: nn.Parameter) -> Tensor:
    """This rank's part of the averaged gradient, 1-D. Stage 3. Collective."""
    pieces = _local_pieces(param)
    mine = pieces.gradients()
    scale = pieces.optimizer.gradient_scale(pieces.position)
    return pieces.local(lambda start, stop: mine[start:stop]) / scale


@torch.no_grad()
def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Write this rank's part of the fp32 master and of the parameter. Stage 3. Collective."""
    pieces = _local_pieces(param)
    pieces.write_local("master", value)
    pieces.publish_local(value)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Write this rank's part of an optimizer state. Stage 3."""
    pieces = _local_pieces(param)
    pieces.write_local(optim_state_key, value)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Write this rank's part of the gradient. Stage 3. Collective."""
    pieces = _local_pieces(param)
    mine = pieces.gradients()
    pieces.local(lambda start, stop: mine[start:stop]).copy_(value.view(-1) * pieces.optimizer.scale.scale)
    pieces.replace_gradients(mine)
