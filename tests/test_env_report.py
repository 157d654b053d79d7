"""`ds_report` runs each operation, and says why one is off and what that costs."""

from __future__ import annotations

import pytest

from deepspeed import env_report
from deepspeed.env_report import Row, Slower, attempt


def test_every_operation_is_run_or_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.main()
    lines = capsys.readouterr().out.splitlines()
    for row in env_report.ROWS:
        [line] = [line for line in lines if line.startswith(f"{row.name} ")]
        state = line.split()[1]
        assert state in ("yes", "slower", "no") and (state == "yes" or line.endswith(f"-> {row.cost}"))
    assert not any("ImportError" in line or "ModuleNotFoundError: No module named 'deepspeed" in line for line in lines)
    assert any(line.startswith("async_io ") and line.split()[1] in ("yes", "slower") for line in lines)
    assert any(line.startswith("gloo ") and line.split()[1] == "yes" for line in lines)


def _raises() -> str:
    raise OSError("no such device\nmore")


def _slow() -> str:
    raise Slower("on the long way")


def test_trials_tell_how_it_went() -> None:
    results = [attempt(Row("x", trial, "costs time")) for trial in (lambda: "fine", _slow, _raises)]
    assert [(r.state, r.how, r.cost) for r in results] == [
        ("yes", "fine", ""),
        ("slower", "on the long way", "costs time"),
        ("no", "OSError: no such device", "costs time"),
    ]


def test_the_table_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert env_report.cli_main(["--hide_operator_status"]) == 0
    assert "cpu_adam" not in capsys.readouterr().out
