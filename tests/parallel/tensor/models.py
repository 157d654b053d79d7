"""Small models of Transformers for tensor parallelism, and what one process computes with them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

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
    """A small causal model of a family, with the same values for everyone."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **changes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.float()


def batch(samples: int, length: int = 8, seed: int = 5, vocab: int = 96) -> dict[str, Tensor]:
    """Tokens with labels."""
    tokens = torch.randint(3, vocab, (samples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def share(inputs: dict[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    """The samples of one data-parallel rank."""
    return {key: value.chunk(num_ranks)[rank] for key, value in inputs.items()}
