"""From placements to memory: on which tier each bucket's parameters, masters and states rest, and the rests themselves.

Made by the engine from the configuration; used by `zero.build` for every bucket and by the streaming step for states
that appear later. A policy says the tier of a kind of bytes; this file refines it bucket by bucket:

    max_in_cpu   the first elements of parameters on the nvme tier stay in main memory
    ratio        a share of the optimizer's elements stays on the device and is stepped there (Twin-Flow)
    aliases      where masters have the parameters' dtype they are the same bytes, which rest on the faster of the two tiers

Invariant: every rank decides alike, because the decisions depend on sizes that all ranks share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed.tiers import CopyStream, InMemory, OnDisk, OnHost, Rest, Tier
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.zero.policy import ZeroPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the bytes of one bucket rest."""

    params: Tier
    optimizer: Tier
    """Of masters and states; the step is computed where they are, or streams through main memory."""
    is_alias: bool
    """Whether masters are the parameters' own bytes."""


@dataclass(kw_only=True)
class Placing:
    """Decides places and makes rests. `store(path)` opens the nvme store of a folder, once each."""

    policy: ZeroPolicy
    device: torch.device
    param_path: Path | None = None
    optimizer_path: Path | None = None
    store: Callable[[Path], NvmeStore] | None = None
    pins_params: bool = False
    pins_optimizer: bool = False
    max_in_cpu_numel: int = 0
    ratio: float = 1.0
    _in_cpu_numel: int = 0
    _optimizer_numel: int = 0
    _off_device_numel: int = 0
    _copies: CopyStream | None = None

    @property
    def is_host(self) -> bool:
        """Whether the device's memory is main memory, so that the tiers `device` and `cpu` are one."""
        return self.device.type == "cpu"

    def decide(self, numel: int, *, is_sharded: bool, trains: bool) -> Places:
        """The places of the next bucket, whose shard has `numel` elements."""
        optimizer = self._optimizer_tier(numel) if trains else Tier.DEVICE
        params = self._param_tier(numel) if is_sharded else Tier.DEVICE
        same_dtype = trains and self.policy.parameters.dtype == self.policy.optimizer.dtype
        if not self.is_host:
            return Places(params=params, optimizer=optimizer, is_alias=same_dtype and params is optimizer)
        if same_dtype and params.is_on_disk and not optimizer.is_on_disk:
            params = Tier.CPU
        return Places(params=params, optimizer=optimizer, is_alias=same_dtype)

    def _param_tier(self, numel: int) -> Tier:
        tier = self.policy.parameters.tier
        if tier.is_on_disk and self._in_cpu_numel + numel <= self.max_in_cpu_numel:
            self._in_cpu_numel += numel
            return Tier.CPU
        return tier

    def _optimizer_tier(self, numel: int) -> Tier:
        """Off the device as long as at most `ratio` of the elements seen so far are."""
        tier = self.policy.optimizer.tier
        self._optimizer_numel += numel
        if tier is Tier.DEVICE or self._off_device_numel + numel > self.ratio * self._optimizer_numel:
            return Tier.DEVICE
        self._off_device_numel += numel
        return tier

    def is_apart(self, tier: Tier) -> bool:
        """Whether bytes on this tier have to be moved to be used on the device."""
        return tier.is_on_disk or (tier is Tier.CPU and not self.is_host)

    def params(self, tier: Tier, numel: int) -> Rest | None:
        """A rest for a bucket's parameters; None where they rest in the device's memory."""
        if not self.is_apart(tier):
            return None
        return self._make(tier, "params", numel, self.policy.parameters.dtype, self.param_path, self.pins_params)

    def optimizer(self, tier: Tier, kind: str, numel: int, dtype: torch.dtype) -> Rest:
        """A rest for masters, one of the optimizer's states, or gradients. In memory it starts as zeros."""
        return self._make(tier, kind, numel, dtype, self.optimizer_path, self.pins_optimizer)

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Working memory [numel] for a tile, from the nvme store where there is one: aligned as its disk likes it."""
        if self.policy.optimizer.tier.is_on_disk and self.store is not None and self.optimizer_path is not None:
            return self.store(self.optimizer_path).buffer(numel * dtype.itemsize).view(dtype)
        return torch.empty(numel, dtype=dtype, pin_memory=self.pins_optimizer and not self.is_host)

    def _make(self, tier: Tier, kind: str, numel: int, dtype: torch.dtype, path: Path | None, pins: bool) -> Rest:
        if tier.is_on_disk:
            assert path is not None, "the configuration asks for nvme_path"
            assert self.store is not None, "whoever asks for nvme gives a store"
            return OnDisk(self.store(path), kind, numel, dtype)
        if tier is Tier.DEVICE:
            return InMemory(torch.zeros(numel, dtype=dtype, device=self.device))
        if self.is_host:
            return InMemory(torch.zeros(numel, dtype=dtype))
        if self._copies is None:
            self._copies = CopyStream(self.device)
        return OnHost(torch.zeros(numel, dtype=dtype, pin_memory=pins), self._copies)
