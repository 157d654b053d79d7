"""From the configuration's offload sections to placings: which tier, which folder, pinned or not.

Called by the engine and by `zero.Init`, which share the nvme stores of a process: parameters that Init put on disk are
taken from there bucket by bucket.
"""

from __future__ import annotations

import functools
import os
import socket
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from deepspeed import comm
from deepspeed.config import Config
from deepspeed.mesh import Mesh
from deepspeed.tiers import Tier
from deepspeed.tiers.nvme import NvmeStore, failures_as_one
from deepspeed.tiers.swap_folder import SwapFolder
from deepspeed.utils.errors import TierError
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import ZeroPolicy

_stores: weakref.WeakValueDictionary[Path, NvmeStore] = weakref.WeakValueDictionary()


def open_store(config: Config, path: Path) -> NvmeStore:
    """The store of a folder: one per process, alive as long as bytes rest in it."""
    path = path.resolve()
    store = _stores.get(path)
    if store is None:
        store = _stores[path] = NvmeStore(SwapFolder(path, comm.get_rank()), config.aio)
    return store


def open_on_all_ranks(config: Config, mesh: Mesh, needed: Mapping[Path, int]) -> None:
    """Open the stores that the configuration names, and see that `needed` bytes of this rank fit each. Collective.

    Raises TierError on every rank if a folder cannot be used on one, or the disk is too small for the ranks on it.
    """
    found: list[tuple[str, str, int, int]] = []
    failure: str | None = None
    for path, nbytes in needed.items():
        try:
            open_store(config, path)
            disk = os.statvfs(path)
            found.append(
                (f"{socket.gethostname()}:{os.stat(path).st_dev}", str(path), nbytes, disk.f_bavail * disk.f_frsize)
            )
        except OSError as error:
            failure = failure or str(error)
    if mesh.size("job") > 1:
        everyone = mesh.gather_objects("job", (failure, found))
    else:
        everyone = [(failure, found)]
    message = failures_as_one({rank: failure for rank, (failure, _) in enumerate(everyone)})
    if message:
        raise TierError(message)
    disks: dict[str, list[tuple[str, int, int]]] = {}
    for _, theirs in everyone:
        for disk_id, name, nbytes, free in theirs:
            disks.setdefault(disk_id, []).append((name, nbytes, free))
    for shares in disks.values():
        wanted, free = sum(nbytes for _, nbytes, _ in shares), min(free for _, _, free in shares)
        if wanted > free:
            raise TierError(
                f"nvme_path {shares[0][0]}: the offloaded states of {len(shares)} rank(s) need {wanted} bytes there, which "
                f"needs {wanted - free} more than the {free} that are free.\n"
                "  Free space on that disk, name another nvme_path, or offload less."
            )


def bytes_on_disk(placing: Placing, numel: int, trained: int, states: Iterable[torch.dtype]) -> dict[Path, int]:
    """About what one rank's share of a model takes on each disk: `numel` parameters, of which `trained` are trained."""
    policy = placing.policy
    param, optimizer = policy.parameters, policy.optimizer
    needed: dict[Path, int] = {}
    is_alias = param.dtype == optimizer.dtype
    if param.tier.is_on_disk and placing.param_path is not None and not (is_alias and not optimizer.tier.is_on_disk):
        needed[placing.param_path] = max(0, numel - placing.max_in_cpu_numel) * param.dtype.itemsize
    if optimizer.tier.is_on_disk and placing.optimizer_path is not None:
        of_each = sum(dtype.itemsize for dtype in states) + policy.gradients.dtype.itemsize
        of_each += 0 if is_alias else optimizer.dtype.itemsize
        nbytes = int(trained * placing.ratio) * of_each
        needed[placing.optimizer_path] = needed.get(placing.optimizer_path, 0) + nbytes
    return needed


def param_tier(config: Config) -> Tier:
    """Where parameters rest; only stage 3 shards, and so offloads, them."""
    zero = config.zero_optimization
    if zero.stage < 3 or zero.offload_param is None or zero.offload_param.device == "none":
        return Tier.DEVICE
    return Tier(zero.offload_param.device)


def optimizer_tier(config: Config) -> Tier:
    """Where masters, states and gradients rest; stage 0 shards nothing and offloads nothing."""
    zero = config.zero_optimization
    if zero.stage == 0 or zero.offload_optimizer is None or zero.offload_optimizer.device == "none":
        return Tier.DEVICE
    return Tier(zero.offload_optimizer.device)


def make_placing(config: Config, policy: ZeroPolicy, device: torch.device) -> Placing:
    """What decides where each bucket's bytes rest."""
    param, optimizer = config.zero_optimization.offload_param, config.zero_optimization.offload_optimizer
    return Placing(
        policy=policy,
        device=device,
        param_path=param.nvme_path if param else None,
        optimizer_path=optimizer.nvme_path if optimizer else None,
        store=functools.partial(open_store, config),
        pins_params=param is not None and param.pin_memory,
        pins_optimizer=optimizer is not None and optimizer.pin_memory,
        max_in_cpu_numel=param.max_in_cpu if param else 0,
        ratio=optimizer.ratio if optimizer else 1.0,
    )
