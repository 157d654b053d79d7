"""Whether a trial outlives its tuner, whenever that is killed: between a process's fork and its first instruction, at the
launcher, at its leash, at the first rank or the second."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

PRETENDER = Path(__file__).parent / "pretender.py"
NUM_KILLS = 100
pytestmark = pytest.mark.timeout(1800)
LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="make test-autotuning")

TUNER = """
import os, sys, time
from pathlib import Path
from deepspeed.autotuning import experiment
from deepspeed.launcher import supervise
late_s, folder = float(sys.argv[1]), Path(sys.argv[2])
bound = supervise.die_with
def late(parent, number=9):
    time.sleep(late_s)
    bound(parent, number)
supervise.die_with = late
print("go", flush=True)
experiment.run(sys.argv[3:], folder, folder / "metrics.json", experiment.Limits(600, 600), dict(os.environ))
"""
"""Starts one trial as the autotuner does; the trial's launcher asks the kernel to end with it only after so long."""


def running(token: str) -> list[int]:
    """Processes with a word in their environment that still run; not those that wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and token.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


@LONG
def test_no_trial_outlives_a_tuner_that_is_killed_at_any_moment_of_its_start() -> None:
    draw = random.Random(1)
    for number in range(NUM_KILLS):
        token = f"survivor-{os.getpid()}-{number}"
        folder = Path(tempfile.mkdtemp())
        (folder / "trial").mkdir()
        config = folder / "trial/ds.json"
        config.write_text(json.dumps({"autotuning": {}}))
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "-q", str(PRETENDER)]
        command = [*launcher, "--mode", "never", "--deepspeed_config", str(config)]
        late_s = 0.3 if number % 4 == 3 else 0.0
        tuner = subprocess.Popen(
            [sys.executable, "-c", TUNER, str(late_s), str(folder), *command],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert tuner.stdout is not None
        tuner.stdout.readline()
        wanted = draw.choice([1, 2, 3, 4, 5])  # the tuner, its launcher, the launcher's leash, two ranks
        while len(running(token)) < wanted and tuner.poll() is None:
            pass
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.003), draw.uniform(0, 0.03), draw.uniform(0, 0.3)]))
        tuner.send_signal(signal.SIGKILL)
        tuner.wait()
        tuner.stdout.close()
        until_s = time.monotonic() + 60
        while running(token) and time.monotonic() < until_s:
            time.sleep(0.02)
        assert not running(token), f"kill {number}, when {wanted} processes ran"
        shutil.rmtree(folder)
