"""`zero.Init`: build a model that never stands whole on any rank.

Entered by users and by Transformers around a model's construction. Each module is cut when its construction is over:
for a child that is when its parent registers it, for the outermost when the context ends. Torch's own registration
hooks tell us; no constructor, no tensor factory and no `nn.Module` method is replaced, so dtypes of buffers (rotary
frequencies) stay what the model made them.

Code that initialises weights after a child was registered (`self.apply(init)`, `child.weight.data.normal_()`) meets a
sharded parameter; inside the context that gathers it, and the first rank's new values are kept.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config, load_config
from deepspeed.mesh import data_parallel_mesh
from deepspeed.tiers import Rest, Tier
from deepspeed.utils.logging import warn_once
from deepspeed.zero import param as zero_param
from deepspeed.zero.bucket import Bucket, num_views
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.param import slot_of
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import policy_of_stage
from deepspeed.zero.tiers_from_config import make_placing, open_on_all_ranks, param_tier


class Init:
    """Context manager: parameters of every module built inside are sharded over the data-parallel ranks.

    module: shard this existing module at once (the context then does nothing more).
    config_dict_or_path: a DeepSpeed configuration; its fp16/bf16 sections give the dtype. "auto" values are tolerated.
    dtype: dtype of the parameters; overrides the configuration. Default without either: fp16 where the device computes
        in it, else bf16.
    enabled: False makes the context inert.
    data_parallel_group: shard over this process group instead of all ranks.
    Collective: all ranks build the same modules. Raises ValueError for contradictory groups.
    """

    _active: ClassVar[list[Init]] = []

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        if data_parallel_group is not None and sequence_data_parallel_group is not None:
            raise ValueError("give data_parallel_group or sequence_data_parallel_group, not both")
        _tell_who_decides(
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
        )
        comm.init_distributed()
        given = config_dict_or_path if config_dict_or_path is not None else config
        self.dtype = _param_dtype(dtype, given)
        self._device = torch.device(get_accelerator().current_device_name())
        self._placing = _make_placing(given, remote_device, pin_memory, self.dtype, self._device)
        group = data_parallel_group or sequence_data_parallel_group
        self._mesh = data_parallel_mesh(mpu if group is None else None, group=group)
        weakref.finalize(self, self._mesh.release).atexit = False
        if self._placing.policy.parameters.tier.is_on_disk and self._placing.param_path is not None:
            open_on_all_ranks(
                load_config(given) if given is not None else Config(), self._mesh, {self._placing.param_path: 0}
            )
        self._exchange = self._mesh.exchange(self._placing.policy.parameters.sharded_over, "gather", self._device)
        self.before_sending: Callable[[], None] | None = None
        """Called before each collective of `shard`: whatever fails before it failed on this rank alone."""
        self._seen: dict[nn.Module, None] = {}
        self._touched: dict[Bucket, int] = {}
        """Buckets that initialisation code made whole, with the number of views of each that are ours."""
        self._handles: list[Any] = []
        if module is not None:
            for inner in module.modules():
                self.shard(inner)

    def __enter__(self) -> Init:
        if self.enabled:
            self._handles = [
                register_module_parameter_registration_hook(self._saw_param),
                register_module_module_registration_hook(self._saw_child),
            ]
            zero_param.add_resolver(self._touch)
            zero_param.add_adopter(self._adopt)
            Init._active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.enabled or self not in Init._active:
            return
        self._suspend()
        if kind is None:
            self._reshard_touched()
            for module in self._seen:
                self.shard(module)
        self._seen.clear()

    def _suspend(self) -> None:
        for handle in self._handles:
            handle.remove()
        zero_param.remove_resolver(self._touch)
        zero_param.remove_adopter(self._adopt)
        Init._active.remove(self)

    @classmethod
    def suspend_all(cls) -> None:
        """End every active context, cutting what was built; `initialize` is often called inside of one."""
        for context in reversed(list(cls._active)):
            context.__exit__(None, None, None)

    def _saw_param(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        self._seen[module] = None

    def _saw_child(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        self._reshard_touched()
        if child is not None:
            for module in child.modules():
                self.shard(module)  # one that was copied has registered nothing
                self._seen.pop(module, None)

    @torch.no_grad()
    def _adopt(self, param: nn.Parameter, name: str) -> None:
        """A constructor has copied a sharded parameter: shard the copy."""
        self._make_bucket(name.rpartition(".")[0], [(name.rpartition(".")[2], param)], param.dtype)

    @torch.no_grad()
    def shard(self, module: nn.Module) -> None:
        """Shard the parameters that `module` owns itself, as one bucket; those that are sharded already, or on meta, stay. Collective."""
        own = [
            (name, param)
            for name, param in module.named_parameters(recurse=False)
            if slot_of(param) is None and not param.is_meta
        ]
        for kind in (True, False):
            named = [(name, param) for name, param in own if param.is_floating_point() is kind]
            if named:
                self._make_bucket(type(module).__name__, named, self.dtype if kind else named[0][1].dtype)

    def _make_bucket(self, where: str, named: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        params = [param for _, param in named]
        values = [param.data for param in params]
        layout = BucketLayout(tuple(value.numel() for value in values), (-1,) * len(values), self._exchange.world_size)
        bucket = Bucket(
            -1,
            params,
            [f"{where}.{name}" for name, _ in named],
            [value.shape for value in values],
            layout,
            is_sharded=True,
            dtype=dtype,
            device=self._device,
            exchange=self._exchange,
            rest=self._rest(layout.shard_numel, dtype),
        )
        self._mesh.num_users += 1
        weakref.finalize(bucket, self._mesh.release).atexit = False
        torch._foreach_copy_(bucket.views, values)
        if self.before_sending is not None:
            self.before_sending()
        self._exchange.broadcast(bucket.full)
        bucket.adopt()
        bucket.reshard()

    def _rest(self, numel: int, dtype: torch.dtype) -> Rest | None:
        if dtype != self.dtype:
            return None
        return self._placing.params(self._placing.decide(numel, is_sharded=True, trains=False).params, numel)

    def _touch(self, bucket: Bucket, func: Callable[..., Any]) -> bool:
        self._reshard_touched(only_unused=True)
        bucket.unshard()
        self._touched.setdefault(bucket, num_views(bucket))
        return True

    @torch.no_grad()
    def _reshard_touched(self, only_unused: bool = False) -> None:
        """Reshard what initialisation code touched, with the first rank's values; or of that, what it let go of."""
        for bucket, num_own_views in list(self._touched.items()):
            is_viewed = num_views(bucket) > num_own_views
            if bucket.holders or (only_unused and is_viewed):
                continue
            del self._touched[bucket]
            if not bucket.is_unsharded:
                continue
            bucket.take_assigned(bucket.assigned())
            self._exchange.broadcast(bucket.full)
            bucket.write_shard()
            if is_viewed:
                bucket.leave_full()
            bucket.reshard()


