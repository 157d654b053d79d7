"""The inference engine says what Hugging Face's model says, and refuses what cannot be before any work."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.inference import engine as engine_module
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from deepspeed.inference.limits import check_length
from deepspeed.inference.policy import row_names
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.inference.families import FAMILIES, build, prompts

pytest.importorskip("transformers")

QUICK = ["llama", "gpt2", "bloom", "t5"]
TESTED = FAMILIES if os.environ.get("DS_TEST_LONG") else QUICK


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the last token; an encoder-decoder's first answer."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**batch, decoder_input_ids=batch["input_ids"][:, :1]).logits
        return model(**batch).logits


@pytest.mark.parametrize("padded", ["alone", "left", "right"])
@pytest.mark.parametrize("family", TESTED)
def test_a_family_has_the_logits_and_the_words_of_hugging_face(family: str, padded: str) -> None:
    plain, batch = build(family), prompts(padded)
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype=torch.float32)
    torch.testing.assert_close(logits_of(engine, batch), logits_of(plain, batch), rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(engine.generate(**batch, **options), plain.generate(**batch, **options))


@pytest.mark.parametrize("how", ["beams", "sampled", "static cache", "assisted", "custom cache"])
def test_ways_to_generate_are_those_of_hugging_face(how: str) -> None:
    from transformers import DynamicCache

    plain, batch = build("llama"), prompts("alone" if how == "assisted" else "left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32")
    of = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.7},
        "static cache": {"cache_implementation": "static"},
        "assisted": {"prompt_lookup_num_tokens": 2},
        "custom cache": {},
    }[how]
    found = []
    for model in (engine, plain):
        torch.manual_seed(3)
        own = {"cache": DynamicCache(config=plain.config)} if how == "custom cache" else {}
        found.append(model.generate(**batch, max_new_tokens=6, **of, **own))
    assert torch.equal(*found)


def test_bf16_is_what_loading_in_bf16_gives(tmp_path: Path) -> None:
    import transformers

    build("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    engine = deepspeed.init_inference(build("llama"), dtype="torch.bfloat16")
    assert torch.equal(logits_of(engine, prompts()), logits_of(loaded, prompts()))


def test_the_engine_stands_for_its_module() -> None:
    model = build("llama")
    engine = deepspeed.init_inference(model, dtype=torch.float32)
    assert isinstance(engine, InferenceEngine) and isinstance(engine, nn.Module)
    assert engine.module is model and not engine.training
    assert engine.config is model.config and engine.generation_config is model.generation_config
    assert engine.device == model.device
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = engine.nowhere


def test_what_is_set_on_the_engine_is_set_where_it_is_read() -> None:
    from transformers import GenerationConfig

    plain = build("llama")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32")
    for model in (engine, plain):
        model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
        torch.manual_seed(0)
        model.lm_head = nn.Linear(48, 50)
    assert torch.equal(engine.generate(**prompts()), plain.generate(**prompts()))
    assert engine.module.lm_head.out_features == 50 and "lm_head" not in engine._modules
    engine.note = 3
    assert not hasattr(engine.module, "note") and engine.train().training and engine.module.training


def test_an_object_that_holds_modules_has_them_prepared_and_is_called() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.encoder, self.decoder, self.name = nn.Linear(4, 4), nn.Linear(4, 4), "pipe"

        def __call__(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    pipe = Pipeline()
    engine = deepspeed.init_inference(pipe, dtype=torch.bfloat16)
    assert engine(torch.ones(1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert pipe.encoder.weight.dtype is torch.bfloat16 and engine.name == "pipe"


def test_forwards_are_timed_from_when_it_is_asked_for() -> None:
    engine = deepspeed.init_inference(nn.Linear(4, 4), dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"before profile_model_time\(\)"):
        engine.model_times()
    engine.profile_model_time()
    engine(torch.ones(1, 4))
    engine(torch.ones(1, 4))
    times = engine.model_times()
    assert len(times) == 2 and all(0 < ms < 10_000 for ms in times)
    assert engine.model_times() == []
    talker = deepspeed.init_inference(build("llama"), dtype=torch.float32)
    talker.profile_model_time()
    talker.generate(**prompts(), max_new_tokens=4, min_new_tokens=4)
    assert len(talker.model_times()) == 4, "generate calls the module once a token"
    assert not talker.module._forward_hooks and not talker.module._forward_pre_hooks


def test_compiling_is_torchs_and_noted() -> None:
    engine = deepspeed.init_inference(nn.Linear(4, 4), dtype=torch.float32)
    expected = engine(torch.ones(1, 4))
    assert not engine.is_compiled
    engine.compile(backend="eager")
    assert engine.is_compiled and torch.equal(engine(torch.ones(1, 4)), expected)


def test_a_prompt_and_its_answer_beyond_the_limit_are_refused_with_both_numbers() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype=torch.float32, max_out_tokens=10)
    with pytest.raises(RuntimeError, match="a prompt of 7 tokens and 4 new ones are more than max_out_tokens = 10"):
        engine.generate(**prompts(), max_new_tokens=4)
    assert engine.generate(**prompts(), max_new_tokens=3).shape == (1, 10)
    assert deepspeed.init_inference(build("llama"), dtype="fp32").generate(**prompts(), max_new_tokens=30).shape == (
        1,
        37,
    )


@pytest.mark.parametrize(
    ("asked", "config", "new"),
    [
        ({}, {}, 20),
        ({"max_length": 9}, {"max_new_tokens": 5}, 5),
        ({"max_length": 12}, {}, 5),
        ({"generation_config": {"max_new_tokens": 6}}, {"max_length": 9}, 6),
        ({"max_new_tokens": 4}, {"max_length": 9}, 4),
    ],
)
def test_the_length_that_is_checked_is_the_one_that_hugging_face_generates(
    asked: dict[str, Any], config: dict[str, Any], new: int
) -> None:
    from transformers import GenerationConfig

    model = build("llama")
    model.generation_config.update(**config)
    if "generation_config" in asked:
        asked = {"generation_config": GenerationConfig(**asked["generation_config"])}
    assert model.generate(**prompts(), **asked).shape == (1, 7 + new)
    at, below = (deepspeed.init_inference(model, dtype="fp32", max_out_tokens=7 + new - less) for less in (0, 1))
    assert at.generate(**prompts(), **asked).shape == (1, 7 + new)
    with pytest.raises(RuntimeError, match=f"a prompt of 7 tokens and {new} new ones are more than max_out_tokens"):
        below.generate(**prompts(), **asked)


def test_no_prompt_is_one_token_and_sounds_are_none() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", max_out_tokens=6)
    assert engine.generate(max_new_tokens=5, do_sample=False).shape == (1, 6)
    with pytest.raises(RuntimeError, match="a prompt of 0 tokens and 6 new ones"):
        engine.generate(max_new_tokens=6)
    bart = deepspeed.init_inference(build("bart"), dtype="fp32", max_out_tokens=10)
    words = prompts()["input_ids"]
    assert bart.generate(words, max_new_tokens=9).shape == (1, 10)
    with pytest.raises(RuntimeError, match="a prompt of 7 tokens and 9 new ones"):
        bart.generate(words, max_new_tokens=9, decoder_input_ids=torch.tensor([[1, 5]]))
    check_length(bart.module, 10, (torch.zeros(1, 80, 30),), {"max_new_tokens": 9})


def test_a_policy_is_read_and_one_that_matches_nothing_is_refused() -> None:
    model = build("t5")
    block = type(model.encoder.block[0])
    names = ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
    deepspeed.init_inference(model, dtype=torch.float32, injection_policy={block: names})
    gpt2 = build("gpt2")
    policy = importlib.import_module("deepspeed.module_inject").HFGPT2LayerPolicy
    named = row_names(gpt2, {type(gpt2.transformer.h[0]): policy})
    assert named and all(name.endswith((".attn.c_proj", ".mlp.c_proj")) for name in named)
    with pytest.raises(ValueError, match="has the value 3, which names no sub-layers"):
        deepspeed.init_inference(model, dtype=torch.float32, injection_policy={block: 3})
    with pytest.raises(
        ValueError, match=r"injection_policy\[T5Block\] names 'SelfAttention.out', which matches nothing"
    ):
        deepspeed.init_inference(model, dtype=torch.float32, injection_policy={block: "SelfAttention.out"})
    with pytest.raises(ValueError, match="names Conv2d, of which T5ForConditionalGeneration has none"):
        deepspeed.init_inference(model, dtype=torch.float32, injection_policy={nn.Conv2d: "x"})
    with pytest.raises(AssertionError, match="is no class of modules"):
        deepspeed.init_inference(model, dtype=torch.float32, injection_policy={"T5Block": "x"})


def test_a_configuration_is_read_from_a_file_a_dict_and_keywords(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"dtype": "torch.float32", "tensor_parallel": {"tp_size": 1}}))
    model = nn.Linear(2, 2).half()
    assert deepspeed.init_inference(model, config=str(path)).module.weight.dtype is torch.float32
    given: dict[str, Any] = {"dtype": "bf16"}
    deepspeed.init_inference(model, given, mp_size=1)
    assert model.weight.dtype is torch.bfloat16 and given == {"dtype": "bf16"}
    with pytest.raises(ValueError, match=r"init_inference\(dtype='fp16'\), but its config says dtype = 'bf16'"):
        deepspeed.init_inference(model, given, dtype="fp16")
    with pytest.raises(ValueError, match="replace_with_kernel_injection is not a configuration key"):
        deepspeed.init_inference(model, {"replace_with_kernel_injection": True})
    with pytest.raises(AssertionError, match="both say what happens to the layers"):
        deepspeed.init_inference(model, injection_policy={nn.Linear: "x"}, replace_with_kernel_inject=True)


def test_the_defaults_are_a_dict_that_can_be_given_back() -> None:
    defaults = deepspeed.default_inference_config()
    assert defaults["max_out_tokens"] == 1024 and defaults["tensor_parallel"]["tp_grain_size"] == 64
    assert defaults["dtype"] == "fp16" and defaults["moe"]["moe_experts"] == (1,)
    assert DeepSpeedInferenceConfig(**defaults).model_dump() == defaults


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(DeepSpeedConfigError, match="got a str, which is no nn.Module"):
        deepspeed.init_inference("gpt2", dtype=torch.float32)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"injection_policy_tuple": ("mlp.down",)}, "injection_policy_tuple"),
        ({"args": object()}, "config"),
        ({"moe": {"type": "residual"}}, "moe.type"),
        ({"zero": {"stage": 2}}, "zero.stage = 2"),
    ],
)
def test_keys_that_nobody_reads_say_so(given: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_module, "warn_once", said.append)
    deepspeed.init_inference(torch.nn.Linear(2, 2), dtype=torch.float32, **given)
    assert said == [f"init_inference: {key} has no effect."]


def test_the_defaults_given_back_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_module, "warn_once", said.append)
    deepspeed.init_inference(torch.nn.Linear(2, 2), deepspeed.default_inference_config() | {"dtype": "fp32"})
    assert said == []


def test_an_older_key_and_its_place_of_now_have_one_value() -> None:
    with pytest.raises(ValueError, match=r"mp_size = 2, and tensor_parallel.tp_size = 4: both say the same"):
        deepspeed.init_inference(torch.nn.Linear(2, 2), mp_size=2, tensor_parallel={"tp_size": 4})
    deepspeed.init_inference(torch.nn.Linear(2, 2), dtype="fp32", mp_size=1, tensor_parallel={"tp_size": 1})


def test_the_sections_classes_are_found_without_importing_them() -> None:
    code = "import deepspeed; deepspeed.inference.config.DeepSpeedTPConfig(tp_size=2); deepspeed.inference.engine.InferenceEngine"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_value_in_two_spellings_is_one_value() -> None:
    engine = deepspeed.init_inference(build("llama"), {"dtype": "fp32"}, dtype=torch.float32)
    assert engine._config.dtype is torch.float32
    with pytest.raises(ValueError, match="but its config says dtype = 'fp32'"):
        deepspeed.init_inference(build("llama"), {"dtype": "fp32"}, dtype=torch.bfloat16)


def test_newer_and_older_places_of_a_checkpoint_have_one_value() -> None:
    older = {"checkpoint_dir": "elsewhere", "base_dir": "there", "save_mp_checkpoint_path": "out"}
    newer = {"checkpoint": "here", "base_dir": "here", "save_mp_checkpoint_path": "here"}
    for (key, value), (old_key, old) in zip(newer.items(), older.items(), strict=True):
        with pytest.raises(DeepSpeedConfigError, match=f"both say the same thing.*\\n.*Give {key} alone"):
            deepspeed.init_inference(build("gpt2"), **{key: value}, checkpoint_config={old_key: old})
