"""`ds_bench`: its flags, and what of them goes to the launcher."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from deepspeed.launcher import bench


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(bench.subprocess, "run", run)
    return commands


def test_flags_go_to_whom_they_belong(started: list[list[str]]) -> None:
    assert bench.main(["--num_gpus", "2", "--all-reduce", "--maxsize", "12", "-H", "hosts"]) == 0
    [command] = started
    at = command.index("--module")
    assert command[3:at] == ["--num_gpus", "2", "-H", "hosts"]
    assert command[at + 2 :] == ["--all-reduce", "--maxsize", "12"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--maxsize", "50"], "--minsize 10 and --maxsize 50: give 0 <= minsize <= maxsize <= 40"),
        (["--trials", "0"], "--trials 0 and --warmups 2: give at least 1 and 0"),
    ],
)
def test_wrong_flags_are_refused_before_ranks_start(
    flags: list[str], words: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--num_gpus", "2", *flags])
    assert words in capsys.readouterr().err and not started
