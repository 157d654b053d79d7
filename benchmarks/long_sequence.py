"""The longest sequence on which a 50M-parameter model trains in 4 GiB: plain Transformers, and with tiles and checkpoints.

    python benchmarks/long_sequence.py [--gib 4] [--times N] [--original PYTHON] [--tuned] [--most TOKENS]

Llama's shape with Llama 3's vocabulary of 128,256: logits are what plain training spends its memory on. Each trial is a process
of its own that trains two steps of AdamW in fp32, on 64 tokens and on one long sequence, so that moments are there, and tells the peak
of its resident memory. For plain training two trials give memory per token, and a third at 97 % of what that allows confirms it. For the others
lengths double from 3,072 on, until one passes the limit or the next would pass `--most` (24,576; each doubling takes 2 to 4 times as long):
between two trials on both sides of the limit the longest is interpolated, beyond the last it is predicted, and the table says which.
`--original` names a Python that has the original installed; its tiled MLP and loss (the ALST stack of one rank) are measured in the same way, and
ours is then run at 1.3 times the original's longest, as with `--times N` at N times plain's. Attention is quadratic in time, so what is
predicted far beyond is not run. `--tuned` measures both once more with glibc's MALLOC_MMAP_THRESHOLD_ at 1 MiB, which ours sets by itself.
Times are CPU seconds per token of the long step, on one thread, at plain's longest and, with each doubling, of ours to the original's.
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
TUNED = ", tuned"


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

    def batch_of(tokens: int) -> Any:
        ids = torch.randint(config.vocab_size, (1, tokens))
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}

    if variant == "ours":
        step = _ours(model)
    elif variant == "original":
        step = _original(model)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(batch: Any) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    step(batch_of(64))
    batch = batch_of(length)
    start_s = time.process_time()
    step(batch)
    seconds = time.process_time() - start_s
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


def _ours(model: Any) -> Any:
    from deepspeed.sequence import tile_model

    engine = _engine(tile_model(model, mlp_tokens=2048, loss_tokens=512))

    def step(batch: Any) -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return step


def _original(model: Any) -> Any:
    import torch.nn.functional as F

    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    for layer in model.model.layers:
        mlp = layer.mlp
        forward, params = mlp.forward, list(mlp.parameters())

        def tiled(x: Any, mlp: Any = mlp, forward: Any = forward, params: Any = params) -> Any:
            return TiledMLP.apply(lambda _, tile: forward(tile), mlp, x, max(1, -(-x.shape[1] // 2048)), params)

        mlp.forward = tiled
    engine = _engine(model)

    def loss_of(module: Any, x: Any, y: Any) -> Any:
        logits = module(x).float()  # the original's tiles have no batch dimension where it is 1
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum")

    def step(batch: Any) -> None:
        targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        hidden = engine.module.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
        head, length = engine.module.lm_head, hidden.shape[1]
        loss = TiledFusedLogitsLoss.apply(
            loss_of, head, hidden, targets, None, max(1, -(-length // 512)), list(head.parameters()), "sum"
        )
        engine.backward(loss / length)
        engine.step()

    return step


def run(variant: str, length: int, python: str, tuned: bool = False) -> dict[str, float]:
    """A trial in a process of its own."""
    command = [python, __file__, "--trial", variant, str(length)]
    more = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if tuned else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    if done.returncode:
        raise SystemExit(f"{variant} at {length} tokens failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"  {variant + TUNED * tuned:16} {length:7d} tokens   peak {found['peak'] / GIB:5.2f} GiB   {found['seconds']:7.1f} s",
        flush=True,
    )
    return found


def on_a_line(peaks: dict[int, float], limit: float) -> int:
    """The length at which the line through the two longest trials meets the limit."""
    first, second = sorted(peaks)[-2:]
    per_token = (peaks[second] - peaks[first]) / (second - first)
    print(f"    {per_token / 1024:7.1f} KiB per token from {first} to {second}", flush=True)
    return int(second + (limit - peaks[second]) / per_token)


def search(variant: str, limit: float, python: str, most: int, tuned: bool) -> tuple[int, str, dict[int, float]]:
    """The longest sequence, how it is known, and the seconds of each trial by its length."""
    peaks: dict[int, float] = {}
    seconds: dict[int, float] = {}
    length = 3072
    while length <= most or len(peaks) < 2:
        found = run(variant, length, python, tuned)
        peaks[length], seconds[length] = found["peak"], found["seconds"]
        if found["peak"] > limit and len(peaks) > 1:
            break
        length *= 2
    how = "interpolated" if max(peaks.values()) > limit else f"predicted from {max(peaks)}"
    return on_a_line(peaks, limit), how, seconds


def plain_longest(limit: float) -> tuple[int, float]:
    """Plain training's longest, run, and its CPU seconds."""
    peaks = {length: run("plain", length, sys.executable)["peak"] for length in (512, 768)}
    longest = int(on_a_line(peaks, limit) * 0.97)
    return longest, run("plain", longest, sys.executable)["seconds"]


