"""How much of a pipeline's time is work: real layers on two ranks, and stages that sleep on four and eight.

    python benchmarks/pipeline.py            real layers, 2 stages x 8 micro-batches
    python benchmarks/pipeline.py --sleep    every schedule against its printed bubble

Sleeping stages need no cores, so their clock is true on a small machine that is quiet; on a busy one sleepers are woken late, which is
counted. How much of that is ours is in the CPU time per action (messages and Python, no sleep), which other programs hardly change:
a hop cannot cost less than that, and a unit must be long beside it for the printed bubble to be seen. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.parallel.pipeline.check import Costs, simulate
from deepspeed.parallel.pipeline.executor import Executor
from deepspeed.parallel.pipeline.mail import Mail, Post
from deepspeed.parallel.pipeline.schedules import NAMED

REAL = ("gpipe", "1f1b", "zb-h1", "zb-h2")


class Sleeper(Executor):
    """Sleeps a unit per forward, input gradient and weight gradient; values are one number."""

    op = Op.FORWARD

    def _carry_out(self, actions: Actions, action: Action, trains: bool, puts_off: bool) -> None:
        self._work.op = action.op  # type: ignore[attr-defined]
        if action.op is Op.WEIGHT:
            self._work.sleep(1)  # type: ignore[attr-defined]
        super()._carry_out(actions, action, trains, puts_off)


class SleepingWork:
    """See executor.Work."""

    op = Op.FORWARD

    def __init__(self, share: float, unit_s: float) -> None:
        self.share, self.unit_s, self.late_s = share, unit_s, 0.0

    def sleep(self, units: int) -> None:
        """Sleep, and note by how much the system woke this rank too late."""
        asked, began = units * self.unit_s / self.share, time.perf_counter()
        time.sleep(asked)
        self.late_s += time.perf_counter() - began - asked

    def load(self, micro: int) -> Tensor:
        return torch.zeros(1)

    def forward(self, stage: int, inputs: Tensor) -> Tensor:
        self.sleep(1)
        return inputs.detach() * torch.ones(1, requires_grad=True)

    def loss(self, outputs: Tensor, micro: int) -> Tensor:
        return outputs.sum()

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self.sleep(2 if self.op is Op.BACKWARD else 1)

    def trains(self, stage: int) -> bool:
        return True


def sleep_rank(rank: int, ranks: int, cases: list[tuple[str, int, float]], results: Any) -> None:
    """One rank's part of all cases."""
    _join(rank, ranks)
    for name, micro, unit_s in cases:
        actions = NAMED[name](ranks, micro)
        share = actions.num_stages / ranks
        made = dist.new_group(list(range(ranks))), dist.new_group(list(range(ranks)))
        groups = {(there, up): made[not there] for there in (True, False) for up in (True, False)}
        sleeping = SleepingWork(share, unit_s)
        executor = Sleeper(rank, Mail(Post(list(range(ranks)), rank, groups, torch.device("cpu"))), sleeping)
        dist.barrier()
        cpu_s = -time.process_time()
        executor.run(actions)
        cpu_s += time.process_time()
        ends = torch.tensor(
            [-executor.done[0].start_s, executor.done[-1].end_s, sleeping.late_s, cpu_s / len(executor.done)],
            dtype=torch.float64,
        )
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if rank == 0:
            planned = simulate(actions, Costs.equal(actions.num_stages)).bubble
            work, span = 3 * micro * unit_s, float(ends[:2].sum())
            seen = 1 - work / span, float(ends[2]) / span, 1e3 * float(ends[3])
            results.append((name, ranks, micro, unit_s * 1e3, planned, *seen, executor.peak_alive))
    dist.destroy_process_group()


def real_rank(rank: int, ranks: int, names: Sequence[str], results: Any) -> None:
    """Real layers through the engine; the time of one process is measured first, alone on its core."""
    _join(rank, ranks)
    import deepspeed
    from deepspeed.pipe import PipelineModule

    width, micro = 768, 8

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)]

    data = [(torch.randn(256, width), torch.randn(256, width)) for _ in range(micro)]
    for name in names:
        module = PipelineModule(layers(), num_stages=ranks, loss_fn=nn.MSELoss(), partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": 256, "gradient_accumulation_steps": micro, "pipeline": {"schedule": name},
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        }  # fmt: skip
        engine = deepspeed.initialize(model=module, config=config)[0]
        best = 0.0
        for _ in range(8):
            engine.train_batch(iter(data))
            done = engine.actions_done
            both = torch.tensor([-done[0].start_s, done[-1].end_s], dtype=torch.float64)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            busy = torch.tensor(sum(d.end_s - d.start_s - d.waited_s for d in done), dtype=torch.float64)
            dist.all_reduce(busy)
            best = max(best, float(busy / (ranks * both.sum())))
        if rank == 0:
            results.append((name, best))
        engine.destroy()
    dist.destroy_process_group()


def _join(rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="29641"
    )
    dist.init_process_group("gloo", rank=rank, world_size=ranks)


def _machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit}, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sleep", action="store_true")
    parser.add_argument(
        "--unit-ms", type=float, nargs="+", default=[20.0], help="a forward, an input or a weight gradient"
    )
    parser.add_argument("--micro", type=int, nargs="+", help="micro-batches, 2 x ranks and 64 without it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    results: Any = mp.Manager().list()
    print(_machine(), flush=True)
    if not args.sleep:
        mp.spawn(real_rank, (2, REAL, results), 2)
        print("| schedule | efficiency (work / time of both ranks), best of 8 |\n|---|--:|")
        for name, efficiency in results:
            print(f"| {name} | {efficiency:.3f} |")
        return
    for ranks in args.ranks:
        names = [name for name in NAMED if name != "interleaved"]
        cases = [
            (name, m, unit / 1e3) for unit in args.unit_ms for name in names for m in args.micro or (2 * ranks, 64)
        ]
        mp.spawn(sleep_rank, (ranks, cases, results), ranks)
    print(
        "| schedule | ranks | micro-batches | unit, ms | bubble, printed | measured | of it woken late by the system "
        "| CPU ms per action, most of a rank | peak alive, first rank |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, ranks, micro, unit, planned, measured, late, cpu, peak in results:
        print(
            f"| {name} | {ranks} | {micro} | {unit:g} | {planned:.1%} | {measured:.1%} | {late:.1%} | {cpu:.2f} | {peak} |"
        )


if __name__ == "__main__":
    main()
