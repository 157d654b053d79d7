"""A model that ZeRO shards generates on parameters that are gathered once, while each rank does what it likes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.zero.param import buckets_of
from tests.harness import run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")


def generate(rank: int, world_size: int) -> dict[str, Any]:
    """Words inside of the context, gathers in it, and a step after it, beside plain PyTorch."""
    plain = build("llama")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=copy.deepcopy(plain), config=config)
    gathers: list[int] = []
    buckets = buckets_of(engine.module.parameters())
    for exchange in {id(bucket.exchange): bucket.exchange for bucket in buckets}.values():
        start = exchange.start_all_gather

        def counted(*args: Any, start: Any = start, **kwargs: Any) -> Any:
            gathers.append(1)
            return start(*args, **kwargs)

        exchange.start_all_gather = counted
    length = 4 + 5 * rank
    batch = prompts("left")
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False}
    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        with deepspeed.zero.unwrap_model_for_generation(engine):
            words = module.generate(**batch, **options)
        module.generate(**batch, **options)
    found: dict[str, Any] = {
        "same": torch.equal(words, plain.generate(**batch, **options)),
        "gathers": len(gathers) / len(buckets),
    }
    loss = engine(**batch, labels=batch["input_ids"]).loss
    engine.backward(loss)
    engine.step()
    ours = plain(**batch, labels=batch["input_ids"]).loss
    ours.backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    found["loss"] = float((loss - ours).detach().abs())
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        pairs = zip(engine.module.parameters(), plain.parameters(), strict=True)
        found["weights"] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    found["sharded"] = all(param.numel() == 0 or hasattr(param, "ds_id") for param in engine.module.parameters())
    return found


def test_parameters_are_gathered_once_and_ranks_finish_at_different_lengths() -> None:
    for found in run_ranks(2, generate, timeout=300):
        assert found["same"] and found["sharded"]
        assert found["gathers"] == 1
        assert found["loss"] < 1e-6 and found["weights"] < 1e-6


def test_what_is_not_sharded_is_yielded_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    with deepspeed.zero.unwrap_model_for_generation(model) as module:
        assert module is model
    with pytest.raises(ValueError, match="unwrap_model_for_generation got a str"):
        with deepspeed.zero.unwrap_model_for_generation("model"):
            pass
