"""Runs of what splits a model, or its bytes on the wire, for a device that is not the CPU; see `test_features.py`.

Every one trains a few steps from the same seed on the device of its engine, and gives losses and weights on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from tests.device.cases import config_of
from tests.engine.runs import engine_of, train
from tests.inference.families import build, prompts
from tests.parallel.expert.models import batches as expert_batches
from tests.parallel.expert.models import set_values
from tests.parallel.expert.runs import ours, whole_names
from tests.parallel.pipeline import models as layers
from tests.parallel.sequence import runs as sequences
from tests.parallel.tensor.models import batch, small

Found = tuple[list[float], dict[str, Tensor]]
STEPS = 3
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def _settings(stage: int, **more: Any) -> dict[str, Any]:
    return config_of(stage, accumulation=1, **{"optimizer": SGD, **more}) | {"optimizer": more.get("optimizer", SGD)}


def _weights(engine: Any) -> dict[str, Tensor]:
    """What this rank holds of each parameter's master."""
    full = deepspeed.utils.safe_get_full_fp32_param
    return {name: full(param).cpu().clone() for name, param in engine.module.named_parameters()}


def _moved(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# The CPU has a fused attention of its own, whose last bits are others than the device's.
@sdpa_kernel(SDPBackend.MATH)
def tensor(rank: int, world_size: int, stage: int) -> Found:
    """A Llama of which two ranks have half each."""
    losses = []
    with engine_of(small("llama"), _settings(stage, tensor_parallel={"autotp_size": 2}, clip=0.5)) as engine:
        for step in range(STEPS):
            loss = engine(**_moved(batch(2, seed=step), engine.device)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, _weights(engine)


@sdpa_kernel(SDPBackend.MATH)
def sequence(rank: int, world_size: int, stage: int) -> Found:
    """A Llama of which both ranks see half of every sequence."""
    model = sequences.tiny_model()
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", 2, micro_batch_size=1)
    losses = []
    try:
        with engine_of(model, _settings(stage) | {"train_micro_batch_size_per_gpu": 1}, mpu=mpu) as engine:
            for step in range(STEPS):
                part = sequences.cut(sequences.batch_of("packed", seed=step), rank, 2)
                group = parallel_state_sp.get_sequence_parallel_group()
                loss = sequences.own_loss(engine, _moved(part, engine.device), "gathered", group)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            return losses, _weights(engine)
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()


def pipeline(rank: int, world_size: int, stage: int, schedule: str = "1f1b", clip: float = 0.5, **more: Any) -> Found:
    """Nine layers on two stages."""
    module = deepspeed.pipe.PipelineModule(layers.mlp(), num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
    section = {"schedule": schedule, **more}
    engine = layers.start(module, layers.config_of(stage, gradient_clipping=clip, pipeline=section))
    found = layers.train(engine)
    engine.destroy()
    return found["losses"], {name: weight.cpu() for name, weight in found["weights"].items()}


def zero_bubble(rank: int, world_size: int, stage: int) -> Found:
    """The same with weight gradients on their own."""
    return pipeline(rank, world_size, stage, "zb-h1")


def taken_back(rank: int, world_size: int, stage: int) -> Found:
    """The same with steps that do not wait for their norm, and that clipping takes back."""
    return pipeline(rank, world_size, stage, "zb-h2", clip=0.05, post_validation=True)


def experts(rank: int, world_size: int, stage: int) -> Found:
    """Layers whose experts two ranks share."""
    model = ours(2, 2, False)
    set_values(model, whole_names(model, 2, rank))
    losses = []
    with engine_of(model, _settings(stage, clip=0.5)) as engine:
        for step in expert_batches(STEPS, world_size):
            loss = engine(*(part.to(engine.device) for part in step[rank]))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, _weights(engine)


def _compressed(rank: int, world_size: int, stage: int, **more: Any) -> Found:
    run = train(rank, world_size, "gpt_tied", _settings(stage, **more))
    return run.losses, run.weights


def one_bit(rank: int, world_size: int, stage: int) -> Found:
    """1-bit Adam that freezes after two steps."""
    kind = {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 2}}
    return _compressed(rank, world_size, stage, optimizer=kind)


def quantized(rank: int, world_size: int, stage: int) -> Found:
    """Weights in int8 and gradients in int4 on the wire."""
    return _compressed(rank, world_size, stage, zero={"zero_quantized_weights": True, "zero_quantized_gradients": True})


FEATURES: dict[str, tuple[Callable[[int, int, int], Found], tuple[int, ...]]] = {
    "tensor": (tensor, (0, 1, 2, 3)),
    "sequence": (sequence, (0, 1, 2, 3)),
    "pipeline": (pipeline, (0, 1, 2, 3)),
    "zero_bubble": (zero_bubble, (1, 3)),
    "taken_back": (taken_back, (0, 2)),
    "experts": (experts, (0, 1, 2, 3)),
    "one_bit": (one_bit, (0, 1)),
    "quantized": (quantized, (3,)),
}
"""Name: the run, and the stages it goes with. `make test-device` runs all of them."""


def generated(rank: int, world_size: int, dtype: str) -> dict[str, Tensor]:
    """Logits and words of an inference engine; weights in a code for `dtype` int8."""
    with sdpa_kernel(SDPBackend.MATH):
        engine = deepspeed.init_inference(build("llama"), dtype=dtype)
        inputs = _moved(prompts("left"), next(engine.parameters()).device)
        logits = engine(**inputs).logits
        words = engine.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"logits": logits.detach().cpu(), "words": words.cpu()}
