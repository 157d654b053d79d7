"""A token through all layers in one compiled call has the logits and the words of the unfused model, however a cache is treated."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.inference import fused
from deepspeed.kernels import native_decode
from tests.inference.families import build, prompts

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not native_decode.is_there(), reason="needs the compiled loops")

SIZES: dict[str, Any] = {"hidden_size": 96, "head_dim": 16}


def pair(family: str, dtype: str = "fp32", **changes: Any) -> tuple[Any, Any]:
    """The engine, and Hugging Face's model with the same weights."""
    plain = build(family, **SIZES, **changes)
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype=dtype)
    if dtype != "fp32":
        plain = copy.deepcopy(plain)
        plain = deepspeed.init_inference(plain, dtype=dtype).module
        del plain.model.__dict__["forward"]
    return engine, plain


def num_fused(engine: Any) -> int:
    """Tokens that went through the compiled layers."""
    return engine.module.model.__dict__["forward"].num_fused


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families_say_the_same_words_token_by_token(family: str) -> None:
    engine, plain = pair(family)
    for padded in ("alone", "left"):
        options: dict[str, Any] = {
            "max_new_tokens": 12,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        ours = engine.generate(**prompts(padded), **options)
        theirs = plain.generate(**prompts(padded), **options)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-5, atol=1e-5)
    assert num_fused(engine) == 22


@pytest.mark.parametrize("cache", ["model", "int8"])
def test_threads_that_generate_at_once_say_what_each_says_alone(cache: str) -> None:
    engine = deepspeed.init_inference(build("llama", **SIZES), dtype="fp32", kv_cache={"dtype": cache})
    asked = [torch.arange(3, 6 + length).unsqueeze(0) for length in range(4)]
    options = {"max_new_tokens": 24, "do_sample": False}
    alone = [engine.generate(ids, **options) for ids in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        for _ in range(3):
            together = threads.map(lambda ids: engine.generate(ids, **options), asked)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert num_fused(engine) > 0


def test_a_cache_that_is_gone_is_not_held() -> None:
    engine, _ = pair("llama")
    out = engine.generate(**prompts("alone"), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    (held,) = engine.module.model.__dict__["forward"]._caches.values()
    buffers = weakref.ref(held.caches[0][0])
    del held, out
    gc.collect()
    assert buffers() is None


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_weights_are_read_as_they_rest(dtype: str) -> None:
    engine, plain = pair("llama", dtype)
    batch = prompts("left")
    ours, theirs = (m.generate(**batch, max_new_tokens=8, do_sample=False) for m in (engine, plain))
    assert torch.equal(ours, theirs) and num_fused(engine) == 7


@pytest.mark.parametrize("how", ["beams", "sampled", "static cache", "assisted", "custom cache", "right", "long"])
def test_caches_that_are_reordered_cropped_or_of_other_kinds(how: str) -> None:
    from transformers import DynamicCache

    engine, plain = pair("llama", max_position_embeddings=512)
    batch = prompts({"assisted": "alone", "right": "right", "long": "alone"}.get(how, "left"))
    of: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 2, "num_return_sequences": 2},
        "sampled": {"do_sample": True, "top_k": 20},
        "static cache": {"cache_implementation": "static"},
        "assisted": {"prompt_lookup_num_tokens": 2},
        "custom cache": {},
        "right": {},
        "long": {"max_new_tokens": 300},
    }
    found = []
    for model in (engine, plain):
        torch.manual_seed(3)
        own = {"cache": DynamicCache(config=plain.config)} if how == "custom cache" else {}
        found.append(model.generate(**batch, **{"max_new_tokens": 8, **of[how], **own}))
    assert torch.equal(*found)
    if how not in ("static cache", "right"):
        assert num_fused(engine) > 0


def test_training_and_other_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fused, "warn_once", said.append)
    engine, _ = pair("llama")
    batch = prompts()
    loss = engine.module(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert num_fused(engine) == 0 and engine.module.lm_head.weight.grad is not None
    gpt2 = deepspeed.init_inference(build("gpt2"), dtype="fp32")
    assert "forward" not in gpt2.module.__dict__
    assert deepspeed.init_inference(build("llama"), dtype="fp32").module.model.__dict__.get("forward") is None
    assert said == [
        "GPT2LMHeadModel runs unfused: compiled steps are for Llama, Mistral, Qwen2, Qwen3.",
        "LlamaForCausalLM runs unfused: its heads have 8 elements, which is no multiple of 16 up to 512, or scores of another scale.",
    ]


def test_hooks_adapters_new_weights_and_copies_are_not_passed_by() -> None:
    engine, plain = pair("llama")
    batch, options = prompts(), {"max_new_tokens": 4, "do_sample": False}
    twin = copy.deepcopy(engine.module)
    assert torch.equal(twin.generate(**batch, **options), plain.generate(**batch, **options))
    seen: list[int] = []
    handle = engine.module.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    engine.generate(**batch, **options)
    assert len(seen) == 4 and num_fused(engine) == 0
    handle.remove()
    engine.generate(**batch, **options)
    assert num_fused(engine) == 3
    for model in (engine.module, plain):
        model.model.layers[0].mlp.down_proj.weight.data = torch.zeros(96, 64)
    assert torch.equal(engine.generate(**batch, **options), plain.generate(**batch, **options))
    assert num_fused(engine) == 3
    engine.destroy()
    assert "forward" not in engine.module.model.__dict__
