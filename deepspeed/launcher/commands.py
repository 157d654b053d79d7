"""Words that make `deepspeed WORD ...` a command of its own instead of the start of a script.

One table; adding a command is adding a line. Its `main(arguments)` returns the exit code, and is imported when called.

Invariant: a script wins. `deepspeed report` starts a script where a file of that name is in the current directory.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS: dict[str, str] = {
    "estimate": "deepspeed.launcher.estimate",
    "doctor": "deepspeed.planner.doctor",
    "max-batch": "deepspeed.planner.largest",
    "max-model": "deepspeed.planner.largest_model",
    "plan": "deepspeed.planner.cli",
    "report": "deepspeed.monitor.report",
    "top": "deepspeed.monitor.top",
}
"""The word, and the module of its `main`."""


def run_command(args: Sequence[str]) -> int | None:
    """Do what `args` ask for if they begin with a command, and return its exit code; None if they do not."""
    if not args or args[0] not in COMMANDS or Path(args[0]).is_file():
        return None
    try:
        code = int(importlib.import_module(COMMANDS[args[0]]).main(list(args[1:])))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
