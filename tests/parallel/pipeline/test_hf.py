"""Causal language models of Hugging Face are cut in one call, and train as they do whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed.parallel.pipeline.hf import layers_of, pipeline_of
from tests.harness import run_ranks
from tests.parallel.pipeline.models import config_of, joined, start, whole_weights

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "stablelm", "gpt_neox", "starcoder2", "granite", "gpt2", "gemma3_text",
    "gemma", "cohere", "opt", "phi",
)  # fmt: skip


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    extra = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "gemma": {"head_dim": 8},
        "gemma3_text": {"head_dim": 8, "sliding_window": 4},
        "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
        "gpt_neox": {"num_key_value_heads": None},
    }.get(family, {})
    settings = {k: v for k, v in {**SMALL, **extra, **more}.items() if v is not None}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings)).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_sum_of_its_layers(family: str) -> None:
    model = build(family)
    layers = layers_of(model)
    assert len(layers) >= 5


def token_batches(num: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        tokens = torch.randint(3, 64, (2, 9), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        yield (tokens, mask), torch.where(mask > 0, tokens, -100)


def _train(rank: int, world: int, families: list[str]) -> dict[str, Any]:
    found = {}
    for i, family in enumerate(families):
        module = pipeline_of(build(family, attention_dropout=0.0), num_stages=world)
        engine = start(
            module,
            config_of([0, 3, 1][i % 3] if world > 1 else 0, accumulation=2, schedule="zb-h1" if i % 2 else "1f1b"),
        )
        data = token_batches(4)
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found[family] = {"losses": losses, "weights": whole_weights(engine)}
        engine.destroy()
    return found


def test_cut_models_train_as_on_one_rank() -> None:
    families = ["llama", "qwen3", "gemma3_text"]
    (expected,) = run_ranks(1, _train, families)
    found = run_ranks(2, _train, families)
    for family in families:
        mine = [part[family] for part in found]
        assert mine[0]["losses"] == mine[1]["losses"] == pytest.approx(expected[family]["losses"], rel=1e-6)
        for name, value in expected[family]["weights"].items():
            assert torch.allclose(joined(mine)[name], value, atol=2e-6), (family, name)
