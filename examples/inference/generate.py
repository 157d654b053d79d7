"""Words from a Hugging Face model: once, quantized, or in a conversation.

    python examples/inference/generate.py --model path/or/name --prompt "The sea"
    python examples/inference/generate.py --model path/or/name --dtype int4 --chat
    deepspeed --num_accelerators 2 examples/inference/generate.py --model path/or/name --tp 2

Without --model: a small model with random weights that reads and writes bytes, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
import transformers

import deepspeed


class Bytes:
    """A tokenizer for the model without a name: a token is a byte."""

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [1, bytes]."""
        ids = torch.tensor([list(text.encode())])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        """Bytes as text."""
        return bytes(ids.tolist()).decode(errors="replace")


def load(name: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if name is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(vocab_size=256, eos_token_id=None, pad_token_id=0, bos_token_id=1, **sizes)
    return transformers.LlamaForCausalLM(config), Bytes()


def answer(engine: Any, tokenizer: Any, text: str, num_tokens: int) -> str:
    """What the model says after a text; how fast goes to stderr."""
    batch = tokenizer(text, return_tensors="pt")
    start = time.perf_counter()
    found = engine.generate(**batch, max_new_tokens=num_tokens, do_sample=False)[0, batch["input_ids"].shape[1] :]
    speed = len(found) / (time.perf_counter() - start)
    if os.environ.get("RANK", "0") == "0":
        print(f"{len(found)} tokens, {speed:.1f} per second", file=sys.stderr)
    return str(tokenizer.decode(found, skip_special_tokens=True))


def _asked() -> str:
    """A line from the terminal; empty where it ends."""
    try:
        return input("> ")
    except EOFError:
        return ""


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--prompt", default="The sea")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    engine = deepspeed.init_inference(model, dtype=args.dtype, tensor_parallel={"tp_size": args.tp})
    if not args.chat:
        print(args.prompt + answer(engine, tokenizer, args.prompt, args.tokens))
        return
    if args.tp > 1:
        parser.error("--chat reads one terminal, so it is for one rank")
    said = ""
    print("an empty line ends the conversation")
    while line := _asked():
        said += line + "\n"
        found = answer(engine, tokenizer, said, args.tokens)
        said += found + "\n"
        print(found)


if __name__ == "__main__":
    main()
