"""Functions of a few lines that scripts import from the original's inside.

Each answers what its name says for data-parallel training; what only makes sense with a feature of a later version is
a placeholder instead. Called by scripts alone.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.optim.traits import Needs, needs_of
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import current_rank

inf = float("inf")


def set_random_seed(seed: int) -> None:
    """Seed the generators of Python, numpy (where it is installed) and torch, on every device."""
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)


def noop_context() -> contextlib.nullcontext[None]:
    """A context that does nothing."""
    return contextlib.nullcontext()


graph_process = noop_context


def get_ma_status() -> int:
    """Bytes allocated on the device; 0 on ranks other than the first."""
    return 0 if current_rank() else get_accelerator().memory_allocated()


def empty_cache() -> None:
    """Give cached device memory back, and forget the peak."""
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def is_model_parallel_parameter(p: Any) -> bool:
    """Whether a parameter is marked as cut over model-parallel ranks."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def bwc_tensor_model_parallel_rank(mpu: Any = None) -> int:
    """The model-parallel rank that an `mpu` tells, under any of its names; 0 without one."""
    for name in ("get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 0


def align_dense_tensors(tensor_list: Sequence[Tensor], alignment: int) -> list[Tensor]:
    """The tensors, and one of zeros after them where their elements are no multiple of `alignment`."""
    missing = -sum(tensor.numel() for tensor in tensor_list) % alignment
    tensors = list(tensor_list)
    return [*tensors, tensors[0].new_zeros(missing)] if missing else tensors


def is_zero_param(parameter: Any) -> bool:
    """Whether ZeRO stage 3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def is_zero_supported_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ZeRO knows that the optimizer can be given pieces of parameters."""
    return isinstance(needs_of(optimizer), Needs)


def apply_to_tensors_only(function: Callable[[Tensor], Any], value: Any, warning_msg_fn: Any = None) -> Any:
    """`value` with `function` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [apply_to_tensors_only(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: apply_to_tensors_only(function, item) for key, item in value.items()}
    return value


def detach_variable(inputs: Any, device: Any = None) -> Any:
    """Tensors of a tuple cut off from the graph, which ask for a gradient as before; moved to `device` where given."""
    if isinstance(inputs, Tensor):
        cut = inputs.detach() if device is None else inputs.to(device).detach()
        return cut.requires_grad_(inputs.requires_grad)
    return tuple(detach_variable(item, device) if isinstance(item, Tensor) else item for item in inputs)


def iter_params(module: nn.Module, recurse: bool = False) -> Iterator[nn.Parameter]:
    """The module's parameters."""
    return module.parameters(recurse)


def dict_raise_error_on_duplicate_keys(ordered_pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.load(object_pairs_hook=...)`: the pairs as a dict. Raises DeepSpeedConfigError (a ValueError) for a key twice."""
    keys = [key for key, _ in ordered_pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise DeepSpeedConfigError(f"the configuration gives keys twice: {', '.join(repeated)}.\n  Keep one of each.")
    return dict(ordered_pairs)


def get_files(dir: str | Path) -> list[str]:
    """Every file below a folder."""
    return [os.path.join(root, name) for root, _, names in os.walk(dir) for name in names]


def get_files_with_prefix(all_files: Sequence[str], prefix: str) -> list[str]:
    """Those of the paths whose file name begins with `prefix`, sorted."""
    return sorted(path for path in all_files if os.path.basename(path).startswith(prefix))


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where the original's checkpoints keep a model-parallel rank's module."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt")


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """Where the original's checkpoints keep a pipeline layer."""
    return os.path.join(base_folder, f"{layer_id}-model_{tp_rank:02d}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where the original's checkpoints keep a rank's optimizer shard."""
    return os.path.join(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def enable_universal_checkpoint(param_list: Any) -> None:
    """Nothing to do: every checkpoint here is stored by parameter name and interval."""


def is_compiling() -> bool:
    """Whether torch.compile traces the caller."""
    return torch.compiler.is_compiling()


def disable(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`, left out of compiled graphs."""
    return torch.compiler.disable(func)


def autocast_if_enabled(engine: Any) -> Any:
    """The engine's `torch_autocast`, or a context that does nothing."""
    section = engine._config.torch_autocast
    if not section.enabled:
        return contextlib.nullcontext()
    return torch.autocast(get_accelerator().device_name(), dtype=section.dtype or torch.bfloat16)


def _is_even(x: int) -> bool:
    return x % 2 == 0


def _is_odd(x: int) -> bool:
    return x % 2 != 0


def shutdown_init_context() -> None:
    """Leave every open `zero.Init`: nothing is patched here, so there is nothing to undo."""


class Names:
    """Names of a model's parameters and modules, for `deepspeed.utils.debug`."""

    of: ClassVar[dict[int, str]] = {}


def debug_extract_module_and_param_names(model: nn.Module) -> None:
    """Remember the model's names for the two functions below."""
    Names.of = {id(part): name for name, part in (*model.named_modules(), *model.named_parameters())}


def debug_module2name_id(module: nn.Module) -> str:
    """ "name=..." of a module of the model last seen; "unknown" for others."""
    return f"name={Names.of.get(id(module), 'unknown')}"


def debug_param2name_id(param: nn.Parameter) -> str:
    """ "name=... id=..." of a parameter of the model last seen."""
    return f"name={Names.of.get(id(param), 'unknown')} id={getattr(param, 'ds_id', 'none')}"