def confirm(tokens: int, times: str, limit: float) -> None:
    """A row of the table: ours at so many tokens."""
    peak = run("ours", tokens, sys.executable)["peak"]
    verdict = "within" if peak <= limit else "NOT within"
    print(f"| ours | {tokens} | {times} | | run, peak {peak / GIB:.2f} GiB, {verdict} the limit |", flush=True)


def compare(args: argparse.Namespace) -> None:
    """Trials, and the table."""
    limit, here = args.gib * GIB, sys.executable
    plain, plain_seconds = plain_longest(limit)
    pythons = {"ours": here, **({"original": args.original} if args.original else {})}
    at_equal = {variant: run(variant, plain, python)["seconds"] / plain_seconds for variant, python in pythons.items()}
    found = {
        variant + TUNED * tuned: search(variant, limit, python, args.most, tuned)
        for tuned in ([False, True] if args.tuned else [False])
        for variant, python in pythons.items()
    }
    print("\n| | longest in the limit | of plain | CPU seconds per token, of plain | |\n|---|--:|--:|--:|---|")
    print(f"| plain | {plain} | 1.0 | 1.00 | run |")
    for name, (tokens, how, _) in found.items():
        ratio = f"{at_equal[name]:.2f}" if name in at_equal else ""
        print(f"| {name} | {tokens} | {tokens / plain:.1f} | {ratio} | {how} |", flush=True)
    if args.original:
        ours, theirs = found["ours"][2], found["original"][2]
        both = ", ".join(f"{ours[n] / theirs[n]:.2f} at {n}" for n in sorted(ours.keys() & theirs.keys()))
        print(
            f"CPU seconds per token of ours, of the original's: {at_equal['ours'] / at_equal['original']:.2f} at {plain}, {both}"
        )
        for tuned in [False, True] if args.tuned else [False]:
            times = found["ours" + TUNED * tuned][0] / found["original" + TUNED * tuned][0]
            print(f"longest of ours, of the original's{TUNED * tuned}: {times:.2f}")
    if args.times:
        confirm(int(plain * args.times), f"{args.times:.1f}", limit)
    if args.original:
        confirm(int(found["original"][0] * 1.3), "1.3 of the original's", limit)


def main() -> None:
    """One trial, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", nargs=2, metavar=("VARIANT", "LENGTH"))
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--times", type=float, default=0.0, help="run ours at so many times plain's longest")
    parser.add_argument("--original", default=None, help="a Python with the original installed")
    parser.add_argument("--most", type=int, default=24576, help="the longest trial of a search")
    parser.add_argument("--tuned", action="store_true", help="once more with MALLOC_MMAP_THRESHOLD_ at 1 MiB")
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
    compare(args)


if __name__ == "__main__":
    main()
