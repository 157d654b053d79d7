"""What `deepspeed.git_version_info` says: the version, and what torch and the machine bring."""

from __future__ import annotations

import torch

import deepspeed.utils.compatible_ops as _ops
from deepspeed.accelerator import get_accelerator

installed_ops: dict[str, bool] = dict(_ops.COMPATIBLE)
compatible_ops: dict[str, bool] = dict(_ops.COMPATIBLE)
accelerator_name: str = get_accelerator().name
git_hash: str | None = None
git_branch: str | None = None
torch_info: dict[str, str | bool] = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "bf16_support": get_accelerator().is_bf16_supported(),
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": "0.0",
    "hip_version": torch.version.hip or "0.0",
}
"""As the original writes it at its installation; "0.0" for what torch was built without."""
TORCH_MAJOR, TORCH_MINOR = (int(part) for part in torch.__version__.split(".")[:2])
