"""The porch: import paths that scripts and libraries use, and where the things live here.

`import deepspeed` installs one finder for the paths in the table; nothing else of the package knows them. Each path is
a module whose names are imported at first use. Adding a promised path is adding a line.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from deepspeed.utils.lazy import invert, lazy_exports

_SCHEDULES = (
    "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR VALID_LR_SCHEDULES add_tuning_arguments "
    "get_config_from_args get_lr_from_config"
)
_ESTIMATORS = " ".join(f"estimate_zero{{0}}_model_states_mem_needs{kind}" for kind in ("", "_all_live", "_all_cold"))

PATHS: dict[str, dict[str, str]] = {
    "deepspeed.runtime": {},
    "deepspeed.runtime.engine": invert({"deepspeed.engine.engine": "DeepSpeedEngine"}),
    "deepspeed.runtime.config": invert(
        {"deepspeed.config.legacy_config": "DeepSpeedConfig", "deepspeed.utils.errors": "DeepSpeedConfigError"}
    ),
    "deepspeed.runtime.base_optimizer": invert({"deepspeed.zero.optimizer": "DeepSpeedOptimizer"}),
    "deepspeed.runtime.lr_schedules": invert({"deepspeed.optim.schedules": _SCHEDULES}),
    "deepspeed.runtime.dataloader": invert({"deepspeed.engine.data": "DeepSpeedDataLoader RepeatingLoader"}),
    "deepspeed.runtime.utils": invert(
        {"deepspeed.accelerator.memory": "see_memory_usage", "deepspeed.utils.nested": "move_to_device"}
    ),
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": {"*": "deepspeed.activation:"},
    "deepspeed.runtime.zero": {},
    "deepspeed.runtime.zero.partition_parameters": {
        **invert(
            {
                "deepspeed.zero.init": "Init",
                "deepspeed.zero.access": "GatheredParameters register_external_parameter unregister_external_parameter",
                "deepspeed.zero.param": "ZeroParamStatus",
                "deepspeed.accelerator": "get_accelerator",
                "deepspeed.zero.tensor_factories": "zero_wrapper_for_fp_tensor_constructor _orig_torch_arange",
            }
        )
    },
    "deepspeed.runtime.zero.offload_config": invert({"deepspeed.zero.away": "OffloadDeviceEnum OffloadStateTypeEnum"}),
    "deepspeed.runtime.zero.stage_1_and_2": {
        "DeepSpeedZeroOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
        **invert({"deepspeed.memory.model_states": _ESTIMATORS.format(2)}),
    },
    "deepspeed.runtime.zero.stage3": {
        "DeepSpeedZeroOptimizer_Stage3": "deepspeed.zero.optimizer:ZeroOptimizer",
        **invert({"deepspeed.memory.model_states": _ESTIMATORS.format(3)}),
    },
    "deepspeed.runtime.zero.parameter_offload": {
        "DeepSpeedZeRoOffload": "deepspeed.zero.parameter_offload:ParameterOffload"
    },
    "deepspeed.runtime.zero.tiling": invert({"deepspeed.zero.tiled": "TiledLinear TiledLinearReturnBias"}),
    "deepspeed.runtime.zero.muon": {},
    "deepspeed.runtime.zero.muon.original_muon": invert({"deepspeed.optim.muon": "Muon MuonWithAuxAdam"}),
    "deepspeed.checkpoint.utils": invert({"deepspeed.utils.nested": "clone_tensors_for_torch_save"}),
    "deepspeed.ops": {"__compatible_ops__": "deepspeed.utils.compatible_ops:COMPATIBLE"},
    "deepspeed.ops.adam": invert({"deepspeed.optim": "FusedAdam DeepSpeedCPUAdam"}),
    "deepspeed.ops.lamb": invert({"deepspeed.optim": "FusedLamb"}),
    "deepspeed.ops.lion": invert({"deepspeed.optim": "FusedLion DeepSpeedCPULion"}),
    "deepspeed.ops.adagrad": invert({"deepspeed.optim": "DeepSpeedCPUAdagrad"}),
    "deepspeed.ops.aio": invert({"deepspeed.op_builders": "AsyncIOBuilder GDSBuilder"}),
    "deepspeed.ops.op_builder": {"*": "deepspeed.op_builders:"},
    "deepspeed.ops.op_builder.all_ops": invert({"deepspeed.op_builders": "ALL_OPS"}),
    "deepspeed.profiling.flops_profiler": invert({"deepspeed.profiling.profiler": "FlopsProfiler get_model_profile"}),
    "deepspeed.profiling.flops_profiler.profiler": {"*": "deepspeed.profiling.profiler:"},
    "deepspeed.monitor.monitor": invert(
        {"deepspeed.monitor.master": "MonitorMaster", "deepspeed.monitor.backend": "Monitor"}
    ),
    "deepspeed.monitor.config": {
        **invert({"deepspeed.monitor.master": "get_monitor_config"}),
        "DeepSpeedMonitorConfig": "deepspeed.config:Config",
    },
    "deepspeed.utils.zero_to_fp32": {"*": "deepspeed.checkpoint.zero_to_fp32:"},
    "deepspeed.utils.groups": {"*": "deepspeed.mesh.groups:"},
}


class _Porch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the paths of the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in PATHS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=not PATHS[fullname] or _has_children(fullname))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        whole = PATHS[spec.name].get("*")
        return importlib.import_module(whole.rstrip(":")) if whole else None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        if module.__name__ not in PATHS:
            return
        names: dict[str, str] = dict(PATHS[module.__name__])
        prefix = module.__name__ + "."
        names |= {path.removeprefix(prefix): path + ":" for path in PATHS if path.startswith(prefix)}
        get, listing = lazy_exports(module.__name__, names)
        module.__dict__.update(__getattr__=get, __dir__=listing)


def _has_children(path: str) -> bool:
    return any(other.startswith(path + ".") for other in PATHS)


def install() -> None:
    """Make the table's paths importable; once."""
    if not any(isinstance(finder, _Porch) for finder in sys.meta_path):
        sys.meta_path.append(_Porch())


def names() -> dict[str, Any]:
    """The table's top-level packages under `deepspeed`, for its lazy attributes."""
    return {path.split(".")[1]: ".".join(path.split(".")[:2]) + ":" for path in PATHS if path.count(".") == 1}
