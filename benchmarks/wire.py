"""Steps over a slow link: 1-bit optimizers and ZeRO++ beside plain training, bytes counted at the network device.

    sudo python benchmarks/wire.py [--rate 1gbit] [--ranks-per-node 2] [--steps 6]      two network namespaces and `tc`
    python benchmarks/wire.py --loss [--seeds 5]                                        final losses, on this machine alone

The first makes two namespaces (nodes) joined by one link of that rate, starts ranks in both, and prints for every case the
milliseconds a step took and the bytes that left one node, by the device's own counter. Needs root, iproute2 and Linux. The
second trains a small GPT with every optimizer from several seeds on 2 ranks. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEVICE = "wire"
FREEZE = 3
ONE_BIT = {"lr": 1e-3, "freeze_step": FREEZE}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "stage 0, Adam": ({"type": "Adam", "params": {"lr": 1e-3}}, {"stage": 0}, False),
    "stage 0, 1-bit Adam": ({"type": "OneBitAdam", "params": ONE_BIT}, {"stage": 0}, False),
    "stage 0, 1-bit LAMB": ({"type": "OneBitLamb", "params": ONE_BIT}, {"stage": 0}, False),
    "stage 0, 0/1 Adam": (
        {
            "type": "ZeroOneAdam",
            "params": {"lr": 1e-3, "var_freeze_step": FREEZE, "local_step_scaler": 1, "local_step_clipper": 4},
        },
        {"stage": 0},
        False,
    ),
    "stage 1, 1-bit Adam": ({"type": "OneBitAdam", "params": ONE_BIT}, {"stage": 1}, False),
    "stage 3, Adam, bf16": ({"type": "Adam", "params": {"lr": 1e-3}}, {"stage": 3}, True),
    "stage 3, hpZ": ({"type": "Adam", "params": {"lr": 1e-3}}, {"stage": 3, "hpz": True}, True),
    "stage 3, qwZ + qgZ": (
        {"type": "Adam", "params": {"lr": 1e-3}},
        {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True},
        True,
    ),
    "stage 3, qwZ + qgZ + hpZ": (
        {"type": "Adam", "params": {"lr": 1e-3}},
        {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True, "hpz": True},
        True,
    ),
}
"""Optimizer, `zero_optimization` (hpz: copies among a node's ranks), whether bf16."""


def make_model(width: int, depth: int) -> Any:
    """A small GPT."""
    import torch
    from torch import nn

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(512, width), nn.Parameter(torch.zeros(64, width))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
            self.head = nn.Linear(width, 512)

        def forward(self, x: Any) -> Any:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1] - 1).to(self.place.dtype)
            h = self.embed(x[:, :-1]) + self.place[: x.shape[1] - 1]
            for block in self.blocks:
                h = block(h, src_mask=mask, is_causal=True)
            return nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), x[:, 1:].flatten())

    return Gpt()


def batch_of(step: int, rank: int, samples: int, length: int) -> Any:
    """Sequences that can be learnt: each token follows from the one before by one of two rules, at random."""
    import torch

    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randint(0, 512, (samples, length + 1), generator=generator)
    coin = torch.rand(samples, length, generator=generator) < 0.7
    for i in range(length):
        x[:, i + 1] = torch.where(coin[:, i], (5 * x[:, i] + 7) % 512, (3 * x[:, i] + 1) % 512)
    return x


def config_of(optimizer: dict[str, Any], zero: dict[str, Any], bf16: bool, near: int, micro: int) -> dict[str, Any]:
    """The configuration of one case."""
    zero = dict(zero)
    if zero.pop("hpz", False):
        zero["zero_hpz_partition_size"] = near
    if zero["stage"] == 3:
        zero |= {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 5000}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": optimizer,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }


def sent_bytes() -> int:
    """Bytes that have left this node over the link."""
    return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text())


