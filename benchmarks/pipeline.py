"""How much of a pipeline's time is work: real layers on two ranks, and stages that sleep on four and eight.

    python benchmarks/pipeline.py                        real layers, 2 stages x 8 micro-batches
    python benchmarks/pipeline.py --sleep                every schedule against its printed bubble, one batch
    python benchmarks/pipeline.py --sleep --batches 4    batches in a row, through the engine: with and without a barrier

Sleeping stages need no cores, so their clock is true on a small machine. A rank that the system wakes late, or keeps from its core while
it has work, sleeps as much less the next time, unless it has waited for another rank meanwhile: so scheduling noise does not add up, and
the CPU time that an action costs besides its sleep does. How much of that is ours is in the CPU time per action (messages and Python), which other programs hardly change: a hop
cannot cost less than that, and a unit must be long beside it for the printed bubble to be seen. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from deepspeed.engine.pipeline_trace import described
from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.parallel.pipeline.check import Costs, simulate, steady_bubble
from deepspeed.parallel.pipeline.executor import Executor
from deepspeed.parallel.pipeline.mail import Mail, Post
from deepspeed.parallel.pipeline.schedules import NAMED

REAL = ("gpipe", "1f1b", "zb-h1", "zb-h2")


class Clock:
    """Sleeps units of time; `waited_s` tells for how long this rank has waited for others so far."""

    def __init__(self, unit_s: float, waited_s: Callable[[], float]) -> None:
        self._unit_s, self._waited_s = unit_s, waited_s
        self._debt_s = 0.0
        self._before: tuple[float, float, float] | None = None
        """When the last sleep ended: time, of it waited for others, of it on a core."""
        self.late_s = 0.0
        """By how much the system kept this rank from its core, all together."""

    def sleep(self, units: float) -> None:
        """So many units, less what the system has taken since the last sleep and no wait has taken up."""
        now = time.perf_counter(), self._waited_s(), time.thread_time()
        if self._before is not None:
            passed, waited, worked = (a - b for a, b in zip(now, self._before, strict=True))
            taken = max(0.0, passed - waited - worked)
            self.late_s += taken
            self._debt_s = max(0.0, self._debt_s + taken - waited)
        asked = units * self._unit_s - self._debt_s
        time.sleep(max(0.0, asked))
        self._before = time.perf_counter(), now[1], time.thread_time()
        self._debt_s = self._before[0] - now[0] - asked
        self.late_s += max(0.0, self._before[0] - now[0] - max(0.0, asked))


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

    def __init__(self, clock: Clock) -> None:
        self.sleep = clock.sleep

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
        mail = Mail(Post(list(range(ranks)), rank, groups, torch.device("cpu")))
        clock = Clock(unit_s / share, functools.partial(getattr, mail, "waited_s"))
        executor = Sleeper(rank, mail, SleepingWork(clock))
        dist.barrier()
        cpu_s = -time.process_time()
        executor.run(actions)
        cpu_s += time.process_time()
        ends = torch.tensor(
            [-executor.done[0].start_s, executor.done[-1].end_s, clock.late_s, cpu_s / len(executor.done)],
            dtype=torch.float64,
        )
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if rank == 0:
            planned = simulate(actions, Costs.equal(actions.num_stages)).bubble
            work, span = 3 * micro * unit_s, float(ends[:2].sum())
            seen = 1 - work / span, float(ends[2]) / span, 1e3 * float(ends[3])
            results.append((name, ranks, micro, unit_s * 1e3, planned, *seen, executor.peak_alive))
    dist.destroy_process_group()


class SleepingLayer(nn.Module):
    """A layer of the engine's: a unit for its output, one for its input's gradient, one for its weight's."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.before, self.linear = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1, bias=False)
        self.linear.weight.register_hook(lambda gradient: clock.sleep(1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, 1]."""
        self._clock.sleep(1)
        return self.linear(_SleepsBack.apply(x, self.before, self._clock))


class _SleepsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        return x + before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.clock.sleep(1)
        return grads[0], grads[0].reshape(1), None


def row_rank(rank: int, ranks: int, cases: list[tuple[str, int, float, bool]], num_batches: int) -> None:
    """One rank's part of batches in a row, through the engine. The first two are not counted: forms are new, pages are fresh."""
    _join(rank, ranks)
    import deepspeed
    from deepspeed.pipe import PipelineModule

    for name, micro, unit_s, is_late in cases:
        actions = NAMED[name](ranks, micro)
        share, engines = actions.num_stages // ranks, list[Any]()
        clock = Clock(unit_s / share, lambda engines=engines: engines[0]._mail.waited_s if engines else 0.0)  # type: ignore[misc]
        module = PipelineModule(
            [SleepingLayer(clock) for _ in range(actions.num_stages)], num_stages=ranks, loss_fn=lambda out, _: out.sum(),
            partition_method="uniform", num_chunks=share, placement="v" if share == 2 else "loop",
        )  # fmt: skip
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro, "gradient_clipping": 1e9,
            "pipeline": {"schedule": name, "post_validation": is_late},
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        }  # fmt: skip
        engines.append(deepspeed.initialize(model=module, config=config)[0])
        engine, data = engines[0], [(torch.zeros(1, 1), torch.zeros(1))] * micro
        ends = []
        for _ in range(2 + num_batches):
            engine.train_batch(iter(data))
            ends.append(engine.actions_done[-1].end_s)
        per_batch = torch.tensor((ends[-1] - ends[1]) / num_batches, dtype=torch.float64)
        dist.all_reduce(per_batch, op=dist.ReduceOp.MAX)
        if rank == 0:
            costs, redone = Costs.equal(actions.num_stages), engine._late.num_redone if is_late else 0
            planned = steady_bubble(actions, costs) if is_late else simulate(actions, costs).bubble
            seen, kind = 1 - 3 * micro * unit_s / float(per_batch), "on" if is_late else "off"
            print(
                f"| {name} | {ranks} | {micro} | {unit_s * 1e3:g} | {kind} | {planned:.1%} | {seen:.1%} | {redone} |",
                flush=True,
            )
        engine.destroy()
    dist.destroy_process_group()


