"""Weights that rest on a disk, in main memory or sharded over ranks say what whole ones say, in a memory that could not hold them."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_alone, run_ranks
from tests.inference.families import build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
SPEC = {"num_bits": 4, "group_size": 16, "group_dim": 1, "symmetric": False}


def zero(device: str, folder: str) -> dict[str, Any]:
    """Stage 3 with everything at rest between uses."""
    offload = {"device": device, **({"nvme_path": folder, "max_in_cpu": 0} if device == "nvme" else {})}
    return {"stage": 3, "offload_param": offload, "stage3_param_persistence_threshold": 0}


def on_meta(family: str, dtype: torch.dtype) -> Any:
    with deepspeed.OnDevice(dtype=dtype, device="meta"):
        return build(family)


def stream_and_compare(rank: int, world_size: int, folder: str) -> list[float]:
    """From a checkpoint: logits bit for bit and words, beside the engine that has the same weights whole."""
    batch, found = prompts("left"), []
    for device, family, dtype in (
        ("nvme", "llama", "fp32"),
        ("nvme", "llama", "int8"),
        ("cpu", "t5", "int4"),
        ("nvme", "gpt2", "int4"),
        ("nvme", "mixtral", "fp32"),
    ):
        weights = f"{folder}/{family}"
        whole = deepspeed.init_inference(on_meta(family, torch.float32), dtype=dtype, checkpoint=weights)
        engine = deepspeed.init_inference(
            on_meta(family, torch.float32), dtype=dtype, checkpoint=weights, zero=zero(device, f"{folder}/swap")
        )
        assert all(param.numel() == 0 for param in engine.module.parameters()), "everything rests"
        found.append(float((logits_of(engine, batch) - logits_of(whole, batch)).abs().max()))
        words = whole.generate(**batch, **GREEDY)
        assert torch.equal(engine.generate(**batch, **GREEDY), words), (device, family, dtype)
        if world_size > 1:  # ranks whose answers differ in length go on together
            longer = engine.generate(**batch, max_new_tokens=3 + rank * 4, do_sample=False)
            assert torch.equal(longer[:, : words.shape[1]], words[:, : longer.shape[1]])
        engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [1, 2] if os.environ.get("DS_TEST_LONG") else [2])
def test_streamed_weights_say_what_whole_ones_say(world_size: int, tmp_path: Path) -> None:
    for family in ("llama", "t5", "gpt2", "mixtral"):
        build(family).save_pretrained(tmp_path / family)
    for found in run_ranks(world_size, stream_and_compare, str(tmp_path)):
        assert max(found) <= 1e-5


def quantize_under_zero(rank: int, world_size: int, folder: str) -> None:
    """The section `weight_quantization`, in both of its forms, over plain models and over those that zero.Init has sharded."""
    batch = prompts("left")
    for number, section in enumerate(
        ({"post_init_quant": {"mlp": SPEC, "lm_head": {**SPEC, "num_bits": 8}}}, {"quantized_initialization": SPEC})
    ):
        for is_bf16, device in ((False, "nvme"), (True, "cpu")):
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": is_bf16},
                "zero_optimization": zero(device, f"{folder}/swap{number}"),
                "weight_quantization": section,
            }
            model = build("llama").to(torch.bfloat16 if is_bf16 else torch.float32)
            plain = copy.deepcopy(model)
            if device == "cpu":
                deepspeed.zero.Init(module=model, config_dict_or_path=config)
            if number == 0 and device == "nvme":
                assert _init_group_wise_weight_quantization(model, config) is model
            engine = deepspeed.initialize(model=model, config=config)[0]
            module, count = engine.module, 0
            for name, layer in module.named_modules():
                if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
                    count += 1
                    with deepspeed.zero.GatheredParameters([layer.quantized.packed]), torch.no_grad():
                        plain.get_submodule(name).weight.copy_(layer.quantized.whole())
            assert count == (7 if number == 0 else 16)
            expected, found = logits_of(plain, batch).float(), logits_of(module, batch).float()
            assert (found - expected).abs().max() <= (2e-2 if is_bf16 else 1e-3) * expected.abs().max()


def test_initialize_streams_what_weight_quantization_says(tmp_path: Path) -> None:
    run_ranks(2, quantize_under_zero, str(tmp_path))


def refuse_what_cannot_be(rank: int, world_size: int) -> None:
    section = {"quantized_initialization": SPEC}
    config = {"train_micro_batch_size_per_gpu": 1, "weight_quantization": section}
    model = build("llama")
    with pytest.raises(DeepSpeedConfigError, match="weight is in the optimizer, and integers cannot"):
        deepspeed.initialize(model=model, config={**config, "optimizer": {"type": "Adam", "params": {}}})
    rounding = {"stage": 3, "zero_quantized_weights": True}
    with pytest.raises(DeepSpeedConfigError, match="zero_quantized_weights with quantized weights"):
        deepspeed.initialize(model=build("llama"), config={**config, "zero_optimization": rounding})


def test_trained_weights_and_exchanges_that_round_are_refused() -> None:
    run_ranks(2, refuse_what_cannot_be)
    with pytest.raises(DeepSpeedConfigError, match=r"zero.offload_param.*zero.stage"):
        deepspeed.init_inference(build("llama"), zero={"stage": 0, "offload_param": {"device": "cpu"}})
    with pytest.raises(DeepSpeedConfigError, match=r"zero.stage.*tensor_parallel.tp_size"):
        deepspeed.init_inference(build("llama"), zero={"stage": 3}, tensor_parallel={"tp_size": 2})


def memory(key: str) -> int:
    """Bytes of this process, by a key of the kernel's."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"Linux tells {key}"
    return int(found[1]) * 1024


