"""Ctrl-C: all ranks get KeyboardInterrupt at the same place, so that what they save then is one checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspeed.checkpoint.find import open_checkpoint
from deepspeed.comm.interrupts import Interrupts
from deepspeed.utils.errors import CheckpointError

REPOSITORY = Path(__file__).parents[2]
SCRIPT = '''
import os, signal, sys, threading, time
import torch
import deepspeed

stage, moment, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
rank = int(os.environ["RANK"])
model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(3)])
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
if "alone" in moment and rank == 1:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupt():
    """To this rank, late in data, while the other waits inside of a collective, from somebody who signals all."""
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.5)


def step():
    loss = engine(torch.randn(1, 16)).pow(2).mean()
    if rank == 1 and moment == "forward" and engine.global_steps == 2:
        interrupt()
    engine.backward(loss)
    if rank == 1 and moment == "backward" and engine.global_steps == 2:
        interrupt()
    engine.step()


try:
    while engine.global_steps < 200:
        if rank == 1 and moment == "data" and engine.global_steps == 2:
            interrupt()
        if rank == 0 and moment == "alone" and engine.global_steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        step()
        if moment == "save" and engine.global_steps == 2:
            if rank == 1:
                interrupt()
            engine.save_checkpoint(folder, tag="periodic")
except KeyboardInterrupt:
    os.write(1, f"interrupted {engine.global_steps}\\n".encode())  # whole lines, whatever the other rank writes
    engine.save_checkpoint(folder, tag="last")
    os.write(1, b"saved\\n")
'''


def _launched(launcher: str, folder: Path, stage: int, moment: str, *flags: str) -> str:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(deepspeed if launcher == "deepspeed" else torchrun), str(script), str(stage), moment]
    done = subprocess.run(
        [*command, str(folder / "saved")],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.stdout


@pytest.mark.quick("torchrun-3-forward", "deepspeed-1-backward")
@pytest.mark.parametrize(
    ("launcher", "stage", "moment"),
    [("deepspeed", 3, "data"), ("deepspeed", 1, "backward"), ("torchrun", 3, "forward"), ("deepspeed", 3, "save")],
)
def test_ranks_interrupted_at_different_places_save_one_checkpoint(
    launcher: str, stage: int, moment: str, tmp_path: Path
) -> None:
    written = _launched(launcher, tmp_path, stage, moment)
    assert written.count("saved\n") == 2, written
    assert (tmp_path / "saved" / "latest").read_text() == "last"
    steps = {line for line in written.splitlines() if "interrupted" in line}
    assert len(steps) == 1, steps
    about = open_checkpoint(tmp_path / "saved" / "last").about
    assert steps == {f"interrupted {about['global_steps']}"}


def test_a_rank_that_got_the_signal_alone_is_told_who_did_not_come(tmp_path: Path) -> None:
    written = _launched("deepspeed", tmp_path, 3, "alone", "--grace_period", "4")
    assert "save_checkpoint after Ctrl-C: rank 1 has not come within 1 s" in written, written
    assert not (tmp_path / "saved" / "latest").exists() and "saved\n" not in written


class _Store:
    """One dictionary for the ranks of a test."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def started() -> Iterator[Callable[..., Interrupts]]:
    """Makes this process's interrupts; a shell's `&` may have had it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made: list[Interrupts] = []

    def start(open_store: Any, world_size: int, **kwargs: Any) -> Interrupts:
        made.append(Interrupts(open_store, 0, world_size, **kwargs))
        assert made[-1].start()
        return made[-1]

    yield start
    for interrupts in made:
        interrupts.stop()
    signal.signal(signal.SIGINT, before)


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def test_one_rank_alone_ends_the_step_first_and_nothing_else(started: Callable[..., Interrupts]) -> None:
    interrupts = started(None, 1)
    with pytest.raises(KeyboardInterrupt):
        _signal()
    ended = False
    with pytest.raises(KeyboardInterrupt), interrupts:
        _signal()
        ended = True
    assert ended
    with pytest.raises(KeyboardInterrupt), interrupts:
        _signal()
        _signal()  # a second one: at once
        raise AssertionError


def test_ranks_raise_at_the_gate_after_the_furthest(started: Callable[..., Interrupts]) -> None:
    store = _Store()
    interrupts = started(lambda: store, 2)
    with pytest.raises(KeyboardInterrupt):
        _signal()  # nothing was trained yet: where it stands
    for number in (1, 2):
        with interrupts:
            pass
        if number == 1:
            _signal()
            store.set("1/passed/1", "2")
    with pytest.raises(KeyboardInterrupt), interrupts:
        pass
    assert store.values["1/passed/0"] == "1"
    interrupts.before_save()  # raised at a gate: nobody is asked
    with interrupts:
        pass


def test_without_a_gate_in_time_it_is_raised_where_the_rank_stands(started: Callable[..., Interrupts]) -> None:
    store = _Store()
    interrupts = started(lambda: store, 2, grace_s=0.6)
    with interrupts:
        pass
    with pytest.raises(KeyboardInterrupt):
        _signal()
        time.sleep(20)
    with pytest.raises(CheckpointError, match="rank 1 has not come within 0.15 s"):
        interrupts.before_save()
    interrupts.before_save()  # once told, the script decides
    with pytest.raises(KeyboardInterrupt):  # and the next signal is a round of its own
        _signal()
        _signal()
    assert threading.active_count() >= 1


def test_a_store_that_is_gone_costs_nobody_a_keyboard_interrupt(started: Callable[..., Interrupts]) -> None:
    def gone() -> Any:
        raise ConnectionError

    interrupts = started(gone, 2)
    with interrupts:
        pass
    with pytest.raises(KeyboardInterrupt):
        _signal()
        time.sleep(20)


def test_a_handler_of_the_scripts_own_is_left_alone(started: Callable[..., Interrupts]) -> None:
    noted: list[int] = []
    interrupts = started(lambda: _Store(), 2, grace_s=3)
    with interrupts:
        pass
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    _signal()
    with interrupts:
        pass
    assert noted == [signal.SIGINT]
