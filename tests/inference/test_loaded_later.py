"""Whole weights that come into a quantized or cut model once it is there: what `load_state_dict` and `load_checkpoint` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.moe.layer import MoE
from tests.harness import run_alone, run_ranks
from tests.inference.families import build, prompts

pytest.importorskip("transformers")


def trained(family: str, **sizes: Any) -> Any:
    """A model of the family with other values."""
    model = build(family, **sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.02)
    return model


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", {"hidden_size": 96}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {"n_inner": 48}), ("t5", {})],
    ids=["fused", "tied", "transposed", "encoder"],
)
def test_a_state_dict_is_quantized_as_it_is_loaded(family: str, sizes: dict[str, Any], dtype: str) -> None:
    engine = deepspeed.init_inference(build(family, **sizes), dtype=dtype)
    batch = prompts("left") if family != "t5" else prompts()
    engine.generate(**batch, max_new_tokens=4)
    engine.module.load_state_dict(trained(family, **sizes).state_dict())
    wanted = deepspeed.init_inference(trained(family, **sizes), dtype=dtype)
    assert torch.equal(
        engine.generate(**batch, max_new_tokens=8, output_scores=True, return_dict_in_generate=True).scores[-1],
        wanted.generate(**batch, max_new_tokens=8, output_scores=True, return_dict_in_generate=True).scores[-1],
    )


def test_a_shape_or_a_value_that_does_not_go_is_named_and_its_layer_stays() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="int8")
    name = "model.layers.0.mlp.down_proj"
    before = engine.module.get_submodule(name).weight.clone()
    state = trained("llama").state_dict()
    values = state[f"{name}.weight"]
    state[f"{name}.weight"] = values[:, :32]
    with pytest.raises(
        RuntimeError, match=r"down_proj.weight is \[48, 32\] in what is loaded, and \[48, 64\] here, quant"
    ):
        engine.module.load_state_dict(state)
    state[f"{name}.weight"] = values.masked_fill(torch.eye(48, 64).bool(), float("nan"))
    with pytest.raises(RuntimeError, match=r"down_proj.weight: a weight \[48, 64\] holds NaN or infinity"):
        engine.module.load_state_dict(state)
    assert torch.equal(engine.module.get_submodule(name).weight, before)


def over_ranks(rank: int, world_size: int, asked: dict[str, Any], family: str) -> None:
    engine = deepspeed.init_inference(build(family), **asked)
    engine.module.load_state_dict(trained(family).state_dict())
    wanted = deepspeed.init_inference(trained(family), **asked)
    assert torch.equal(engine(**prompts("left")).logits, wanted(**prompts("left")).logits)
    engine.module.load_state_dict(engine.module.state_dict())
    assert torch.equal(engine(**prompts("left")).logits, wanted(**prompts("left")).logits)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_each_rank_takes_its_part_of_a_whole_state_dict(dtype: str, family: str) -> None:
    run_ranks(2, over_ranks, {"dtype": dtype, "tp": {"tp_size": 2}}, family)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_each_rank_takes_its_experts_of_a_whole_state_dict(family: str) -> None:
    run_ranks(2, over_ranks, {"dtype": "int8", "moe": {"ep_size": 2}}, family)


def listed_experts(rank: int, world_size: int) -> None:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        made = MoE(16, torch.nn.Linear(16, 16), num_experts=4, k=1, use_residual=False, eval_capacity_factor=4.0).eval()
        with torch.no_grad():
            for param in made.parameters():
                param.normal_()
        return made

    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    engine = deepspeed.init_inference(model(0), dtype="fp32", moe={"ep_size": 2})
    engine.module.load_state_dict(model(1).state_dict())
    assert (engine(x)[0] - model(1)(x)[0]).abs().max() < 1e-5


def test_each_rank_takes_its_experts_of_a_list() -> None:
    run_ranks(2, listed_experts)


def test_weights_that_are_streamed_take_a_whole_state_dict() -> None:
    run_ranks(2, over_ranks, {"dtype": "int8", "zero": {"stage": 3}}, "llama")


def from_a_checkpoint(*ranks: int, folder: str, stage: int, key: str) -> None:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    source = deepspeed.initialize(model=trained("llama"), config=config)[0]
    source.save_checkpoint(folder)
    spec = {"num_bits": 8, "group_size": 16, "group_dim": 1, "symmetric": False}
    asked = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "weight_quantization": {key: spec if key == "quantized_initialization" else {"mlp": spec}},
    }
    engine = deepspeed.initialize(model=build("llama"), config=asked)[0]
    engine.load_checkpoint(folder)
    wanted = deepspeed.initialize(model=trained("llama"), config=asked)[0]
    with torch.no_grad():
        assert torch.equal(engine(**prompts()).logits, wanted(**prompts()).logits)


@pytest.mark.quick("3-post_init_quant", "0-quantized_initialization")
@pytest.mark.parametrize("key", ["quantized_initialization", "post_init_quant"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_training_checkpoint_is_quantized_as_it_is_loaded(stage: int, key: str, tmp_path: Path) -> None:
    run_alone(from_a_checkpoint, folder=str(tmp_path / "1"), stage=stage, key=key)
    if stage == 3:
        run_ranks(2, from_a_checkpoint, folder=str(tmp_path / "2"), stage=stage, key=key)
