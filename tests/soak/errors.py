"""Write errors and a full disk at random system calls of saving: the previous or the new checkpoint loads, never neither.

`make test-soak` runs it. Two ranks train and save; in every round the k-th `pwrite`, `fsync`, ... of one rank fails once (EIO) or
from then on (ENOSPC). All ranks must agree on the outcome, and what `latest` names must be whole, with the bytes of the last
save that succeeded. Errors after `latest` was replaced may be raised though the new checkpoint is there.

    python -m tests.soak.errors --rounds 200
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.utils.errors import CheckpointError
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.soak.crash import WIDTH, Net, fingerprint

CALLS = (
    ("pwrite", "fsync", "posix_fallocate", "ftruncate", "rename", "replace", "open", "mkdir"),
    ("pwrite", "fsync", "posix_fallocate", "ftruncate", "open"),
)
"""What the first rank calls while it saves and publishes, and what the other one calls."""


class Fault:
    """Replaces a function of `os` so that its k-th call below a folder fails."""

    def __init__(self, call: str, at: int, code: int) -> None:
        self.call, self.at, self.code = call, at, code
        self.num_calls, self.num_failed = 0, 0
        self.real: Any = getattr(os, call)

    def __enter__(self) -> Fault:
        setattr(os, self.call, self._broken)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(os, self.call, self.real)

    def _broken(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self.at or (self.code == errno.ENOSPC and self.num_calls > self.at):
            self.num_failed += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kwargs)


def trial(rank: int, world_size: int, folder: Path, rounds: int, mode: str, seed: int) -> Counter[str]:
    """The rounds, on every rank."""
    chance = random.Random(seed)
    outcome: Counter[str] = Counter()
    config = make_config(2, micro=4, checkpoint={"async_save": mode == "async", "keep_last_n": 2})
    with engine_of(Net(), config) as engine:
        engine.save_checkpoint(str(folder))
        engine.wait_for_checkpoint()
        before = fingerprint(folder)
        for number in range(rounds):
            engine.backward(engine(torch.randn(4, WIDTH)))
            engine.step()
            victim = chance.randrange(2)
            call, at = chance.choice(CALLS[victim]), chance.randint(1, 3 - victim)
            code = chance.choice([errno.EIO, errno.ENOSPC])
            dist.barrier()
            failed = False
            with Fault(call, at, code) if rank == victim else Fault("getcwd", 0, 0) as fault:
                try:
                    engine.save_checkpoint(str(folder))
                    engine.wait_for_checkpoint()
                except CheckpointError:
                    failed = True
            told: list[Any] = [None] * world_size
            dist.all_gather_object(told, (failed, fault.num_failed))
            where = f"round {number}: {call} {at} of rank {victim}, {os.strerror(code)}"
            assert told[0][0] == told[1][0], f"{where}: ranks disagree, {told}"
            after = fingerprint(folder)
            if not failed:
                assert after[0] == engine.global_steps, f"{where}: a save that returned is not there"
            else:
                assert after == before or after[0] == engine.global_steps, f"{where}: {after[0]} after {before[0]}"
            before = after
            outcome["raised" if failed else "survived" if told[victim][1] else "not reached"] += 1
            dist.barrier()
    return outcome


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for mode in ("sync", "async"):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            outcome = run_ranks(2, trial, Path(name), options.rounds, mode, options.seed, timeout=600.0)[0]
        print(f"{mode}: {options.rounds} errors in {time.monotonic() - begun:.0f} s: {dict(outcome)}", flush=True)


if __name__ == "__main__":
    main()
