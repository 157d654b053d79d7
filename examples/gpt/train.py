"""Train a GPT on bytes with DeepSpeed.

    deepspeed --num_accelerators 2 examples/gpt/train.py --deepspeed_config examples/gpt/zero2.json

Four lines are DeepSpeed's: `initialize`, the forward through the engine, `backward`, `step`. Everything else is what
any training script has. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import Text
from model import Gpt, GptConfig
from plain import PlainEngine
from torch import Tensor
from tqdm import tqdm

import deepspeed

LOG_EVERY = 5


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps")
    parser.add_argument("--seq", type=int, default=64, help="bytes per sample")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tied", action="store_true", help="use the embedding as the output layer too")
    parser.add_argument("--data", type=Path, help="text file or folder; default: the Python standard library's sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="where to write; default: runs/gpt-<name of the JSON>")
    parser.add_argument("--eval-batches", type=int, default=16, help="micro-batches per validation, all ranks together")
    parser.add_argument("--sample-bytes", type=int, default=240, help="length of the generated text; 0: none")
    parser.add_argument("--plain", type=int, metavar="RANKS", help="plain PyTorch on the joined batch of so many ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = deepspeed.add_config_arguments(parser).parse_args(arguments)
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is missing; examples/gpt/zero2.json is one")
    args.run_dir = args.run_dir or Path("runs", f"gpt-{Path(args.deepspeed_config).stem}{'-plain' * bool(args.plain)}")
    return args


def warmup_then_cosine(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LambdaLR]:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the learning rate."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_engine(args: argparse.Namespace) -> Any:
    torch.manual_seed(args.seed)
    # A model whose parameters rest on another tier need not fit into memory while it is built, either.
    zero = json.loads(Path(args.deepspeed_config).read_text()).get("zero_optimization", {})
    with deepspeed.zero.Init(
        config_dict_or_path=args.deepspeed_config, enabled="offload_param" in zero and not args.plain
    ):
        model = Gpt(GptConfig(seq=args.seq, width=args.width, layers=args.layers, heads=args.heads, tied=args.tied))
    scheduler = warmup_then_cosine(args.steps)
    if args.plain:
        return PlainEngine(model, args.deepspeed_config, args.plain, scheduler)
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, lr_scheduler=scheduler)
    return engine


class Batches:
    """This rank's micro-batches; with `--plain` those of all ranks joined."""

    def __init__(self, args: argparse.Namespace, engine: Any) -> None:
        self.text = Text(args.data)
        self.seq, self.seed, self.device = args.seq, args.seed, engine.device
        self.samples = engine.train_micro_batch_size_per_gpu()
        self.ranks = range(args.plain) if args.plain else [rank()]

    def __call__(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """The index-th micro-batch, (x, y) of [samples, seq]."""
        drawn = [
            self.text.batch(split, self.samples, self.seq, seed=self.seed, index=index, rank=r) for r in self.ranks
        ]
        return torch.cat([x for x, _ in drawn]).to(self.device), torch.cat([y for _, y in drawn]).to(self.device)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_ranks(values: list[Tensor]) -> float:
    """The mean of some scalars and of all ranks; waits for the device."""
    mean = torch.stack(values).float().mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def memory_gb(device: torch.device) -> float:
    """Peak memory of this rank: the accelerator's, or the process's where training runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def train(args: argparse.Namespace, engine: Any, batches: Batches) -> list[float]:
    """The loop. Returns the mean loss of every LOG_EVERY steps."""
    accumulation = engine.gradient_accumulation_steps()
    num_ranks = args.plain or (dist.get_world_size() if dist.is_initialized() else 1)
    step_tokens = accumulation * engine.train_micro_batch_size_per_gpu() * num_ranks * args.seq
    history: list[float] = []
    recent: list[Tensor] = []
    engine.train()
    start = time.perf_counter()
    with tqdm(total=args.steps, desc="train", unit="step", disable=rank() != 0, dynamic_ncols=True) as bar:
        for step in range(1, args.steps + 1):
            for micro in range(accumulation):
                loss = engine(*batches("train", (step - 1) * accumulation + micro))
                engine.backward(loss)
                engine.step()
                recent.append(loss.detach())
            if step % LOG_EVERY == 0 or step == args.steps:
                history.append(mean_over_ranks(recent))
                recent.clear()
                speed = step * step_tokens / (time.perf_counter() - start)
                memory = f"{memory_gb(engine.device):.2f} GB"
                bar.set_postfix(
                    {"loss": f"{history[-1]:.3f}", "tokens/s": f"{speed:.0f}", "memory": memory}, refresh=False
                )
            bar.update()
    return history


@torch.no_grad()
def validate(args: argparse.Namespace, engine: Any, batches: Batches) -> float:
    """Mean loss over held-out text, in nats per byte."""
    engine.eval()
    num_batches = max(1, args.eval_batches // (args.plain or (dist.get_world_size() if dist.is_initialized() else 1)))
    return mean_over_ranks([engine(*batches("validation", index)) for index in range(num_batches)])


def write_sample(args: argparse.Namespace, engine: Any) -> str:
    """Let the model write; every rank takes part, because the parameters may be sharded."""
    prompt = torch.tensor([list(b"def ")], device=engine.device)
    written = engine.module.generate(prompt, args.sample_bytes, seed=args.seed)
    return bytes(written[0].tolist()).decode(errors="replace")


def save_curve(path: Path, history: list[float], before: float, after: float, steps: int) -> str:
    """Draw the losses; returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "install matplotlib for a picture of the loss"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    at_steps = [min((i + 1) * LOG_EVERY, steps) for i in range(len(history))]
    axes.plot(at_steps, history, label="training")
    axes.plot([0, steps], [before, after], "o", label="validation")
    axes.set(xlabel="step", ylabel="loss [nats per byte]", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return f"loss curve: {path}"


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    engine = make_engine(args)
    batches = Batches(args, engine)
    before = validate(args, engine, batches)
    history = train(args, engine, batches)
    after = validate(args, engine, batches)
    sample = write_sample(args, engine) if args.sample_bytes else ""
    if rank() == 0:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        losses = {"train": history, "validation": [before, after]}
        (args.run_dir / "losses.json").write_text(json.dumps(losses))
        print(f"validation loss: {before:.3f} -> {after:.3f}")
        print(save_curve(args.run_dir / "loss.png", history, before, after, args.steps))
        if sample:
            print(f"sample:\n{sample}")
    engine.destroy()


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
