"""Small models of Transformers for tensor parallelism, and what one process computes with them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

LONG = pytest.mark.skipif(not os.environ.get("DS_TEST_LONG"), reason="long: make test-tensor")
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(family: str, **changes: Any) -> nn.Module:
    """A small causal model of a family, with the same values for everyone. "none" leaves a setting to the family."""
    torch.manual_seed(3)
    asked = {key: value for key, value in {**SMALL, **changes}.items() if value != "none"}
    config = transformers.AutoConfig.for_model(family, **asked)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.float()


def batch(samples: int, length: int = 8, seed: int = 5, vocab: int = 96) -> dict[str, Tensor]:
    """Tokens with labels."""
    tokens = torch.randint(3, vocab, (samples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def share(inputs: dict[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    """The samples of one data-parallel rank."""
    return {key: value.chunk(num_ranks)[rank] for key, value in inputs.items()}