def real_rank(rank: int, ranks: int, names: Sequence[str], results: Any) -> None:
    """Real layers through the engine; the time of one process is measured first, alone on its core."""
    _join(rank, ranks)
    import deepspeed
    from deepspeed.pipe import PipelineModule

    width, micro = 768, 8

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)]
        return [nn.Sequential(Offset(width), *blocks[0]), *blocks[1:]]

    data = [(torch.randn(256, width), torch.randn(256, width)) for _ in range(micro)]
    for name in names:
        module = PipelineModule(layers(), num_stages=ranks, loss_fn=nn.MSELoss(), partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": 256, "gradient_accumulation_steps": micro, "pipeline": {"schedule": name},
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        }  # fmt: skip
        engine = deepspeed.initialize(model=module, config=config)[0]
        found = []
        for _ in range(8):
            engine.train_batch(iter(data))
            rows: list[Any] = [None] * ranks
            mine = [(str(d.action), d.start_s, d.end_s, d.waited_s) for d in engine.actions_done]
            dist.all_gather_object(rows, mine)
            told = described(engine.actions, rows)
            found.append((_efficiency(told["measured"]), _efficiency(told["planned"])))
        if rank == 0:
            results.append((name, *max(found)))
        engine.destroy()
    dist.destroy_process_group()


class Offset(nn.Module):
    """A trained offset, in an embedding's place: with it the first layer has an input gradient to compute, as a model's first block has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        return x + self.offset


def _efficiency(rows: list[list[Any]]) -> float:
    """Work over the time of all ranks, from the first action to the last; rows of (action, start, end, of it waited, for whom)."""
    busy = sum(end - start - waited for row in rows for _, start, end, waited, _ in row)
    return float(busy / (len(rows) * max(row[-1][2] for row in rows)))


def _join(rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)


def _machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit}, load {os.getloadavg()[0]:.1f}"


def _real() -> None:
    results: Any = mp.Manager().list()
    mp.spawn(real_rank, (2, REAL, results), 2)
    print(
        "| schedule | efficiency (work / time of both ranks), best of 8 | of the list with these times, without hops |\n"
        "|---|--:|--:|"
    )
    for name, efficiency, planned in results:
        print(f"| {name} | {efficiency:.3f} | {planned:.3f} |")


def _sleeping(args: argparse.Namespace) -> None:
    results: Any = mp.Manager().list()
    for ranks in args.ranks:
        cases = [
            (name, m, unit / 1e3) for unit in args.unit_ms for name in args.names for m in args.micro or (2 * ranks, 64)
        ]
        mp.spawn(sleep_rank, (ranks, cases, results), ranks)
    print(
        "| schedule | ranks | micro-batches | unit, ms | bubble, printed | measured | kept from its core by the system, all together "
        "| CPU ms per action, most of a rank | peak alive, first rank |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, ranks, micro, unit, planned, measured, late, cpu, peak in results:
        print(
            f"| {name} | {ranks} | {micro} | {unit:g} | {planned:.1%} | {measured:.1%} | {late:.1%} | {cpu:.2f} | {peak} |"
        )


def _in_a_row(args: argparse.Namespace) -> None:
    print(
        "| schedule | ranks | micro-batches | unit, ms | post_validation | bubble, printed | measured, of "
        f"{args.batches} batches in a row | steps made again |\n|---|--:|--:|--:|---|--:|--:|--:|"
    )
    for ranks in args.ranks:
        cases = [
            (name, m, unit / 1e3, is_late)
            for unit in args.unit_ms for m in args.micro or (64,) for name in args.names for is_late in args.late
        ]  # fmt: skip
        mp.spawn(row_rank, (ranks, cases, args.batches), ranks)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sleep", action="store_true")
    parser.add_argument("--batches", type=int, default=1, help="so many in a row, counted after two others")
    parser.add_argument(
        "--unit-ms", type=float, nargs="+", default=[100.0], help="a forward, an input or a weight gradient"
    )
    parser.add_argument("--micro", type=int, nargs="+", help="micro-batches; 2 x ranks and 64 without it, 64 in a row")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--late", type=int, nargs="+", default=[0, 1], help="post_validation, for batches in a row")
    names = [name for name in NAMED if name != "interleaved"]
    parser.add_argument("--names", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    print(_machine(), flush=True)
    if not args.sleep:
        _real()
    elif args.batches > 1:
        _in_a_row(args)
    else:
        _sleeping(args)


if __name__ == "__main__":
    main()
