"""Experts in 8 and 4 bits: a model says what its dequantized weights say, and is loaded, saved, copied and pickled as others are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.parallel.expert.hugging_face import is_fused
from tests.harness import run_ranks
from tests.inference.families import build, prompts
from tests.inference.test_engine import logits_of
from tests.inference.test_quantize_layers import dequantized

transformers = pytest.importorskip("transformers")

GROUPS = {"weight": {"group_size": 32}}


def gpt_oss() -> Any:
    """Experts that are transposed, and have biases and a gate of their own."""
    torch.manual_seed(4)
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
        bos_token_id=1, layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).eval()


def model_of(family: str) -> Any:
    return gpt_oss() if family == "gpt_oss" else build(family, hidden_size=96, moe_intermediate_size=64)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_say_what_their_dequantized_matrices_say(family: str, dtype: str) -> None:
    plain, batch = model_of(family), prompts("left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype=dtype, quant=GROUPS)
    assert not any(param.dim() == 3 for param in engine.module.parameters())
    other = dequantized(plain, engine.module)
    found, expected = logits_of(engine, batch), logits_of(other, batch)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(engine.generate(**batch, **greedy), other.generate(**batch, **greedy))
    for copied in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(logits_of(copied, batch), found)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_quantized_as_they_are_loaded_saved_and_loaded_again(family: str, tmp_path: Path) -> None:
    plain, batch = model_of(family), prompts("left")
    expected = logits_of(deepspeed.init_inference(copy.deepcopy(plain), dtype="int8", quant=GROUPS), batch)
    plain.save_pretrained(tmp_path / "plain")
    for path, more in (("plain", {"save_mp_checkpoint_path": str(tmp_path / "parts")}), ("parts", {})):
        with torch.device("meta"):
            empty = type(plain)(copy.deepcopy(plain.config)).eval()
        engine = deepspeed.init_inference(empty, dtype="int8", quant=GROUPS, checkpoint=str(tmp_path / path), **more)
        assert (logits_of(engine, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_whole_state_dict_fills_quantized_experts() -> None:
    plain, batch = model_of("mixtral"), prompts("left")
    state: dict[str, Tensor] = {name: value * 1.5 for name, value in plain.state_dict().items()}
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="int8", quant=GROUPS)
    engine.module.load_state_dict(state)
    plain.load_state_dict(state)
    expected = deepspeed.init_inference(plain, dtype="int8", quant=GROUPS)
    assert torch.equal(logits_of(engine, batch), logits_of(expected, batch))


def test_experts_that_take_tokens_sorted_before_are_none_that_are_spread_or_quantized() -> None:
    with torch.device("meta"):
        experts = transformers.models.llama4.modeling_llama4.Llama4TextExperts(transformers.Llama4TextConfig())
    assert not is_fused(experts)


def over_ranks(rank: int, world_size: int) -> list[float]:
    """How far logits are from one rank's with experts streamed, spread and cut: of few tokens, as an expert that is spread meets those of
    all ranks, and inputs of up to 32 rows are rounded to 15 bits."""
    plain, batch, found = model_of("mixtral"), prompts("alone"), []
    whole = logits_of(deepspeed.init_inference(copy.deepcopy(plain), dtype="int8", quant=GROUPS), batch)
    for more in (
        {"zero": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"moe": {"ep_size": world_size}},
        {"tensor_parallel": {"tp_size": world_size, "tp_grain_size": 32}},
    ):
        engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="int8", quant=GROUPS, **more)
        assert not any(param.dim() == 3 for param in engine.module.parameters())
        if "tensor_parallel" not in more:  # heads' parts have smaller groups
            found.append(float((logits_of(engine, batch) - whole).abs().max() / whole.abs().max()))
        else:
            logits_of(engine, batch)
        engine.destroy()
    return found


def test_streamed_spread_and_cut_experts_are_quantized_and_say_what_whole_ones_say() -> None:
    for found in run_ranks(2, over_ranks):
        assert max(found) <= 1e-5


def test_layers_that_stay_whole_are_named_in_a_warning_and_tokens_of_a_picture_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr("deepspeed.quant.replace.warn_once", said.append)
    stack = nn.Module()
    stack.up = nn.Parameter(torch.zeros(2, 4, 4))
    stack.token = nn.Parameter(torch.zeros(1, 1, 4))
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(7, 8), nn.Conv1d(2, 2, 3), stack)
    deepspeed.init_inference(model, dtype="int8")
    assert said == ["2 layers of Sequential stay as they are, not quantized: 1, 3.up [2, 4, 4]."]
