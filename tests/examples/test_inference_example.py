"""The example of inference generates, quantizes and converses."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "examples" / "inference" / "generate.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The script's main, in this process."""
    spec = importlib.util.spec_from_file_location("inference_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tokens", "4", *options])
    module.main()


def test_it_generates_in_fp32_and_int4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("fp32", "int4"):
        run(monkeypatch, "--dtype", dtype)
        out, err = capsys.readouterr()
        assert out.startswith("The sea") and "4 tokens" in err


def test_it_converses_until_an_empty_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["hello", "and now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run(monkeypatch, "--chat", "--dtype", "int8")
    out, err = capsys.readouterr()
    assert "an empty line ends" in out and err.count("4 tokens") == 2


def test_a_conversation_ends_where_its_input_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    run(monkeypatch, "--chat")
    assert capsys.readouterr().err.count("4 tokens") == 1