MiCS_Init = Init
"""MiCS is ZeRO with replicas (`mics_shard_size`), which `Init` reads from the configuration."""


def _make_placing(
    given: Any, remote_device: str | None, pin_memory: bool, dtype: torch.dtype, device: torch.device
) -> Placing:
    """The configuration's placing of parameters, or what `remote_device` and `pin_memory` say over it."""
    config = load_config(given) if given is not None else Config()
    tier = Tier(remote_device) if remote_device in ("cpu", "nvme") else param_tier(config)
    placing = make_placing(config, policy_of_stage(3, param_dtype=dtype, param_tier=tier), device)
    if tier.is_on_disk and placing.param_path is None:
        raise ValueError(
            'zero.Init(remote_device="nvme") needs to know where.\n'
            '  Give a configuration with "offload_param": {"device": "nvme", "nvme_path": ...}.'
        )
    return dataclasses.replace(placing, pins_params=placing.pins_params or pin_memory)


def _tell_who_decides(**asked: bool) -> None:
    """Warn of what is a step's, not a context's: outside of a step parameters are exact."""
    for name, is_asked in asked.items():
        if is_asked:
            warn_once(
                f"zero.Init({name}=True) has no effect by itself: the configuration that initialize gets decides.\n"
                f'  Set "zero_optimization": {{"{name}": true}} there.'
            )


def _param_dtype(dtype: torch.dtype | None, config: Any) -> torch.dtype:
    if dtype is not None:
        return dtype
    if config is not None:
        return load_config(config).precision_dtype
    return torch.float16 if get_accelerator().is_fp16_supported() else torch.bfloat16
