"""The longest sequence on which a 50M-parameter model trains in 4 GiB: plain Transformers, and with tiles and checkpoints.

    python benchmarks/long_sequence.py [--gib 4] [--times 10] [--original PYTHON]

Llama's shape with Llama 3's vocabulary of 128,256: logits are what plain training spends its memory on. Each trial is a process
of its own that trains one step of AdamW in fp32 on one sequence and tells the peak of its resident memory. Two short
trials give memory per token and from that the longest sequence: for plain training confirmed by a third one at 97 % of it, for ours
from trials of which the longer one has `--times` as many tokens as plain training managed. Then both at plain training's longest: seconds per token.
`--original` names a Python that has the original installed; its tiled MLP and loss are then measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

VARIANTS = ("plain", "checkpoints", "ours")
GIB = 1 << 30


def trial(variant: str, length: int) -> dict[str, float]:
    """One step; the peak in bytes and the seconds of forward, backward and step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=320,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.train()
    if variant != "plain":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(config.vocab_size, (1, length))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)[None]}
    if variant == "ours":
        step = _ours(model, batch)
    elif variant == "original":
        step = _original(model, batch)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    start_s = time.perf_counter()
    step()
    seconds = time.perf_counter() - start_s
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}


def _engine(model: Any) -> Any:
    import deepspeed

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
        "steps_per_print": 1 << 30,
    }
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed.initialize(model=model, config=config)[0]


def _ours(model: Any, batch: Any) -> Any:
    from deepspeed.sequence import tile_model

    engine = _engine(tile_model(model, mlp_tokens=2048, loss_tokens=256))

    def step() -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return step


def _original(model: Any, batch: Any) -> Any:
    import torch.nn.functional as F

    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    for layer in model.model.layers:
        mlp = layer.mlp
        forward, params = mlp.forward, list(mlp.parameters())

        def tiled(x: Any, mlp: Any = mlp, forward: Any = forward, params: Any = params) -> Any:
            return TiledMLP.apply(lambda _, tile: forward(tile), mlp, x, max(1, -(-x.shape[1] // 2048)), params)

        mlp.forward = tiled
    engine = _engine(model)
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]

    def loss_of(module: Any, x: Any, y: Any) -> Any:
        return F.cross_entropy(module(x).float().flatten(0, 1), y.flatten(), reduction="sum")

    def step() -> None:
        hidden = engine.module.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
        head, length = engine.module.lm_head, hidden.shape[1]
        loss = TiledFusedLogitsLoss.apply(
            loss_of, head, hidden, targets, None, max(1, -(-length // 256)), list(head.parameters()), "sum"
        )
        engine.backward(loss / length)
        engine.step()

    return step


def run(variant: str, length: int, python: str) -> dict[str, float]:
    """A trial in a process of its own."""
    command = [python, __file__, "--trial", variant, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} at {length} tokens failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"  {variant:12} {length:7d} tokens   peak {found['peak'] / GIB:5.2f} GiB   {found['seconds']:7.1f} s",
        flush=True,
    )
    return found


def fit(variant: str, limit: float, python: str, lengths: tuple[int, int]) -> int:
    """The longest sequence that two short ones predict."""
    low, high = (run(variant, length, python)["peak"] for length in lengths)
    per_token = (high - low) / (lengths[1] - lengths[0])
    longest = int(lengths[1] + (limit - high) / per_token)
    print(f"  {variant:12} {per_token / 1024:7.1f} KiB per token: {longest} tokens in {limit / GIB:g} GiB", flush=True)
    return longest


def main() -> None:
    """Trials, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", nargs=2, metavar=("VARIANT", "LENGTH"))
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--original", default=None, help="a Python with the original installed")
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(trial(args.trial[0], int(args.trial[1]))))
        return
    import torch
    import transformers

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        end="",
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; load {os.getloadavg()[0]:.1f}")
    limit, here = args.gib * GIB, sys.executable
    predicted = fit("plain", limit, here, (1024, 1536))
    plain = int(predicted * 0.97)
    at_plain = run("plain", plain, here)
    ours_at_plain = run("ours", plain, here)
    many = int(plain * args.times)
    # Between long ones: of a short sequence the peak is the optimizer's, and tells nothing of tokens.
    longest = {"plain": plain, "ours": fit("ours", limit, here, (many // 2, many))}
    if args.original:
        longest["original"] = fit("original", limit, args.original, (many // 2, many))
    print("\n| | longest in the limit | of plain | |\n|---|--:|--:|---|")
    for variant, tokens in longest.items():
        print(f"| {variant} | {tokens} | {tokens / plain:.1f} | {'predicted' if variant != 'plain' else 'run'} |")
    print(f"| ours | {many} | {args.times:.1f} | run |")
    ratio = ours_at_plain["seconds"] / at_plain["seconds"]
    print(
        f"\nSeconds per token at {plain} tokens: plain {at_plain['seconds'] / plain:.5f}, ours {ratio:.2f} times that."
    )


if __name__ == "__main__":
    main()
