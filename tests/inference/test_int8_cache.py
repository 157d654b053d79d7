"""Keys and values in int8 say what rounded ones say, in every way of generating, and take the bytes promised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

import deepspeed
from deepspeed.inference.int8_cache import Int8Layer, new_cache
from deepspeed.kernels import native
from deepspeed.kernels.reference.quantize import dequantize, quantize
from tests.inference.families import build, prompts


class RoundedLayer(DynamicLayer):
    """Hugging Face's layer, whose keys and values were rounded as int8 rounds them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = [
            dequantize(quantize(part, part.shape[-1])).view(part.shape).to(part.dtype)
            for part in (key_states, value_states)
        ]
        return super().update(*rounded, *args, **kwargs)


def rounded_cache(model: Any) -> Any:
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    cache.layers = [RoundedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if model.config.is_encoder_decoder else cache


FUSED = {"hidden_size": 96, "intermediate_size": 64}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", FUSED), ("qwen3", {"head_dim": 16}), ("gpt2", {}), ("t5", {}), ("gemma2", {})]
)
def test_words_are_those_of_rounded_keys_and_values(family: str, sizes: dict[str, Any], way: str) -> None:
    plain, batch = build(family, **sizes), prompts("left")
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0} | WAYS[way]
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32", kv_cache={"dtype": "int8"})
    torch.manual_seed(0)
    expected = plain.generate(**batch, **options, cache=rounded_cache(plain))
    torch.manual_seed(0)
    assert torch.equal(engine.generate(**batch, **options), expected)


@pytest.mark.skipif(native.library() is None, reason=f"no compiled library: {native.why_missing()}")
def test_compiled_steps_write_and_read_the_integers_in_place() -> None:
    plain, batch = build("llama", **FUSED), prompts("left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32", kv_cache={"dtype": "int8"})
    engine.generate(**batch, max_new_tokens=6, do_sample=False)
    assert engine.module.model.forward.num_fused == 5
    ours, theirs, found = new_cache(plain), rounded_cache(plain), []
    with torch.no_grad():
        for model, cache in ((engine, ours), (plain, theirs)):
            model(**batch, cache=cache, use_cache=True)
            mask = torch.cat(
                [batch["attention_mask"], torch.ones(len(batch["attention_mask"]), 1, dtype=torch.int64)], 1
            )
            positions = mask.sum(1, keepdim=True) - 1
            words = torch.full((len(mask), 1), 7)
            found.append(model(words, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True).logits)
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()
    for mine, their in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, their.keys, rtol=1e-2, atol=1e-2)


def test_a_cache_takes_a_byte_an_element_and_a_scale_a_head() -> None:
    layer = Int8Layer()
    states = torch.randn(2, 3, 40, 64)
    layer.update(states, states)
    assert layer.nbytes == 2 * states.numel() * (1 + 4 / 64)
    layer.crop(-7)
    assert layer.get_seq_length() == 33 and layer.keys.shape == (2, 3, 33, 64)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert torch.equal(layer.keys[0], layer.keys[1]) and (layer.keys[3] - states[0, :, :33]).abs().max() <= 0.02


def test_a_cache_that_is_given_and_none_at_all_are_left() -> None:
    plain, batch = build("gpt2"), prompts("left")
    engine = deepspeed.init_inference(copy.deepcopy(plain), dtype="fp32", kv_cache={"dtype": "int8"})
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    for more in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache": DynamicCache()}):
        expected = plain.generate(**batch, **options, **copy.deepcopy(more))
        assert torch.equal(engine.generate(**batch, **options, **more), expected)


def test_integers_are_not_assigned() -> None:
    engine = deepspeed.init_inference(build("llama"), dtype="fp32", kv_cache={"dtype": "int8"})
    out = engine.generate(**prompts(), max_new_tokens=2, return_dict_in_generate=True)
    layer = out.past_key_values.layers[0]
    for name in ("keys", "values"):
        with pytest.raises(ValueError, match=f"{name} of a cache in int8 were assigned"):
            setattr(layer, name, getattr(layer, name))
