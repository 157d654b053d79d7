"""Adapters of PEFT over tensor-parallel ranks: before the cut they are cut with their layers, after it they are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.harness import run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")
pytest.importorskip("peft")
LATER = "Put adapters on, or load them, before the model is cut"


def adapted(family: str = "llama", **changes: Any) -> Any:
    import peft

    asked = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "init_lora_weights": False,
        **changes,
    }
    torch.manual_seed(1)
    return peft.get_peft_model(build(family), peft.LoraConfig(**asked)).eval()


def prepared(model: Any, size: int) -> Any:
    return deepspeed.init_inference(model, dtype="fp32", tensor_parallel={"tp_size": size})


def worst(engine: Any, plain: Any) -> float:
    batch = prompts("left")
    with torch.no_grad():
        return float((engine(**batch).logits - plain(**batch).logits).abs().max())


def before(rank: int, world_size: int) -> list[float]:
    """Differences from the whole model: as it is, of a second adapter, merged, unmerged, without adapters."""
    import peft

    plain = adapted()
    plain.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    engine = prepared(copy.deepcopy(plain), world_size)
    both, found = (engine.module, plain), []

    def compare(*methods: str, **kwargs: Any) -> None:
        for model in both:
            for method in methods:
                getattr(model, method)(*kwargs.values())
        found.append(worst(engine, plain))

    compare()
    compare("set_adapter", adapter="other")
    compare("merge_adapter")
    compare("unmerge_adapter")
    with engine.module.disable_adapter(), plain.disable_adapter():
        compare()
    found.append(worst(engine.module.merge_and_unload(), plain.merge_and_unload()))
    return found


def test_adapters_that_are_there_are_cut_and_switched_merged_and_unmerged() -> None:
    for found in run_ranks(2, before, timeout=120):
        assert max(found) < 1e-5, found


def after(rank: int, world_size: int, folder: str) -> None:
    import peft

    asked = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    engine = prepared(build("llama"), world_size)
    with pytest.raises(DeepSpeedError, match=LATER):
        peft.get_peft_model(engine.module, asked)
    with pytest.raises(DeepSpeedError, match=LATER):
        peft.PeftModel.from_pretrained(engine.module, folder)
    assert worst(engine, build("llama")) < 1e-5
    has_one = prepared(adapted(), world_size)
    with pytest.raises(DeepSpeedError, match=r"another adapter for .*q_proj, whose layer is cut"):
        has_one.module.add_adapter("other", asked)
    experts = adapted("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(DeepSpeedConfigError, match="adapters around its parameters"):
        prepared(experts, world_size)


def test_adapters_that_come_later_are_refused_by_name(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    run_ranks(2, after, str(tmp_path), timeout=120)
