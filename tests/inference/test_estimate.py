"""What `deepspeed estimate --inference` says is what an engine holds, cut and quantized, and what a prompt takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.inference.estimate import InferenceEstimate, estimate_inference
from deepspeed.launcher.runner import main
from deepspeed.memory import measure_peak
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_ranks
from tests.inference.families import build

pytest.importorskip("transformers")

BATCH, TOKENS = 2, 40


def held(engine: Any) -> int:
    """Bytes of what an engine keeps."""
    return sum({id(tensor): tensor.nbytes for tensor in (*engine.parameters(), *engine.buffers())}.values())


LARGER: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 480, "intermediate_size": 1024},
    "gpt2": {"n_embd": 480, "n_inner": 1024},
}
"""Beside which what kernels take for themselves, a few KB in bf16, is nothing."""


def predicted(family: str, **keywords: Any) -> InferenceEstimate:
    return estimate_inference(build(family), batch=BATCH, tokens=TOKENS, **keywords)


def cache_nbytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_one_rank_takes_what_is_predicted(family: str, dtype: str) -> None:
    found = estimate_inference(build(family, **LARGER[family]), batch=BATCH, tokens=TOKENS, dtype=dtype)
    engine = deepspeed.init_inference(build(family, **LARGER[family]), dtype=dtype)
    outputs: list[Any] = []
    prompt = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        engine(prompt)  # what is made once
        measured = measure_peak(lambda: outputs.append(engine(prompt, use_cache=True, logits_to_keep=1)))
    assert found.weights_nbytes == held(engine)
    assert found.cache_nbytes == cache_nbytes(outputs[0].past_key_values)
    working = measured.allocated_nbytes - found.cache_nbytes
    assert found.working_nbytes == pytest.approx(working, rel=0.05)


def test_a_cache_of_int8_has_its_scales() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", kv_cache={"dtype": "int8"})
    cache = engine.generate(
        torch.ones(BATCH, TOKENS, dtype=torch.int64), max_new_tokens=1, min_new_tokens=1, return_dict_in_generate=True
    ).past_key_values
    found = predicted("llama", dtype="fp32", kv_cache={"dtype": "int8"})
    assert found.cache_nbytes == sum(layer.nbytes for layer in cache.layers)


def in_parts(rank: int, world_size: int, family: str, keywords: dict[str, Any]) -> int:
    engine = deepspeed.init_inference(build(family), **keywords)
    found = held(engine)
    engine.destroy()  # a mesh in use would be the next test's
    return found


@pytest.mark.parametrize(
    ("family", "keywords"),
    [
        ("llama", {"dtype": "int8", "tensor_parallel": {"tp_size": 2}}),
        ("mixtral", {"dtype": "fp32", "moe": {"ep_size": 2}}),
    ],
)
def test_each_rank_holds_what_is_predicted(family: str, keywords: dict[str, Any]) -> None:
    found = predicted(family, **keywords)
    measured = run_ranks(2, in_parts, family, keywords)
    assert found.weights_nbytes == pytest.approx(measured[0], rel=0.01)
    assert found.weights_nbytes < 0.8 * estimate_inference(build(family), dtype=keywords["dtype"]).weights_nbytes


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama").config.save_pretrained(tmp_path)
    arguments = ["estimate", str(tmp_path), "--inference", "--dtype", "int4", "-b", str(BATCH), "-s", str(TOKENS)]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["weights_nbytes"] == predicted("llama", dtype="int4").weights_nbytes
    assert printed["nbytes"] == sum(printed[f"{kind}_nbytes"] for kind in ("weights", "cache", "working"))
    assert main(arguments) == 0
    assert "bytes a token, 2 x 40 tokens" in capsys.readouterr().out
    assert main([*arguments, "--ep", "2"]) == 2
    assert "has no layers with experts" in capsys.readouterr().err


def test_what_is_not_predicted_is_refused() -> None:
    with pytest.raises(DeepSpeedConfigError, match="zero.stage = 3 streams weights"):
        predicted("llama", zero={"stage": 3})
