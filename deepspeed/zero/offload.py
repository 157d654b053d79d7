"""From the configuration's offload sections to placings: which tier, which folder, pinned or not.

Called by the engine and by `zero.Init`, which share the nvme stores of a process: parameters that Init put on disk are
taken from there bucket by bucket.
"""

from __future__ import annotations

import functools
import weakref
from pathlib import Path

import torch

from deepspeed import comm
from deepspeed.config import Config
from deepspeed.tiers import Tier
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.tiers.swap_folder import SwapFolder
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