def work(near: int, num_steps: int, only: str) -> None:
    """One rank: every case; the first of each node prints what it saw."""
    import torch
    import torch.distributed as dist

    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for name, (optimizer, zero, bf16) in CASES.items():
        if (zero.get("hpz") and near < 2) or not re.search(only, name):
            continue
        torch.manual_seed(0)
        engine, *_ = deepspeed.initialize(model=make_model(256, 8), config=config_of(optimizer, zero, bf16, near, 1))
        times, bytes_of = [], []
        for step in range(FREEZE + 2 + num_steps):
            dist.barrier()
            start, before = time.perf_counter(), sent_bytes()
            engine.backward(engine(batch_of(step, dist.get_rank(), 1, 32)))
            engine.step()
            dist.barrier()
            times.append(time.perf_counter() - start)
            bytes_of.append(sent_bytes() - before)
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        engine.destroy()
        if dist.get_rank() == 0:
            kept = bytes_of[FREEZE + 2 :]
            row = {
                "name": name,
                "ms": 1e3 * statistics.median(times[FREEZE + 2 :]),
                "bytes": statistics.mean(kept),
                "numel": numel,
            }
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def throttled(rate: str, near: int, num_steps: int, only: str) -> None:
    """Make the nodes and the link, run, print the table, take all down."""
    nodes = [f"wire{os.getpid()}n{i}" for i in range(2)]
    try:
        for node in nodes:
            _run("ip", "netns", "add", node)
        _run(
            "ip",
            "link",
            "add",
            "name",
            DEVICE,
            "netns",
            nodes[0],
            "type",
            "veth",
            "peer",
            "name",
            DEVICE,
            "netns",
            nodes[1],
        )
        for i, node in enumerate(nodes):
            inside = ["ip", "netns", "exec", node]
            _run(*inside, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run(*inside, "ip", "link", "set", device, "up")
            _run(
                *inside,
                "tc",
                "qdisc",
                "add",
                "dev",
                DEVICE,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "256kb",
                "latency",
                "400ms",
            )
        rows = _ranks(nodes, near, num_steps, only)
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node], check=False)
    _print(rows, rate, near)


