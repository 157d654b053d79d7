"""Files and functions by the names of the original's checkpoints, for helpers of other libraries that look for them.

`save` writes the files, Lightning and scripts call the functions through `deepspeed.utils.zero_to_fp32`. Nothing here
is ever read back: the files hold plain values (numbers, strings, containers, tensors), load with
`torch.load(weights_only=True)`, and only repeat what `state.json` and the manifest say.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from deepspeed.checkpoint.files import replace_durably
from deepspeed.checkpoint.manifest import Manifest

SCRIPT = '''#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this folder: zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR [--help]"""

from deepspeed.checkpoint.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''


def model_file_name(zero_stage: int, rank: int = 0, model_rank: int = 0) -> str:
    """The name under which helpers look for the model state of a data-parallel rank, and of a model-parallel one."""
    whose = f"zero_pp_rank_{rank}_" if zero_stage == 3 else ""
    return f"{whose}mp_rank_{model_rank:02d}_model_states.pt"


def optim_file_name(is_bf16: bool, rank: int = 0, model_rank: int = 0) -> str:
    """The name under which helpers look for a rank's optimizer state."""
    return f"{'bf16_' if is_bf16 else ''}zero_pp_rank_{rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def state_files(about: Mapping[str, Any], client_state: Mapping[str, Any], manifest: Manifest) -> dict[str, bytes]:
    """File name -> content. For each model-parallel rank (stages of a pipeline x ranks that share layers) one model file, at
    ZeRO stage 3 one for each data-parallel rank too; from stage 1 on one optimizer file for each rank."""
    stage, model_size = int(about["zero_stage"]), int(about.get("model_parallel_size", 1))
    world_size = int(about["world_size"]) // model_size
    common = {"ds_config": None, "ds_version": about["deepspeed_version"]}
    model = {
        "module": None,
        "buffer_names": list(manifest.tensors.get("buffer", {})),
        "optimizer": None,
        "param_shapes": [{name: list(info.shape) for name, info in manifest.parameters.items() if not info.is_frozen}],
        "frozen_param_shapes": {name: list(info.shape) for name, info in manifest.parameters.items() if info.is_frozen},
        "shared_params": dict(manifest.tied),
        "lr_scheduler": None,
        "sparse_tensor_module_names": list(about.get("sparse", ())),
        "skipped_steps": about["skipped_steps"],
        "global_steps": about["global_steps"],
        "global_samples": about["global_samples"],
        "dp_world_size": world_size,
        "mp_world_size": model_size,
        **common,
        **client_state,
    }
    optim = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": world_size}, **common}
    first, others, states = _dump(model), _dump({**model, **dict.fromkeys(client_state)}), _dump(optim)
    files = {}
    for model_rank in range(model_size):
        files[model_file_name(stage, 0, model_rank)] = first
        for rank in range(world_size if stage > 0 else 0):
            files[optim_file_name(bool(about.get("bf16")), rank, model_rank)] = states
            if stage == 3 and rank > 0:
                files[model_file_name(stage, rank, model_rank)] = others
    return files


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """Only what `torch.load(weights_only=True)` takes: containers rebuilt as dict, list, tuple, set; paths as text."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    kinds: tuple[type[Any], ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, (set, frozenset)):
        return {plain(item) for item in value}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    return [plain(item) for item in value] if hasattr(value, "__iter__") else value


def write_script(folder: Path) -> None:
    """Put `zero_to_fp32.py` beside the checkpoints, unless it is there."""
    path = folder / "zero_to_fp32.py"
    if not path.exists():
        replace_durably(path, SCRIPT.encode())
        path.chmod(0o755)
