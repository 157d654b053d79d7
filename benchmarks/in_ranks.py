"""A benchmark that measures in ranks and reports in one process: its arguments, its ranks, what they leave, its first line.

Used by `autotuning.py` and `layouts.py`. The same file is started again by the launcher, in every rank, with `--worker FILE`; the first
rank writes what was measured there, and the report reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def measure_and_report(
    parser: argparse.ArgumentParser,
    script: str,
    work: Callable[[argparse.Namespace], None],
    report: Callable[[argparse.Namespace, Any], None],
    is_done: Callable[[argparse.Namespace, Any], bool] = lambda args, told: True,
) -> None:
    """Parse, and in a rank `work`, else start `--ranks` of them and `report` what they measured. Adds its own arguments to the parser's,
    which has `--ranks` and whatever `work` needs. is_done: whether what a file has is all there is to measure; else `work` adds to it."""
    names = [action.dest for action in parser._actions if action.dest != "help"]
    parser.add_argument("--json", type=Path, help="keep what was measured; read it again if it is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        if dist.is_initialized():  # or the first rank's end takes the store from those that still talk to it
            dist.barrier()
            dist.destroy_process_group()
        return
    result = args.json or Path(tempfile.mkdtemp()) / "measured.json"
    if not result.is_file() or not is_done(args, json.loads(result.read_text())):
        given = [f"--{name}={getattr(args, name)}" for name in names]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", f"--num_gpus={args.ranks}"]
        subprocess.run([*launcher, script, *given, "--worker", str(result.absolute())], check=True)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=Path(script).parent, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    print(f"{machine}, torch {torch.__version__}, commit {commit}")
    report(args, json.loads(result.read_text()))