def _ranks(nodes: list[str], near: int, num_steps: int, only: str) -> list[dict[str, Any]]:
    processes = []
    for rank in range(2 * near):
        env = {
            "RANK": rank, "WORLD_SIZE": 2 * near, "LOCAL_RANK": rank % near, "LOCAL_WORLD_SIZE": near,
            "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29611, "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        command = ["ip", "netns", "exec", nodes[rank // near], "env", *(f"{key}={value}" for key, value in env.items())]
        command += [
            sys.executable,
            __file__,
            "--worker",
            "--ranks-per-node",
            str(near),
            "--steps",
            str(num_steps),
            "--only",
            only,
        ]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    failed = [i for i, process in enumerate(processes) if process.returncode]
    if failed:
        raise SystemExit(f"ranks {failed} failed; see above")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _print(rows: list[dict[str, Any]], rate: str, near: int) -> None:
    _machine()
    print(f"2 nodes x {near} ranks, link {rate}, GPT of {rows[0]['numel'] / 1e6:.1f}M parameters, one thread a rank\n")
    print("| case | ms a step | MB that leave a node | bits per parameter | time beside plain | bytes beside plain |")
    print("|---|--:|--:|--:|--:|--:|")
    plain: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = plain.setdefault("stage 3" if row["name"].startswith("stage 3") else "below", row)
        print(
            f"| {row['name']} | {row['ms']:.0f} | {row['bytes'] / 1e6:.2f} | {8 * row['bytes'] / row['numel']:.2f} | "
            f"{row['ms'] / base['ms']:.2f} | {row['bytes'] / base['bytes']:.3f} |"
        )


def losses(args: argparse.Namespace) -> None:
    """Final losses of every optimizer, from several seeds, on 2 ranks of this machine."""
    import torch.multiprocessing as mp

    from deepspeed.utils.ports import free_port

    queue = mp.get_context("spawn").SimpleQueue()
    args.steps = max(args.steps, 300)
    mp.start_processes(_train_all, (args, queue, free_port()), nprocs=2, start_method="spawn")
    found: dict[str, list[float]] = {}
    while not queue.empty():
        name, loss = queue.get()
        found.setdefault(name, []).append(loss)
    _machine()
    print(
        f"GPT of 0.3M parameters, 2 ranks, {args.steps} steps, a share of {args.freeze:g} of them without compression, "
        f"betas [0.9, {args.beta2:g}], lr {args.lr:g}, factor_max {args.factor_max:g}, seeds {args.first_seed} to {args.first_seed + args.seeds - 1}\n"
    )
    print("| optimizer | final loss, mean over seeds | beside plain |\n|---|--:|--:|")
    base = {"LAMB": "LAMB", "1-bit LAMB": "LAMB"}
    means = {name: statistics.mean(values) for name, values in found.items()}
    for name, mean in means.items():
        plain = means.get(base.get(name, "Adam"), mean)
        print(f"| {name} | {mean:.4f} | {100 * (mean / plain - 1):+.2f} % |")


def _kinds(args: argparse.Namespace, freeze: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Every optimizer, with its `zero_optimization`."""
    common: dict[str, Any] = {"lr": args.lr, "betas": [0.9, args.beta2]}
    adam = {"type": "Adam", "params": {**common, "bias_correction": False}}
    lamb = {**common, "lr": 5 * args.lr}
    factors = {"factor_max": args.factor_max, "factor_min": 0.5 if args.factor_max > 1 else 1.0}
    local = {"var_freeze_step": freeze, "local_step_scaler": args.steps, "local_step_clipper": 2}
    whole = {"stage": 0}
    return {
        "Adam": (adam, whole),
        "1-bit Adam": ({"type": "OneBitAdam", "params": {**common, "freeze_step": freeze}}, whole),
        "0/1 Adam": ({"type": "ZeroOneAdam", "params": {**common, **local}}, whole),
        "LAMB": ({"type": "Lamb", "params": {**lamb, "bias_correction": False}}, whole),
        "1-bit LAMB": ({"type": "OneBitLamb", "params": {**lamb, "freeze_step": freeze, **factors}}, whole),
        "stage 3, qwZ + qgZ": (adam, {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}),
    }


def _train_all(rank: int, args: argparse.Namespace, queue: Any, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    import torch

    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    num_steps, freeze = args.steps, round(args.freeze * args.steps)
    warm_up = min(freeze // 2, num_steps // 10)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, (optimizer, zero) in _kinds(args, freeze).items():
            if not re.search(args.only, name):
                continue
            config = config_of(optimizer, zero, False, 1, 8)
            config["scheduler"] = {"type": "WarmupDecayLR", "params": {
                "total_num_steps": num_steps, "warmup_num_steps": warm_up, "warmup_max_lr": optimizer["params"]["lr"]}}  # fmt: skip
            loss = _final_loss(config, seed, rank, num_steps)
            if rank == 0:
                queue.put((name, loss))
                print(f"seed {seed}, {name}: {loss:.4f}", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()


def _final_loss(config: dict[str, Any], seed: int, rank: int, num_steps: int) -> float:
    """The mean over ranks and the last 20 steps of one run."""
    import torch

    import deepspeed

    torch.manual_seed(seed)
    engine, *_ = deepspeed.initialize(model=make_model(64, 4), config=config)
    last = []
    for step in range(num_steps):
        loss = engine(batch_of(10**4 * (seed + 1) + step, rank, 8, 32))
        engine.backward(loss)
        engine.step()
        if step >= num_steps - 20:
            value = loss.detach().double()
            torch.distributed.all_reduce(value)
            last.append(value.item() / 2)
    engine.destroy()
    return statistics.mean(last)


def _machine() -> None:
    import torch

    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=root
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {found.stdout.strip()}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--freeze", type=float, default=0.2, help="the share of steps before compression, with --loss")
    parser.add_argument("--beta2", type=float, default=0.95, help="with --loss")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="of Adam and its forms; LAMB's is 5 times that; with --loss"
    )
    parser.add_argument("--factor-max", type=float, default=1.0, help="of 1-bit LAMB, with --loss; 4 is its default")
    parser.add_argument("--only", default="", help="cases in whose name this pattern is found")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.ranks_per_node, args.steps, args.only)
    elif args.loss:
        losses(args)
    else:
        throttled(args.rate, args.ranks_per_node, args.steps, args.only)


if __name__ == "__main__":
    main()
