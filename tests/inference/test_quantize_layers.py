"""int8 and int4 models say what their dequantized weights say, take the memory promised, and are refused where nothing can be."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.inference.int8_cache import new_cache
from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization
from deepspeed.inference.quantized_experts import held_experts
from deepspeed.parallel.expert.hugging_face import HELD
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.inference.families import FAMILIES, build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")

TESTED = FAMILIES if os.environ.get("DS_TEST_LONG") else ["llama", "gpt2", "t5"]


def dequantized(plain: nn.Module, quantized: nn.Module) -> Any:
    """A copy of `plain` with the weights that `quantized` holds."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for name, weights, is_transposed in held_experts(quantized):
            whole = torch.stack([weight.whole() for weight in weights])
            other.get_parameter(name).copy_(whole.transpose(1, 2) if is_transposed else whole)
        for name, layer in quantized.named_modules():
            if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) and f".{HELD}." not in name:
                target = other.get_submodule(name)
                target.weight.copy_(layer.weight.t() if type(target).__name__ == "Conv1D" else layer.weight)
    return other


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", TESTED)
def test_a_quantized_model_says_what_its_weights_say(family: str, dtype: str) -> None:
    plain, batch = build(family), prompts("left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype=dtype, quant={"weight": {"group_size": 32}})
    assert any(isinstance(layer, QuantizedLinear) for layer in engine.modules())
    expected = logits_of(dequantized(plain, engine.module), batch)
    found = logits_of(engine, batch)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_greedy_words_are_those_of_the_dequantized_weights(dtype: str) -> None:
    plain, batch = build("llama", hidden_size=96, intermediate_size=128), prompts("left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype=dtype, quant={"weight": {"group_size": 32}})
    other = dequantized(plain, engine.module)
    assert torch.equal(engine.generate(**batch, max_new_tokens=12), other.generate(**batch, max_new_tokens=12))


def test_layers_that_a_model_writes_to_itself_stay_as_they_are() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 48, "attention_hidden_size": 48, "intermediate_size": 64}
    config = transformers.RwkvConfig(**sizes, num_hidden_layers=3, rescale_every=2)
    plain = transformers.RwkvForCausalLM(config).eval()
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="int8")
    other = dequantized(plain, engine.module)
    ids = prompts()["input_ids"]
    assert (engine(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() < 1e-4
    assert type(engine.module.rwkv.blocks[2].attention.output) is nn.Linear


@pytest.mark.parametrize("family", ["Gemma3", "Bart"])
def test_a_tied_head_whose_embedding_is_scaled_is_quantized_with_it(family: str) -> None:
    """The scale is a buffer in the one and a number in the other."""
    import transformers

    torch.manual_seed(0)
    if family == "Gemma3":
        sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        config = transformers.Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        plain = transformers.Gemma3ForCausalLM(config).eval()
    else:
        both = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 64), ("attention_heads", 4))}  # fmt: skip
        plain = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=96, d_model=64, scale_embedding=True, **both)
        ).eval()
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="int8")
    assert isinstance(engine.module.get_input_embeddings(), QuantizedEmbedding)
    assert engine.module.lm_head.quantized is engine.module.get_input_embeddings().quantized
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    found, expected = engine(ids).logits, dequantized(plain, engine.module)(ids).logits
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_a_tied_head_and_its_embedding_share_one_weight() -> None:
    engine = deepspeed.init_inference(build("llama", tie_word_embeddings=True), dtype=torch.int8)
    weight = engine.module.lm_head.quantized
    assert weight is engine.module.model.embed_tokens.quantized
    again = deepspeed.init_inference(engine.module, dtype=torch.int8)
    assert again.module.lm_head.quantized is weight, "what is quantized stays as it is"


def test_queries_keys_and_values_can_be_left_as_they_are() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="int8", quant={"qkv": {"enabled": False}})
    attention = engine.module.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear and isinstance(attention.o_proj, QuantizedLinear)


def test_a_model_nobody_can_quantize_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no layer whose weights can be quantized"):
        deepspeed.init_inference(nn.Conv2d(1, 1, 3), dtype=torch.int8)