def generate_from_disk(folder: str) -> tuple[list[int], int]:
    """Words of a model that is not held, and how far the process's memory rose while it was loaded and ran."""
    prompt = torch.arange(3, 11).unsqueeze(0)
    section = zero("nvme", f"{folder}/swap") | {
        "stage3_prefetch_bucket_size": 1,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 0,
    }
    small = deepspeed.init_inference(build("llama"), dtype="fp32", zero=section)  # what is made once: threads, buffers
    small.generate(prompt, **GREEDY)
    small.destroy()
    model = on_meta_of(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = memory("VmRSS")
    engine = deepspeed.init_inference(model, dtype="fp32", checkpoint=f"{folder}/model", zero=section)
    words = engine.generate(prompt, **GREEDY)[0].tolist()
    return words, memory("VmHWM") - resident


def on_meta_of(folder: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{folder}/model"))


def test_a_model_four_times_its_memory_says_the_same_words(tmp_path: Path) -> None:
    model = build(
        "llama",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=40,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model.save_pretrained(tmp_path / "model")
    nbytes = sum(param.nbytes for param in model.parameters())
    expected = model.generate(torch.arange(3, 11).unsqueeze(0), **GREEDY)[0].tolist()
    words, rise = run_alone(generate_from_disk, str(tmp_path))
    assert words == expected
    assert rise <= nbytes / 4, f"{rise} bytes for a model of {nbytes}"


def cast_while_at_rest(*ranks: int) -> None:
    batch = prompts("left")
    for dtype in ("fp32", "int8"):
        engine = deepspeed.init_inference(build("llama"), dtype=dtype, zero={"stage": 3})
        wanted = engine(**batch).logits
        for cast in (lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.float(), lambda m: m.cpu()):
            cast(engine.module)
            found = engine(**batch).logits
            assert found.dtype is next(engine.module.lm_head.parameters()).dtype or dtype == "int8"
            assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert found.dtype is torch.float32


def test_a_model_at_rest_is_cast_as_one_in_memory() -> None:
    run_alone(cast_while_at_rest)
    run_ranks(2, cast_while_at_rest)
