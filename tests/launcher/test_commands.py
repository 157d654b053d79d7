"""`deepspeed report`, `deepspeed top`: commands beside the launcher, and scripts of the same name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from deepspeed.launcher import runner
from deepspeed.launcher.commands import COMMANDS, run_command


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_has_a_main_with_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(COMMANDS[word]).main(["--help"])
    assert ended.value.code == 0
    assert f"deepspeed {word}" in capsys.readouterr().out


def test_the_launcher_hands_a_command_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err


def test_a_script_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["report", "nowhere"]) == 2
    Path("report").touch()
    assert run_command(["report", "nowhere"]) is None


@pytest.mark.parametrize("args", [[], ["train.py"], ["--num_gpus", "2", "report"], ["./report"]])
def test_everything_else_is_the_launchers(args: list[str]) -> None:
    assert run_command(args) is None
