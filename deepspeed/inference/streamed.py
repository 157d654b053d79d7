"""Models whose weights rest elsewhere between their uses: on this rank's disk, in main memory, sharded over ranks.

Called by the engine where `zero.stage` is 3. While a model is loaded, each layer is read, quantized and put to rest before the next is
read (`put`); then `start` hands the module to a ZeRO engine without an optimizer, whose hooks bring weights when a layer runs and
read ahead in the order that they learned. What is streamed of a quantized layer are its integers.

Invariant: a rank holds, beside what `zero` says may live, one layer while it loads. Words are those of the model held whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepspeed import comm
from deepspeed.config.zero import ZeroConfig
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.engine.initialize import initialize
from deepspeed.utils.allocator import map_large_blocks
from deepspeed.zero.hooks import ModuleHooks
from deepspeed.zero.init import Init
from deepspeed.zero.quantized_weights import shard

_SECTION = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def _rests_on_disk(zero: ZeroConfig) -> bool:
    return zero.offload_param is not None and zero.offload_param.device == "nvme"


class Streamed:
    """One module's weights at rest. Collective over the ranks of the job, as all of ZeRO is; `before_sending` is called before a layer is sent."""

    def __init__(self, zero: ZeroConfig, dtype: torch.dtype, before_sending: Callable[[], None]) -> None:
        if _rests_on_disk(zero):
            map_large_blocks()
        given = zero.model_dump(mode="json", exclude_unset=True)
        self._config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": given}
        if dtype in _SECTION:
            self._config[_SECTION[dtype]] = {"enabled": True}
        self._context = Init(config_dict_or_path=self._config, dtype=dtype)
        self._context.before_sending = before_sending
        self._engine: DeepSpeedEngine | None = None

    def put(self, layer: nn.Module) -> None:
        """Put a layer's own parameters to rest."""
        self._context.shard(layer)

    def put_quantized(self, layers: list[nn.Module], was_sharded: bool) -> None:
        """Put quantized layers to rest, with the weight that they share."""
        shard(layers, self._context)

    def start(self, module: nn.Module) -> None:
        """Have weights come when they are used. The module is whole in name, and filled."""
        module.requires_grad_(False)
        self._engine = initialize(model=module, config=self._config)[0]

    @property
    def hooks(self) -> ModuleHooks | None:
        """What brings weights, since `start`; None where every rank has all of them."""
        return None if self._engine is None else self._engine._zero.hooks

    def in_step(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of generate with which ranks whose answers are shorter go on until all are done."""
        return {"synced_gpus": True, **kwargs} if comm.get_world_size() > 1 else kwargs

    def release(self) -> None:
        """Take the hooks away."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
