"""The rates of this machine with as many ranks on it as are asked about, and a model's own seconds: each rank in a process of its own, all at
once. One alone is this process.

Called by `deepspeed doctor` where no cluster is given; started by the launcher, this module measures in every rank.

Invariant: no process is left, and rates of several ranks have a wire.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.engine.message_costs import message_costs
from deepspeed.launcher.supervise import die_with_parent
from deepspeed.memory.cli import build
from deepspeed.memory.clocked import Clocked, clocked
from deepspeed.profiling.rates import Rates, measure_rates
from deepspeed.utils.errors import DeepSpeedError

MEASURED_BY = "deepspeed.planner.machine"
"""The module that measures in every rank."""
TIMEOUT_S = 300
"""After which ranks that did not measure are ended."""


@dataclass(frozen=True)
class Asked:
    """A model to clock: what `memory.cli.build` takes."""

    source: str
    samples: int
    """Of the batch that it comes with, or that is made."""
    seq: int


@dataclass(frozen=True)
class Measured:
    """What ranks found."""

    rates: Rates
    clocked: Clocked | None = None
    """Of the slowest rank; None: no model was asked for, or a rank could not."""
    why: str = ""
    """It could not."""


def measure(dtype: torch.dtype, ranks: int, folder: Path | None = None, model: Asked | None = None) -> Measured:
    """What each of `ranks` ranks on this machine does, while all do.

    dtype: of matrix products. folder: on the disk to measure; None for none. Raises DeepSpeedError where so many ranks cannot be started.
    """
    if ranks == 1:
        rates = measure_rates(dtype, folder)
        return Measured(rates) if model is None else Measured(rates, *_clock(model, dtype))
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "rates.json"
        given = [str(result), str(dtype).removeprefix("torch.")]
        given += ["--folder", str(folder)] if folder else []
        given += ["--model", model.source, str(model.samples), str(model.seq)] if model else []
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", f"--num_gpus={ranks}", "--no_local_rank"]
        command = [*launcher, "--module", MEASURED_BY, *given]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
                preexec_fn=die_with_parent(),
            )
        except subprocess.TimeoutExpired:
            raise DeepSpeedError(
                f"{ranks} ranks on this machine did not measure it within {TIMEOUT_S} s.\n"
                "  Describe the machine with --cluster FILE, or ask about fewer ranks (-n)."
            ) from None
        if done.returncode or not result.is_file():
            last = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-6:])
            raise DeepSpeedError(
                f"{ranks} ranks could not be started on this machine to measure it (exit code {done.returncode}):\n{last}\n"
                "  Describe the machine with --cluster FILE, or ask about as many ranks as it has devices (-n)."
            )
        found = json.loads(result.read_text())
        own = Clocked(**found["clocked"]) if found["clocked"] else None
        return Measured(Rates(**found["rates"]), own, found["why"])


def _clock(model: Asked, dtype: torch.dtype) -> tuple[Clocked | None, str]:
    """The model's own seconds; or None, and why."""
    try:
        made, batch = build(model.source, model.samples, model.seq)
        return clocked(made, batch, model.samples, dtype), ""
    except Exception as error:  # whatever the model raises
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """One rank."""
    from deepspeed.comm import init_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", nargs=3, metavar=("MODEL", "SAMPLES", "SEQ"))
    args = parser.parse_args()
    init_distributed()
    dtype = getattr(torch, args.dtype)
    rates = measure_rates(dtype, args.folder)
    if get_accelerator().device_name() == "cpu":
        rates = dataclasses.replace(rates, **message_costs(DeepSpeedEngine, rates))
    dist.barrier()  # all begin at once
    mine = _clock(Asked(args.model[0], *map(int, args.model[1:])), dtype) if args.model else (None, "")
    everyone: list[tuple[Clocked | None, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        times = [dataclasses.asdict(own) for own, _ in everyone if own is not None]
        slowest = max(times, key=lambda each: sum(each.values())) if len(times) == len(everyone) else None
        why = next((why for _, why in everyone if why), "")
        args.result.write_text(json.dumps({"rates": rates.as_json(), "clocked": slowest, "why": why}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
