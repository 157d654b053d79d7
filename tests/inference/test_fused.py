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


@pytest.mark.parametrize(("batch", "steps"), [(32, 3), (33, 0)])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_as_many_sequences_as_loops_are_faster_for_take_the_compiled_step(dtype: str, batch: int, steps: int) -> None:
    engine, plain = pair("llama", dtype)
    ids = torch.randint(3, 90, (batch, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(engine.generate(ids, **options), plain.generate(ids, **options))
    assert num_fused(engine) == steps


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


def scaled_attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Plain attention with smaller queries, as a script may register it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query * 0.1, *args, **kwargs)


def change(model: Any, what: str) -> None:
    """What a script may do to a model that runs."""
    layers, own = model.model.layers, model.model.layers[1].mlp.forward
    if what == "layers dropped":
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList([layers[0]]), 1
    elif what == "fewer layers":
        model.config.num_hidden_layers = 1
    elif what == "layers in another order":
        model.model.layers = torch.nn.ModuleList([layers[1], layers[0]])
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
    elif what == "forward":
        layers[1].mlp.forward = lambda x: own(x) * 0.3
    elif what == "scale of scores":
        layers[0].self_attn.scaling = 0.05
    elif what == "epsilon":
        layers[0].input_layernorm.variance_epsilon = 1.0
    elif what == "attention":
        from transformers import AttentionInterface

        AttentionInterface.register("scaled", scaled_attention)
        model.set_attn_implementation("scaled")
    elif what == "window":
        model.config.sliding_window = 4
    elif what == "training":
        model.train()
    else:
        model.model.forward = (lambda inner: lambda **k: scaled(inner(**k)))(model.model.forward)


def scaled(found: Any) -> Any:
    found.last_hidden_state = found.last_hidden_state * 0.1
    return found


CHANGES = ["layers dropped", "fewer layers", "layers in another order", "forward", "scale of scores", "epsilon", "attention",
           "window", "training", "decoder"]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_script_changes_in_a_model_is_not_passed_by(what: str, when: str) -> None:
    from transformers import DynamicCache

    plain = build("mistral" if what == "window" else "llama", **SIZES, attention_dropout=0.5)
    asked = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    model = copy.deepcopy(plain)
    if when == "before" and what != "training":
        change(model, what)
    engine = deepspeed.init_inference(model, dtype="fp32")
    if when == "after" or what == "training":
        change(engine.module, what)
    change(plain, what)
    found = []
    for one in (engine, plain):
        torch.manual_seed(3)
        found.append(torch.stack(one.generate(**prompts("left"), **asked, past_key_values=DynamicCache()).logits))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_listeners_of_all_modules_lower_precision_and_recorded_states_are_not_passed_by() -> None:
    engine, plain = pair("llama")
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    engine.generate(**prompts(), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert seen.count("LlamaMLP") == 8 and num_fused(engine) == 0
    asked: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = [torch.stack(model.generate(**prompts(), **asked).logits) for model in (engine, plain)]
    assert torch.equal(*found) and num_fused(engine) == 0
    states = [
        model.generate(**prompts(), **asked, output_hidden_states=True).hidden_states for model in (engine, plain)
    ]
    torch.testing.assert_close(*states)
    engine.generate(**prompts(), **asked)
    assert num_fused(engine) == 3  # the recorders that Hugging Face leaves behind do not slow it down
    for model in (engine.module, plain):
        model.config.output_hidden_states = True
    with torch.no_grad():
        both = []
        for model in (engine.module, plain):
            first = model(prompts()["input_ids"], use_cache=True)
            both.append(model(torch.tensor([[3]]), past_key_values=first.past_key_values).hidden_states)
    torch.testing.assert_close(*both)


def test_keys_that_a_script_keeps_are_not_written_over() -> None:
    engine, plain = pair("llama")
    found = []
    for model in (engine.module, plain):
        with torch.no_grad():
            cache = model(prompts()["input_ids"], use_cache=True).past_key_values
            step = lambda token: model(torch.tensor([[token]]), past_key_values=cache).logits  # noqa: B023, E731
            branch: list[Any] = []
            step(3)
            root = [(layer.keys, layer.values) for layer in cache.layers]
            for token in (5, 7):  # a tree, whose branches begin with the same tensors
                for layer, (keys, values) in zip(cache.layers, root, strict=True):
                    layer.keys, layer.values = keys, values
                step(token), step(token + 1)
                branch.append([(layer.keys, layer.values) for layer in cache.layers])
            cache.crop(-2)
            step(9), step(10)
            found.append(branch)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


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
        "LlamaForCausalLM runs unfused: its heads have 8 elements, which is no multiple of 16 up to 512.",
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


@pytest.mark.parametrize("cache", ["model", "int8"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(cache: str) -> None:
    engine = deepspeed.init_inference(build("llama", **SIZES), dtype="fp32", kv_cache={"dtype": cache})
    greedy = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}

    def in_two(mode: Any) -> torch.Tensor:
        with mode():
            first = engine.generate(**prompts("alone"), **greedy)
        words = torch.cat([first.sequences.clone(), torch.tensor([[5, 6]])], 1)
        return engine.generate(words, past_key_values=first.past_key_values, **greedy).sequences

    assert torch.equal(in_two(torch.inference_mode), in_two(torch.no_grad))
