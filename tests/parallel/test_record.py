"""The record, the report's page and the log of collectives name the ranks that share layers and sequences, and count them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepspeed.monitor.report import main as report
from tests.harness import run_ranks
from tests.parallel import records

pytest.importorskip("transformers")


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run."""
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("section", [{}, {"tp_overlap_comm": True}], ids=["plain", "overlapped"])
def test_ranks_that_share_layers_are_named_and_what_they_send_is_counted(
    tmp_path: Path, section: dict[str, Any]
) -> None:
    logs = run_ranks(2, records.layers, str(tmp_path), section)
    start, *_ = lines = recorded(tmp_path)
    steps = [line for line in lines if line["kind"] == "step"]
    assert (start["divided"], start["ranks"]) == ("2 ranks share layers", 1)
    assert [(s["step_samples"], s["step_tokens"]) for s in steps] == [(2, 16)] * 2
    for log in logs:
        counted = sum(nbytes * line["count"] for nbytes, line in log["tensor.all_reduce"].items())
        assert counted == sum(step["comm_nbytes"]["tensor.all_reduce"] for step in steps)
        assert all(line["busbw_avg_gbps"] == line["tput_avg_gbps"] for line in log["tensor.all_reduce"].values())
    _is_on_the_page(tmp_path, "2 ranks share layers", "tensor.all_reduce")


@pytest.mark.parametrize(("kv", "op"), [(2, "sequence.all_to_all"), (1, "sequence.ring")])
def test_ranks_that_share_a_sequence_are_named_and_what_they_send_is_counted(tmp_path: Path, kv: int, op: str) -> None:
    logs = run_ranks(2, records.parts, str(tmp_path), kv)
    start, *_ = lines = recorded(tmp_path)
    steps = [line for line in lines if line["kind"] == "step"]
    assert (start["divided"], start["ranks"]) == ("2 ranks share a sequence", 1)
    assert [(s["step_samples"], s["step_tokens"]) for s in steps] == [(1, 16)] * 2  # one sequence, of which both have 8
    for log in logs:
        counted = sum(nbytes * line["count"] for nbytes, line in log[op].items())
        assert counted == sum(step["comm_nbytes"][op] for step in steps)
        assert "sequence.inputs" in log
    _is_on_the_page(tmp_path, "2 ranks share a sequence", op)


def _is_on_the_page(folder: Path, divided: str, op: str) -> None:
    report([str(folder)])
    page = (folder / "report.html").read_text()
    assert divided in page
    assert op in page
