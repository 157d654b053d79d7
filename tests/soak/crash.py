"""kill -9 of one rank or of all at random moments of saving: what is left always loads, bit for bit.

`make test-soak` runs it at length, `tests/checkpoint/test_crash.py` a few times. Two ranks train and save after every
step; the parent kills, then opens the checkpoint that `latest` names and compares every byte of its tensors with those
that an undisturbed run had at that step. The next round resumes from it, so that every round also starts on what the
crash before left: aside folders, old checkpoints, a lock.

    python -m tests.soak.crash --rounds 200 --mode async
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from deepspeed.checkpoint.source import Wanted
from deepspeed.checkpoint.zero_to_fp32 import open_tag
from tests import harness
from tests.engine.runs import engine_of, make_config
from tests.harness import Pool, RanksFailedError

NUM_STEPS = 60
WIDTH = 192


class Net(nn.Module):
    """A few layers with dropout, so that random state matters; about 150 000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), 0.1)
        return x.square().mean()


def train(rank: int, world_size: int, folder: Path, mode: str, tag: str | None, num_steps: int) -> None:
    """Resume if there is something, then step and save until `num_steps`."""
    torch.manual_seed(rank)
    checkpoint = {"async_save": mode == "async", "keep_last_n": 3}
    stage = {"sync": 2, "async": 3}[mode]
    with engine_of(Net(), make_config(stage, micro=4, checkpoint=checkpoint)) as engine:
        if (folder / "latest").exists():
            engine.load_checkpoint(str(folder))
        if rank == 0:
            (folder / "started").touch()
        while engine.global_steps < num_steps:
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(engine.global_steps * 2 + rank))
            engine.backward(engine(x))
            engine.step()
            engine.save_checkpoint(str(folder), tag=tag)
            if mode == "sync" and rank == 0:
                (folder / "acknowledged").write_text(str(engine.global_steps))
        engine.wait_for_checkpoint()


def _put(tensor: torch.Tensor, at: int, values: torch.Tensor) -> None:
    tensor[at : at + values.numel()].copy_(values)


def fingerprint(folder: Path, tag: str | None = None) -> tuple[int, str]:
    """Steps and a hash of every weight and optimizer state of a checkpoint; reading it checks its digests."""
    source = open_tag(folder, tag)
    digest = hashlib.sha1()
    for kind in sorted(set(source.tensors) - {"value"}):
        for name, stored in sorted(source.tensors[kind].items()):
            tensor = torch.empty(stored.numel)
            source.fetch([Wanted(kind, name, 0, stored.numel, functools.partial(_put, tensor))])
            digest.update(tensor.numpy().tobytes())
    source.state()
    for rank in range(2):
        digest.update(bytes(source.rank_state(rank)["rng"]["torch"].tolist()))  # type: ignore[index]
    return int(source.about["global_steps"]), digest.hexdigest()


def reference(mode: str, num_steps: int) -> dict[int, str]:
    """Steps -> fingerprint of a run that nobody disturbs."""
    found: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = Pool(2)
        try:
            for step in range(1, num_steps + 1):
                pool.call(train, (folder, mode, None, step), {}, 60.0)
                found.update([fingerprint(folder)])
        finally:
            pool.kill()
    return found


def crash_once(folder: Path, mode: str, tag: str | None, kills: str, after_s: float, num_steps: int) -> None:
    """Start the ranks, kill `kills` ("one" or "all") of them `after_s` seconds after they began to save."""
    (folder / "started").unlink(missing_ok=True)
    pool = Pool(2)

    def run() -> None:
        with contextlib.suppress(RanksFailedError):
            pool.call(train, (folder, mode, tag, num_steps), {}, 60.0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(after_s)
        victims = pool.workers if kills == "all" else [random.choice(pool.workers)]
        for worker in victims:
            if worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, 9)
        thread.join(90)
    finally:
        pool.kill()
        thread.join()


def soak(mode: str, rounds: int, seed: int = 0, num_steps: int = NUM_STEPS, span_s: float = 0.4) -> Counter[str]:
    """Run `rounds` crashes; raises AssertionError at the first that leaves something else than a whole checkpoint."""
    random.seed(seed)
    harness._context.set_forkserver_preload([*harness.PRELOAD, "deepspeed.engine.initialize", "psutil"])
    expected = reference(mode, num_steps)
    outcome: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        for number in range(rounds):
            tag = "same" if number % 2 else None
            before = fingerprint(folder)[0] if (folder / "latest").exists() else 0
            if before >= num_steps:
                shutil.rmtree(folder)
                folder.mkdir()
                before = 0
            crash_once(folder, mode, tag, random.choice(["one", "all"]), random.uniform(0, span_s), num_steps)
            if not (folder / "latest").exists():
                assert before == 0, f"round {number}: no checkpoint is left, there was one of step {before}"
                outcome["none yet"] += 1
                continue
            step, digest = fingerprint(folder)
            acknowledged = folder / "acknowledged"
            if acknowledged.exists() and acknowledged.read_text():
                assert step >= int(acknowledged.read_text()), f"round {number}: an acknowledged save is gone"
            assert step >= before, f"round {number}: step {step} is older than {before}, which was whole"
            assert digest == expected[step], f"round {number}: step {step} has other bytes than an undisturbed run"
            asides = [entry.name for entry in folder.iterdir() if entry.name.endswith((".tmp", ".trash", ".old"))]
            outcome["cut off while saving" if asides else "between saves"] += 1
            acknowledged.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--mode", choices=["sync", "async"], nargs="*", default=["sync", "async"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for mode in options.mode:
        begun = time.monotonic()
        outcome = soak(mode, options.rounds, options.seed)
        print(f"{mode}: {options.rounds} crashes in {time.monotonic() - begun:.0f} s: {dict(outcome)}", flush=True)


if __name__ == "__main__":
    main()
