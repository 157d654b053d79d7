"""States put away into main memory between steps, and brought back: `engine.offload_states` and `reload_states`.

For scripts that lend the device to something else for a while, such as generation in reinforcement learning. Where the
tiers move bytes in every step, this moves everything once and back.

The idea: a tensor keeps its object and its views, only its *storage* is copied away and resized to zero; bringing back
resizes it and copies. So masters, runs and parameters need not know (see Note [Storage resize and autograd] in bucket.py).

Invariant: nothing uses a storage that is away; buckets and the optimizer refuse while `is_away`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedConfigError, TrainingStateError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket, can_be_given_up
from deepspeed.zero.optimizer import ZeroOptimizer


class OffloadDeviceEnum(str, enum.Enum):
    """Where bytes can be offloaded to; the names of the original."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, enum.Enum):
    """What can be put away; the names of the original."""

    optim_states = "optim_states"
    """The optimizer's moments."""
    hp_params = "hp_params"
    """Master weights."""
    lp_params = "lp_params"
    """The parameters themselves."""
    lp_grads = "lp_grads"
    """Reduced gradients."""
    contiguous_grad_buffer = "contiguous_grad_buffer"
    """Working buffers of reductions, which are freed rather than copied."""


class PutAway:
    """What of one engine is away."""

    def __init__(self, optimizer: ZeroOptimizer, buckets: Sequence[Bucket]) -> None:
        self._optimizer, self._buckets = optimizer, buckets
        self.copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        """What is away; empty: everything is at its place."""

    def put(self, include: Iterable[Any] | None, device: Any, pin_memory: bool, non_blocking: bool) -> None:
        """Move the kinds in `include` (None: all) into main memory and free their storages on the device.

        Raises DeepSpeedConfigError for a device or kind that does not exist here, TrainingStateError for memory that a script has
        shared or pinned. What is away already stays.
        """
        target = OffloadDeviceEnum(getattr(device, "value", getattr(device, "type", device)))
        if target is OffloadDeviceEnum.none:
            warn_once('offload_states(device="none") does nothing.')
            return
        if target is OffloadDeviceEnum.nvme:
            raise DeepSpeedConfigError(
                "offload_states moves states into main memory only, not to nvme.\n"
                '  Use device "cpu"; for training from a disk set zero_optimization.offload_optimizer.'
            )
        kinds = {OffloadStateTypeEnum(kind) for kind in include} if include is not None else set(OffloadStateTypeEnum)
        self._put(self._at_their_place(kinds), pin_memory, non_blocking)
        if OffloadStateTypeEnum.contiguous_grad_buffer in kinds:
            self._optimizer.reducer.pool.clear()
        if OffloadStateTypeEnum.lp_params in kinds:
            for bucket in self._buckets:
                bucket.set_away(True)
        if kinds & {OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params}:
            self._optimizer.runs.is_away = True

    def bring_back(self, non_blocking: bool = False) -> None:
        """Have everything at its place again."""
        copies, self.copies = self.copies, []
        for storage, copy in copies:
            storage.resize_(copy.nbytes)
            storage.copy_(copy.untyped_storage(), non_blocking)
        for bucket in self._buckets:
            bucket.set_away(False)
        self._optimizer.runs.is_away = False

    def _at_their_place(self, kinds: Iterable[OffloadStateTypeEnum]) -> list[torch.UntypedStorage]:
        """The storages of these kinds, each once: neither away already, nor at rest on a tier."""
        found = {}
        for kind in kinds:
            for tensor in self._tensors(kind):
                storage = tensor.untyped_storage()
                if storage.nbytes() and tensor.device == self._optimizer._device:
                    if not can_be_given_up(storage):
                        raise TrainingStateError(
                            f"engine.offload_states: the memory of {kind.name} cannot be given up: the script has shared it "
                            "(share_memory_) or has a NumPy array of it.\n  Share copies: param.detach().clone().share_memory_()."
                        )
                    found[storage.data_ptr()] = storage
        return list(found.values())

    @torch.no_grad()
    def _put(self, storages: Sequence[torch.UntypedStorage], pin_memory: bool, non_blocking: bool) -> None:
        pins = pin_memory and self._optimizer._device.type != "cpu"
        copies = []
        for storage in storages:
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pins)
            copy.untyped_storage().copy_(storage, non_blocking)
            copies.append((storage, copy))
        if non_blocking and pins:
            # Once for all of them: the script may have called in a stream of its own, which no freed memory waits for.
            torch.accelerator.current_stream().synchronize()
        for storage in storages:
            storage.resize_(0)
        self.copies += copies

    def _tensors(self, kind: OffloadStateTypeEnum) -> list[Tensor]:
        optimizer = self._optimizer
        if kind is OffloadStateTypeEnum.optim_states:
            states = [value for state in optimizer.state.values() for value in state.values()]
            return [value for value in states if isinstance(value, Tensor) and value.dim() > 0]
        if kind is OffloadStateTypeEnum.hp_params:
            views = [master.weights.view(0, master.numel) for master in optimizer.masters if not master.is_alias]
            return [view for view in views if view is not None]
        if kind is OffloadStateTypeEnum.lp_params:
            rests = [bucket.rest.view(0, bucket.layout.shard_numel) for bucket in self._buckets]
            return [view for view in rests if view is not None]
        if kind is OffloadStateTypeEnum.lp_grads:
            return [gradients.result for gradients in optimizer.reducer.gradients if gradients.nbytes]
        return []
