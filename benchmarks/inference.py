"""One sequence, token by token, beside Hugging Face in the same run: fp32, int8 and int4, and what the framework costs per layer.

    python benchmarks/inference.py [--layers 12] [--tokens 64] [--rounds 3]

A Llama of 69M parameters with random weights, one thread, greedy. Rounds alternate, the best of each counts. What the framework costs is
the time of a token of a model so small that its products cost nothing, over its layers.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import subprocess
import time
from typing import Any

import torch
import transformers

import deepspeed


def build(layers: int, hidden: int, inner: int, vocab: int) -> Any:
    """A Llama with random weights that ends no answer."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, eos_token_id=None,
        num_attention_heads=max(hidden // 64, 1), num_key_value_heads=max(hidden // 128, 1), max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def token_ms(model: Any, tokens: int) -> float:
    """Milliseconds of one new token, without the prompt's."""
    prompt = torch.arange(3, 35).unsqueeze(0)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with torch.no_grad():
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **options)
        middle = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens + 1, **options)
    return (time.perf_counter() - middle - (middle - start)) / tokens * 1e3


def commit() -> str:
    """Of the working tree."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "?"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = build(args.layers, 640, 1728, 16384)
    models: dict[str, Any] = {"Hugging Face, fp32": plain}
    for dtype in ("fp32", "int8", "int4"):
        models[dtype] = deepspeed.init_inference(copy.deepcopy(plain), dtype=dtype)
    best = dict.fromkeys(models, float("inf"))
    for _ in range(args.rounds):
        for name, model in models.items():
            best[name] = min(best[name], token_ms(model, args.tokens))
    numel = sum(param.numel() for param in plain.parameters())
    load = os.getloadavg()[0]
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}, "
    )
    print(
        f"commit {commit()}, load {load:.1f}; Llama of {numel / 1e6:.0f}M, {args.layers} layers, batch 1, one thread\n"
    )
    print("| model | ms per token | times Hugging Face's speed |\n|---|--:|--:|")
    for name, ms in best.items():
        print(f"| {name} | {ms:.2f} | {best['Hugging Face, fp32'] / ms:.2f} |")
    costs = {}
    for layers in (2, 26):
        tiny = build(layers, 64, 64, 64)
        pair = {"Hugging Face": tiny, "ours": deepspeed.init_inference(copy.deepcopy(tiny), dtype="fp32")}
        for name, model in pair.items():
            costs[name, layers] = min(token_ms(model, args.tokens) for _ in range(args.rounds))
    print("\n| framework, ms per layer and token | |\n|---|--:|")
    for name in ("Hugging Face", "ours"):
        print(f"| {name} | {(costs[name, 26] - costs[name, 2]) / 24:.3f} |")


if __name__ == "__main__":
    main()
