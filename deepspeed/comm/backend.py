"""The compressed all-reduce as an object, for scripts that call it by the original's names.

`deepspeed.runtime.comm.compressed.CompressedBackend`, and the same under `nccl`, `mpi` and `hccl`: whatever the name says, messages go
through torch.distributed. The arithmetic is `comm.onebit`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.onebit import SignReduction, padded_numel
from deepspeed.utils.errors import DeepSpeedError


class CompressedBackend:
    """A compressed all-reduce over an mpu's data-parallel group, or over all ranks."""

    def __init__(self, mpu: Any = None) -> None:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        group = world if mpu is None else mpu.get_data_parallel_group()
        self._signs = SignReduction(group if group is not None and group.size() > 1 else None)
        self.size, self.rank = self._signs.world_size, self._signs.rank

    def compressed_allreduce(
        self, buffer_m: Tensor, worker_error: Tensor, server_error: Tensor, local_rank: int = 0
    ) -> Tensor:
        """Replace `buffer_m` by its compressed mean over ranks and return it; the errors (1-D, fp32, [padded] and
        [padded / ranks]) are carried on. `local_rank` has no effect. Collective. What is not finite stays in the errors for ever,
        so look before. Raises DeepSpeedError for errors that do not fit, and for integers."""
        if (
            not buffer_m.is_floating_point()
            or worker_error.dtype != torch.float32
            or server_error.dtype != torch.float32
        ):
            raise DeepSpeedError(
                f"compressed_allreduce: a buffer of {buffer_m.dtype} with errors of {worker_error.dtype} and {server_error.dtype}.\n"
                "  Give a floating-point buffer, and errors of torch.float32."
            )
        padded = padded_numel(worker_error.numel(), self.size)
        fits = worker_error.numel() == padded and server_error.numel() * self.size == padded >= buffer_m.numel()
        if not fits:
            needed = padded_numel(buffer_m.numel(), self.size)
            raise DeepSpeedError(
                f"compressed_allreduce: worker_error has {worker_error.numel()} elements and server_error {server_error.numel()}, for "
                f"a buffer of {buffer_m.numel()} on {self.size} ranks.\n"
                f"  Make them of {needed} and {needed // self.size} zeros."
            )
        flat = buffer_m.view(-1) if buffer_m.is_contiguous() else buffer_m.reshape(-1)
        self._signs.average([flat], [worker_error], [server_error])
        if flat.data_ptr() != buffer_m.data_ptr():
            buffer_m.copy_(flat.view_as(buffer_m))
        return buffer_m
