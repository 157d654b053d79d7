"""Becomes a command that the kernel kills when its parent is gone: `tether PARENT PLACE COMMAND...`.

torchrun's agent starts ranks in sessions of their own, where they outlive an agent that is killed. A signal asked for
with prctl(2) survives exec, so this process asks and then becomes the rank. With a PLACE above 0, `--local_rank=N` is put
there: after the script, before its own arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(args: Sequence[str]) -> None:
    """Replace this process."""
    from deepspeed.launcher.supervise import die_with

    parent, place, command = int(args[0]), int(args[1]), list(args[2:])
    die_with(parent)
    if place:
        command.insert(place, f"--local_rank={os.environ['LOCAL_RANK']}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
