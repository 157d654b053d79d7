"""What inference engines answer, for a device that is not the CPU; see `test_answers.py`. Everything is given back on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import deepspeed
from deepspeed.accelerator import get_accelerator
from tests.device.cases import moved
from tests.inference.families import build, prompts
from tests.parallel.expert import hf as experts


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def streamed(rank: int, world_size: int, tier: str, folder: str) -> dict[str, Tensor]:
    """Logits and words of an engine whose weights are on a tier, or sharded over the ranks ("none")."""
    rest = {"device": tier, "pin_memory": True, **({"nvme_path": folder, "max_in_cpu": 0} if tier == "nvme" else {})}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **({"offload_param": rest} if tier != "none" else {})}
    with sdpa_kernel(SDPBackend.MATH):
        engine = deepspeed.init_inference(build("llama"), dtype="fp32", zero=zero)
        inputs = moved(prompts("left"), _device())
        logits = engine(**inputs).logits
        words = engine.generate(**inputs, max_new_tokens=6, do_sample=False)
        engine.destroy()
    return {"logits": logits.detach().cpu(), "words": words.cpu()}


def generated(rank: int, world_size: int, dtype: str) -> dict[str, Tensor]:
    """Logits and words of an inference engine; weights in a code for `dtype` int8."""
    with sdpa_kernel(SDPBackend.MATH):
        engine = deepspeed.init_inference(build("llama"), dtype=dtype)
        inputs = moved(prompts("left"), next(engine.parameters()).device)
        logits = engine(**inputs).logits
        words = engine.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"logits": logits.detach().cpu(), "words": words.cpu()}


def over_ranks(rank: int, world_size: int, dim: str) -> dict[str, Tensor]:
    """Logits and words of a Llama cut over tensor-parallel ranks, or of a Mixtral whose experts ranks share."""
    with sdpa_kernel(SDPBackend.MATH):
        if dim == "tp":
            engine = deepspeed.init_inference(build("llama"), dtype="fp32", tensor_parallel={"tp_size": world_size})
            inputs = moved(prompts("left"), _device())
        else:
            engine = deepspeed.init_inference(
                experts.build("mixtral").eval(), dtype="fp32", moe={"ep_size": world_size}
            )
            inputs = {"input_ids": torch.tensor([[3, 7, 1, 9 + rank][: 3 + rank]], device=_device())}
        logits = engine(**inputs).logits
        words = engine.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        engine.destroy()
    return {"logits": logits.detach().cpu(), "words": words.cpu()}
