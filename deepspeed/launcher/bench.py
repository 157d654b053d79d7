"""`ds_bench`: start the sweep of `comm.bench` on this machine's devices, or be one of its ranks.

Flags before `--` that the sweep does not know, such as --hostfile or --num_gpus, go to the launcher:
`ds_bench --num_gpus 4 --all-reduce`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from deepspeed.utils.launch_env import TORCH_VARIABLES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    from deepspeed.comm import bench

    words = list(sys.argv[1:] if arguments is None else arguments)
    if all(os.environ.get(name) for name in TORCH_VARIABLES):
        return bench.main(words)
    parser = bench.make_parser()
    parser.allow_abbrev = False
    _, for_launcher = parser.parse_known_args(words)
    for_launcher = [word for word in for_launcher if word != "--"]
    own = _without(words, for_launcher)
    bench.parse_args(own)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *for_launcher,
        "--module",
        "deepspeed.comm.bench",
        *own,
    ]
    return subprocess.run(command).returncode


def _without(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """What is left of `words` without `taken`, which appear in the same order."""
    left, rest = [], list(taken)
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word != "--":
            left.append(word)
    return left


if __name__ == "__main__":
    sys.exit(main())
