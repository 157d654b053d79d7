"""`deepspeed estimate`: of a run that trains, or with `--inference` of a model that only runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepspeed.inference import estimate as running
from deepspeed.memory import cli as training


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    return (running if "--inference" in args else training).main(args)