def test_sections_that_are_none_and_groups_along_another_dim_are_refused() -> None:
    for given, words in (
        ({"mlp": 5}, "post_init_quant.mlp = 5 is not"),
        ({"mlp": {}}, "in quant.weight.post_init_quant.mlp: "),
    ):
        with pytest.raises(ValueError, match=words):
            deepspeed.init_inference(build("llama"), dtype="int8", quant={"weight": {"post_init_quant": given}})
    along_rows = {"num_bits": 8, "group_size": 16, "group_dim": 0, "symmetric": False}
    with pytest.raises(ValueError, match="group_dim = 0: groups lie along the last dim"):
        deepspeed.init_inference(
            build("llama"), dtype="int8", quant={"weight": {"quantized_initialization": along_rows}}
        )


def test_layers_are_quantized_by_name_and_names_that_match_none_or_two_are_refused() -> None:
    spec = {"num_bits": 4, "group_size": 16, "group_dim": 1, "symmetric": False}

    def config(**keys: Any) -> dict[str, Any]:
        return {"train_micro_batch_size_per_gpu": 1, "weight_quantization": {"post_init_quant": keys}}

    model = _init_group_wise_weight_quantization(build("llama"), config(mlp=spec))
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, QuantizedLinear) and type(layer.self_attn.q_proj) is nn.Linear
    with pytest.raises(DeepSpeedConfigError, match="nowhere matches no layer of LlamaForCausalLM"):
        _init_group_wise_weight_quantization(build("llama"), config(nowhere=spec))
    with pytest.raises(AssertionError, match="is matched by mlp and up_proj"):
        _init_group_wise_weight_quantization(build("llama"), config(mlp=spec, up_proj=spec))
    with pytest.raises(AssertionError, match="group_size = 36 does not divide the 48 inputs"):
        _init_group_wise_weight_quantization(build("llama"), config(up_proj={**spec, "group_size": 36}))


def perplexity(model: Any, text: torch.Tensor, make_cache: Any = lambda model: None) -> float:
    """Per character, over windows of 64."""
    windows = text[: len(text) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part, cache=make_cache(model)).loss for part in windows.split(32)]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.skipif(not os.environ.get("DS_TEST_LONG"), reason="trains a model; make test-inference")
@pytest.mark.timeout(600)
def test_perplexity_stays_within_what_was_promised() -> None:
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    text = torch.tensor([min(byte, 127) for page in pages for byte in page.read_bytes()])
    model = build("llama", vocab_size=128, hidden_size=192, intermediate_size=256)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.div_(3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :][: 64 * 256]
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        starts = torch.randint(0, len(train) - 64, (16, 1), generator=generator)
        batch = train[starts + torch.arange(64)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = perplexity(model, held)
    worse = {}
    for dtype in ("int8", "int4"):
        engine = deepspeed.init_inference(copy.deepcopy(model).eval(), dtype=dtype)
        worse[dtype] = perplexity(engine, held) / plain - 1
    worse["cache"] = perplexity(model, held, new_cache) / plain - 1
    print(f"perplexity {plain:.3f}, {', '.join(f'{name} {rise:+.3%}' for name, rise in worse.items())}")
    assert max(worse["int8"], worse["cache"]) <= 0.005 and worse["int4"] <= 0.03


@pytest.mark.parametrize("how", ["init_inference", "by name"])
def test_integers_are_not_written_as_the_models_folder(how: str, tmp_path: Path) -> None:
    model = build("llama")
    if how == "init_inference":
        deepspeed.init_inference(model, dtype="int8")
    else:
        spec = {"num_bits": 8, "group_size": 16, "group_dim": 1, "symmetric": False}
        _init_group_wise_weight_quantization(model, {"weight_quantization": {"post_init_quant": {"up_proj": spec}}})
    with pytest.raises(DeepSpeedError, match="with quantized weights would write their integers"):
        copy.deepcopy(model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_goes_on_in_another_precision() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="int8")
    batch = prompts("left")
    wanted = engine(**batch).logits
    lower = deepspeed.init_inference(engine.module, dtype="bf16")
    found = lower(**batch).logits
    assert found.dtype is torch.bfloat16 and (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    lower.to(torch.float32)
    assert (lower(**batch).logits - wanted).abs().max() < 0.05 * wanted.abs().max()
