"""The record of a run: complete lines, restarts, half-written ends, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed.monitor.run_record import (
    RunRecordError,
    RunWriter,
    find_records,
    read_lines,
    read_records,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "a" / "b")
    writer.add("start", model="Gpt", ranks=2)
    writer.add("step", step=1, loss=0.1 + 0.2, memory={"device": 5}, lr=[1e-3])
    writer.add("step", step=2, loss=float("inf"))
    writer.add("comm", step=2, ops={})
    writer.close()
    (record,) = read_records(tmp_path / "a" / "b")
    assert (record.name, record.start["model"], record.num_starts) == ("b", "Gpt", 1)
    assert record.series("loss") == [(1, 0.1 + 0.2), (2, float("inf"))]
    assert record.series("memory.device") == [(1, 5.0)]
    assert record.comm == {"kind": "comm", "step": 2, "ops": {}}


def test_a_last_line_that_is_being_written_and_unknown_kinds_are_skipped() -> None:
    lines = ['{"kind":"step","step":1,"loss":1}', '{"kind":"new"}', "[1]", "", '{"kind":"step","st']
    assert [step["step"] for step in read_lines(lines, "r").steps] == [1]


def test_steps_trained_again_after_a_restart_count_as_they_went_last() -> None:
    lines = [json.dumps({"kind": "step", "step": step, "loss": loss}) for step, loss in
             [(1, 9), (2, 8), (3, 7), (4, 6), (2, 5), (3, 4)]]  # fmt: skip
    assert read_lines(lines, "r").series("loss") == [(1, 9.0), (2, 5.0), (3, 4.0)]


def test_a_run_that_is_started_again_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        writer = RunWriter(tmp_path)
        writer.add("start", ranks=step)
        writer.add("step", step=step, loss=step)
        writer.close()
    (record,) = read_records(tmp_path)
    assert (record.num_starts, record.start["ranks"], len(record.steps)) == (2, 2, 2)


def test_after_a_line_that_could_not_be_written_the_next_one_is_whole(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer._file.write('{"kind":"step","st')  # what reached the disk
    writer._file.flush()
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, as it should
    writer._file = full
    with pytest.raises(OSError, match="space"):
        writer.add("step", step=1)
    writer.add("step", step=2, loss=1.0)
    assert [step["step"] for step in read_records(tmp_path)[0].steps] == [2]
    with pytest.raises(OSError, match="space"):
        full.close()


def test_records_are_found_in_a_folder_and_in_the_folders_below(tmp_path: Path) -> None:
    for name in ("b", "a"):
        RunWriter(tmp_path / name).add("start")
    assert [path.parent.name for path in find_records(tmp_path)] == ["a", "b"]
    assert [path.parent.name for path in find_records(tmp_path / "b")] == ["b"]


@pytest.mark.parametrize(("path", "words"), [("nowhere", "is not a directory"), (".", r"has no run\.jsonl")])
def test_a_folder_without_a_record_says_where_records_come_from(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(RunRecordError, match=rf"{words}[\s\S]*--run_dir"):
        find_records(tmp_path / path)
