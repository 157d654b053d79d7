"""What a training step's control messages cost a rank, from 2 to 8192 ranks: counted here, simulated beyond.

    python benchmarks/control_plane.py [--ranks 2 4 8 16] [--calls 300]

Ranks agree on small integers in a step: at ZeRO stage 3 at the end of each phase (forward, backward). Two ways to do it:

    circle    `deepspeed.comm.direct.Circle`, what `Mesh.agree` does: ceil(log2 N) rounds, 4 words; where ranks differ, a gather
    ring      gloo's all-gather of two words, what it did before: N - 1 rounds, each of one rank's words

`simulate` plays a call message by message: a rank's round starts when its own last round is over, and ends when the
message of that round has come. A message costs `--alpha` seconds and `--beta` per byte (defaults: a host's message over
gloo, and 1 GB/s). On one machine all ranks share its cores, so measured times also hold what a rank waits for a core:
more ranks than cores say little about a network, but check the numbers of messages and bytes, which must be the model's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.comm.direct import Circle
from deepspeed.comm.exchange import WORD_NBYTES, distances

SIMULATED = (2, 4, 8, 16, 64, 256, 1024, 4096, 8192)
WORDS = 2
"""Of one agreement: a wish and a digest."""


@dataclass(frozen=True)
class Message:
    """One message of one round, as rank 0 sends it; by symmetry every rank sends the like."""

    distance: int
    """To the rank so far away."""
    nbytes: int


def circle_largest(num_ranks: int) -> list[Message]:
    """The extremes of two words, which is what `Mesh.agree` sends first."""
    return [Message(distance, 2 * WORDS * WORD_NBYTES) for distance in distances(num_ranks)]


def circle_gather(num_ranks: int) -> list[Message]:
    """Everybody's two words: for a few ranks, and where ranks differ."""
    return [Message(d, min(d, num_ranks - d) * WORDS * WORD_NBYTES) for d in distances(num_ranks)]


def agreement(num_ranks: int, *, all_alike: bool = True) -> list[Message]:
    """`Mesh.agree` on two words."""
    if num_ranks <= 4:
        return circle_gather(num_ranks)
    return circle_largest(num_ranks) + ([] if all_alike else circle_gather(num_ranks))


def ring_all_gather(num_ranks: int) -> list[Message]:
    """gloo's all-gather: each rank hands on what it got last."""
    return [Message(1, WORDS * WORD_NBYTES) for _ in range(num_ranks - 1)]


def simulate(rounds: list[Message], num_ranks: int, alpha: float, beta: float, late: int | None = None) -> float:
    """Seconds until the last rank is done, if all begin at 0; rank `late` begins a millisecond later."""
    ready = torch.zeros(num_ranks, dtype=torch.float64)
    if late is not None:
        ready[late] = 1e-3
    for message in rounds:
        arrived = ready.roll(-message.distance) + alpha + beta * message.nbytes
        ready = torch.maximum(ready, arrived)
    return float(ready.max())


class CountingGroup:
    """A process group that counts the messages that are sent by it."""

    def __init__(self, group: Any) -> None:
        self.messages, self.nbytes = 0, 0
        self._group = group
        self.rank, self.size, self.recv = group.rank, group.size, group.recv

    def send(self, tensors: list[torch.Tensor], target: int, tag: int) -> Any:
        """Passed on, counted."""
        self.messages += 1
        self.nbytes += tensors[0].nbytes
        return self._group.send(tensors, target, tag)


def measure(rank: int, world_size: int, port: int, num_calls: int, results: Any) -> None:
    """One rank: counts and times."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group: Any = dist.new_group(backend="gloo")
    counting: Any = CountingGroup(group)
    circle = Circle(counting)
    mine = torch.tensor([rank, 1])
    theirs = [torch.empty_like(mine) for _ in range(world_size)]
    calls = {
        "largest": lambda: circle.start_largest([1, 2, -1, -2])(),
        "gather": lambda: circle.start_gather([rank, 2])(),
        "ring": lambda: dist.all_gather(theirs, mine, group=group),
    }
    found: dict[str, tuple[float, float, float]] = {}
    for name, call in calls.items():
        for _ in range(10):
            call()
        dist.barrier()
        counting.messages = counting.nbytes = 0
        times = []
        for _ in range(num_calls):
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
        found[name] = statistics.median(times), counting.messages / num_calls, counting.nbytes / num_calls
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def run(world_size: int, num_calls: int) -> dict[str, tuple[float, float, float]]:
    """Median seconds, messages and bytes sent per call, of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=measure, args=(r, world_size, port, num_calls, results)) for r in range(world_size)]
    for process in ranks:
        process.start()
    found: dict[str, tuple[float, float, float]] = results.get(timeout=120)
    for process in ranks:
        process.join()
    return found


def table(alpha: float, beta: float) -> str:
    """Per agreement and rank: messages, bytes, simulated time; and of a ZeRO-3 step, which has two."""
    lines = [
        "| ranks | messages before | now | bytes before | now | ms a step before | now | now, where ranks differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num_ranks in SIMULATED:
        ways = ring_all_gather(num_ranks), agreement(num_ranks), agreement(num_ranks, all_alike=False)
        before_ms, now_ms, differing_ms = (2e3 * simulate(way, num_ranks, alpha, beta) for way in ways)
        counts = " | ".join(f"{len(way)}" for way in ways[:2])
        nbytes = " | ".join(f"{sum(message.nbytes for message in way)}" for way in ways[:2])
        lines.append(f"| {num_ranks} | {counts} | {nbytes} | {before_ms:.2f} | {now_ms:.2f} | {differing_ms:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, compare with the model, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--alpha", type=float, default=50e-6, help="seconds per message of the simulated network")
    parser.add_argument("--beta", type=float, default=1e-9, help="seconds per byte of it")
    given = parser.parse_args()
    print(
        "| ranks | largest ms | messages | bytes | gather ms | messages | bytes | ring ms |\n|---|---|---|---|---|---|---|---|"
    )
    for world_size in given.ranks:
        found = run(world_size, given.calls)
        for name, model in (("largest", circle_largest(world_size)), ("gather", circle_gather(world_size))):
            counted = found[name][1:]
            assert counted == (len(model), sum(m.nbytes for m in model)), (
                f"{name} of {world_size}: {counted} != {model}"
            )
        cells = [
            f"{found[name][0] * 1e3:.2f} | {found[name][1]:.0f} | {found[name][2]:.0f}"
            for name in ("largest", "gather")
        ]
        print(f"| {world_size} | {' | '.join(cells)} | {found['ring'][0] * 1e3:.2f} |", flush=True)
    print(
        f"\nsimulated: {given.alpha * 1e6:.0f} us per message, {given.beta * 1e9:.1f} ns per byte; 2 agreements a step\n"
    )
    print(table(given.alpha, given.beta))


if __name__ == "__main__":
    main()
