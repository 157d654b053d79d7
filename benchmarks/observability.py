"""What watching costs: a training step with the progress line and the record, with monitors, with the log of collectives.

    python benchmarks/observability.py [--model gpt|layers] [--ranks N] [--rounds N]

Engines of the same model live in the same processes and take turns, step by step, so that whatever else the machine does
falls on all alike; the ratio is the median over rounds of a step's time over the time of the silent engine's step in the
same round. CPU time is of rank 0, all threads; of it, the time in the observers is also taken directly, a mean over all rounds. What is left when everything is off (three spans and two readings of the
clock per collective) is too little for that, and is timed by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_time import conditions, make_case

from deepspeed.comm.recorder import Current

WARMUP_ROUNDS = 12
"""In these the operations of a step are counted, and collectives are measured alone: once per run."""
LINE = {"steps_per_print": 10}
MONITORS = {"csv_monitor": {"enabled": True, "output_path": "csv"}}
if importlib.util.find_spec("tensorboard"):
    MONITORS["tensorboard"] = {"enabled": True, "output_path": "tensorboard"}
VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "line and record": LINE,
    f"line, record, {' and '.join(MONITORS)}": LINE | MONITORS,
    "log of collectives": {"comms_logger": {"enabled": True}},
}


def _timed(call: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    """Adds the thread's CPU time in `call` to the last of `spent`."""

    def timed(*args: Any) -> None:
        start = time.thread_time()
        call(*args)
        spent[-1] += time.thread_time() - start

    return timed


def make_step(variant: str, case: str, folder: str, spent: list[float]) -> tuple[Callable[[], None], Any]:
    """A step of an engine with that variant's configuration."""
    import deepspeed

    Current.recorder = None
    model, batch = make_case(case, torch.device("cpu"))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 2},
        **VARIANTS[variant],
    }
    if "steps_per_print" in config:
        config["monitor"] = {"run_dir": f"{folder}/{len(variant)}"}
    engine, _, _, _ = deepspeed.initialize(model=model, config=config)

    for observer in engine._observers:
        for name in ("begins", "ends", "step_ended"):
            setattr(observer, name, _timed(getattr(observer, name), spent))

    recorder = Current.recorder  # of the variant that asks for one: it is the process's, so it takes turns too

    def step() -> None:
        Current.recorder = recorder
        engine.backward(engine(*batch))
        engine.step()

    return step, engine


def cost_when_off(engine: Any) -> dict[str, float]:
    """Microseconds of a phase's span, and of watching one collective."""
    from deepspeed.comm.exchange import Pending, verb

    class Nothing:
        group, rank, world_size, is_watched = None, 0, 2, True

        def start_nothing(self, full: torch.Tensor) -> Pending:
            return Pending(lambda: None)

        start_watched = verb(start_nothing)

    def phase() -> None:
        with engine._conductor.phase("forward"):
            pass

    full, wire = torch.zeros(4), Nothing()
    verb_us = _us(lambda: wire.start_watched(full).wait()) - _us(lambda: wire.start_nothing(full).wait())
    return {"phase_us": _us(phase), "verb_us": verb_us}


def _us(call: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            call()
        best = min(best, (time.perf_counter() - start) / 500)
    return best * 1e6


def measure(case: str, rounds: int, folder: str) -> None:
    """One rank; rank 0 prints the times of every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.chdir(folder)
    spent: list[list[float]] = [[0.0] for _ in VARIANTS]
    steps, engines = zip(
        *(make_step(variant, case, folder, spent[i]) for i, variant in enumerate(VARIANTS)), strict=True
    )
    wall: list[list[float]] = []
    cpu: list[list[float]] = []
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for _ in range(WARMUP_ROUNDS + rounds):
            wall.append([])
            cpu.append([])
            for i, step in enumerate(steps):
                spent[i].append(0.0)
                dist.barrier()
                start, start_cpu = time.perf_counter(), time.process_time()
                step()
                wall[-1].append(time.perf_counter() - start)
                cpu[-1].append(time.process_time() - start_cpu)
    if dist.get_rank() == 0:
        off = cost_when_off(engines[0])
        print(
            json.dumps(
                {
                    "wall": wall[WARMUP_ROUNDS:],
                    "cpu": cpu[WARMUP_ROUNDS:],
                    "off": off,
                    "spent": [of[-rounds:] for of in spent],
                }
            ),
            flush=True,
        )
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gpt", "layers"], default="gpt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", help="as a rank, write here")
    args = parser.parse_args()
    if args.folder:
        measure(args.model, args.rounds, args.folder)
    print(conditions(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        mine = [str(Path(__file__).resolve()), "--model", args.model, "--rounds", str(args.rounds), "--folder", folder]
        done = subprocess.run(
            [*launch, *mine], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ}
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"the measurement failed:\n{done.stderr[-4000:]}")
    seen = json.loads(lines[0])
    print(
        f"| {args.model}, {args.ranks} ranks, ZeRO-2, {args.rounds} rounds | ms per step | wall time | CPU time | in observers, ms CPU |"
    )
    print("|---|---|---|---|---|")
    for i, variant in enumerate(VARIANTS):
        ratios = [statistics.median(round_[i] / round_[0] for round_ in seen[kind]) for kind in ("wall", "cpu")]
        ms = 1e3 * statistics.median(round_[i] for round_ in seen["wall"])
        print(
            f"| {variant} | {ms:.1f} | {ratios[0]:.4f} | {ratios[1]:.4f} | {1e3 * statistics.fmean(seen['spent'][i]):.2f} |"
        )
    print(
        f"off: {seen['off']['phase_us']:.1f} us per phase (three per step), {seen['off']['verb_us']:.2f} us per collective"
    )


if __name__ == "__main__":
    main()
