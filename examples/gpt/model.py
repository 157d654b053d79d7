"""A decoder-only transformer over bytes: GPT-2's blocks (Radford et al. 2019) with rotary positions (arXiv:2104.09864).

`train.py` trains it; nothing here knows of ranks or sharding. The model answers its own loss, so that one call is one
forward, and every parameter belongs to a small module, so that ZeRO-3 can gather them block by block.

Shapes: B samples, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """Sizes of a model; the defaults have 10.8M parameters."""

    vocab: int = 256
    seq: int = 64
    width: int = 384
    layers: int = 6
    heads: int = 6
    tied: bool = False
    """Use the token embedding as the output layer too."""


def rotary_angles(seq: int, head_width: int, device: torch.device) -> Tensor:
    """[seq, D / 2] angles: position times one frequency per pair of channels."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    return torch.outer(torch.arange(seq, device=device), frequencies)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the channel pairs of x [B, H, T, D] by their angles, so that q.k depends on the distance of two tokens."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention; [B, T, C] in and out."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised copy added back to the stream; [B, T, C] in and out."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.expand, self.shrink = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        return x + self.shrink(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Tokens in; logits out, or the mean cross-entropy where targets are given."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.apply(self._init_weights)
        if config.tied:
            self.head.weight = self.tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's: normal(0, 0.02), biases 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x, y: [B, T] tokens. Logits [B, T, V], or with `y` the mean loss in nats per token."""
        h = self.tokens(x)
        angles = rotary_angles(x.shape[1], self.config.width // self.config.heads, x.device)
        for block in self.blocks:
            h = block(h, angles)
        logits = self.head(self.norm(h))
        return logits if y is None else F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    @torch.no_grad()
    def generate(self, prompt: Tensor, num_tokens: int, *, temperature: float = 0.7, seed: int = 0) -> Tensor:
        """Extend a prompt [B, T] by sampling. With sharded parameters every rank must call it."""
        generator = torch.Generator(prompt.device).manual_seed(seed)
        for _ in range(num_tokens):
            logits = self(prompt[:, -self.config.seq :])[:, -1].float()
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            prompt = torch.cat([prompt, token], dim=1)
        return prompt
