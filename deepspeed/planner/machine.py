"""The rates of this machine with as many ranks on it as are asked about: each in a process of its own, all at once.

Called by `deepspeed doctor` where no cluster is given; started by the launcher, this module measures in every rank. One process has no
wire to measure, and has the machine's processors and memory to itself.

Invariant: no process is left, and rates of several ranks have a wire.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed.profiling.rates import Rates, measure_rates
from deepspeed.utils.errors import DeepSpeedError

TIMEOUT_S = 300
"""After which ranks that did not measure are ended."""


def machine_rates(dtype: torch.dtype, ranks: int, folder: Path | None = None) -> Rates:
    """What each of `ranks` ranks on this machine does, while all do.

    dtype: of matrix products. folder: on the disk to measure; None for none. Raises DeepSpeedError where so many ranks cannot be started.
    """
    if ranks == 1:
        return measure_rates(dtype, folder)
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "rates.json"
        given = [str(result), str(dtype).removeprefix("torch."), *([str(folder)] if folder else [])]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", f"--num_gpus={ranks}", "--no_local_rank"]
        command = [*launcher, "--module", "deepspeed.planner.machine", *given]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
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
        return Rates(**json.loads(result.read_text()))


def main() -> None:
    """One rank."""
    from deepspeed.comm import init_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    init_distributed()
    rates = measure_rates(getattr(torch, args.dtype), args.folder)
    if dist.get_rank() == 0:
        args.result.write_text(json.dumps(rates.as_json()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
