"""A model sharded at ZeRO stage 3 that generates, beside the same model whole, in the same ranks and the same rounds.

    python benchmarks/generation.py [--ranks 2] [--tokens 128] [--rounds 5]

A Llama of 25M parameters, one thread a rank, greedy. Each rank answers its own prompt, and its answer has another length: the first `tokens`, the
next half as many, and so on. Sharded: `deepspeed.zero.unwrap_model_for_generation` from entering to leaving, its gather included. Whole: the
module that `initialize` was given, without an engine. Both in every round, in turn. A rank's time is its own, the best of the rounds; the time of its processor
(all threads, the median) beside it is what other work on the machine leaves alone. Tokens must be equal.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from in_ranks import measure_and_report

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def model() -> Any:
    """A Llama with random weights that ends no answer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def generate_sharded(engine: Any, prompt: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """With its gather."""
    import deepspeed

    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        words: torch.Tensor = module.generate(prompt, **options)
    return words


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, tuple[float, float]]:
    """What it returns, and seconds on the wall and of the processor, from when all ranks are there."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, (time.perf_counter() - wall, time.process_time() - cpu)


def work(args: argparse.Namespace) -> None:
    """In a rank: both ways in each round; the first rank writes all ranks' figures."""
    import deepspeed

    torch.set_num_threads(1)
    plain = model()
    engine, *_ = deepspeed.initialize(model=copy.deepcopy(plain), config=CONFIG)
    engine.eval()
    rank = dist.get_rank()
    prompt = torch.arange(3 + rank, 35 + rank).unsqueeze(0)
    length = max(args.tokens >> rank, 1)
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    seconds: dict[str, list[float]] = {key: [] for key in ("whole", "sharded", "whole_cpu", "sharded_cpu")}
    same = True
    for round_ in range(args.rounds + 1):
        words, whole = timed(lambda: plain.generate(prompt, **options))
        found, sharded = timed(lambda: generate_sharded(engine, prompt, options))
        same = same and torch.equal(words, found)
        for name, (wall, cpu) in (("whole", whole), ("sharded", sharded)) if round_ else ():  # the first warms up
            seconds[name].append(wall)
            seconds[f"{name}_cpu"].append(cpu)
    mine = {key: (statistics.median if "cpu" in key else min)(values) for key, values in seconds.items()}
    mine |= {"tokens": length, "same": same}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    if rank == 0:
        Path(args.worker).write_text(json.dumps(told))


def report(args: argparse.Namespace, ranks: list[dict[str, Any]]) -> None:
    """A row for each rank. Raises where tokens differ."""
    print("\n| rank | tokens | whole, s | stage 3, s | times | CPU: whole, s | stage 3, s | times | tokens equal |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    for number, rank in enumerate(ranks):
        cells = [f"{number}", f"{rank['tokens']}"]
        for kind in ("", "_cpu"):
            whole, sharded = rank[f"whole{kind}"], rank[f"sharded{kind}"]
            cells += [f"{whole:.3f}", f"{sharded:.3f}", f"{sharded / whole:.2f}"]
        print(f"| {' | '.join(cells)} | {'yes' if rank['same'] else 'NO'} |")
    assert all(rank["same"] for rank in ranks), "stage 3 says other words than the whole model"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    measure_and_report(parser, __file__, work, report)


if __name__ == "__main__":
    main()
