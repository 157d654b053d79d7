"""Events as each destination shows them, read back with its own reader; and destinations that fail."""

from __future__ import annotations

import csv
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.config import CsvMonitorConfig, load_config
from deepspeed.monitor.backend import MAX_FAILURES, Event, Monitor
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.master import MonitorMaster, get_monitor_config
from deepspeed.monitor.run_record import RunWriter
from deepspeed.utils.logging import logger
from tests.harness import run_alone, run_ranks
from tests.monitor.test_line import numbers

LOSSES = [2.5, 1.25, 0.1 + 0.2]
EVENTS = [("Train/Samples/train_loss", loss, 8 * (i + 1)) for i, loss in enumerate(LOSSES)]
STEPS = [step for _, _, step in EVENTS]


def write_all(config: dict[str, Any], events: Sequence[Any] = EVENTS) -> None:
    master = MonitorMaster(get_monitor_config(config))
    assert master.enabled
    for event in events:
        master.write_events([event])
    master.close()
    assert [monitor.num_failures for monitor in master.monitors] == [0] * 4


def test_csv_has_the_promised_names_and_the_very_values(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    write_all({"csv_monitor": section}, [*EVENTS, ("My odd name", torch.tensor(3), 8)])
    write_all({"csv_monitor": section}, [("Train/Samples/train_loss", 7.0, 32)])  # a run that goes on
    with (tmp_path / "job" / "Train_Samples_train_loss.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "train_loss"]
    assert [(int(step), float(value)) for step, value in rows] == [*zip(STEPS, LOSSES, strict=True), (32, 7.0)]
    assert (tmp_path / "job" / "My_odd_name.csv").read_text() == "step,My odd name\n8,3\n"


def test_a_relative_folder_is_the_one_of_the_start_wherever_the_script_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = csvMonitor(CsvMonitorConfig(enabled=True, output_path="here", job_name="job"))
    monkeypatch.chdir("/")
    monitor.write_events([("Train/loss", 1.5, 1)])
    assert (tmp_path / "here" / "job" / "Train_loss.csv").exists()


def test_jsonl_has_the_very_values(tmp_path: Path) -> None:
    master = MonitorMaster(load_config({}), tmp_path / "run")
    master.write_events([*EVENTS, ("bad", float("nan"), 8)])
    master.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [(line["name"], line["value"], line["samples"]) for line in lines[:-1]] == EVENTS
    assert lines[-1]["value"] == "nan"


def test_short_steps_are_written_together_before_what_the_script_writes(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    master = MonitorMaster(load_config({"csv_monitor": section}), tmp_path)

    def written() -> list[int | str]:
        lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
        return [line.get("step") or line["name"] for line in lines]

    for step in (1, 2, 3):
        master.write_step(numbers(step=step, samples=8 * step), [("Train/Samples/more", step, 8 * step)])
    assert written() == [1]
    master.write_events([("mine", 1.0, 24)])
    assert written() == [1, 2, 3, "mine"]
    master.write_step(numbers(step=4))
    master.close()
    assert written() == [1, 2, 3, "mine", 4]
    assert (tmp_path / "job" / "Train_Samples_more.csv").read_text() == "step,more\n8,1\n16,2\n24,3\n"


def test_a_value_that_is_no_number_is_left_out_with_a_warning(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    master = MonitorMaster(load_config({}), tmp_path)
    master.write_events([("two", torch.ones(2), 8), ("one", torch.tensor(2.5), 8)])
    master.close()
    (line,) = (tmp_path / "run.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "event", "name": "one", "value": 2.5, "samples": 8}
    assert "('two', tensor([1., 1.]), 8) is left out: a Tensor with 2 elements" in warnings.text


def test_tensorboard_event_files_have_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra [monitor] is not installed (make test-monitors)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_all({"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}})
    reader = EventAccumulator(str(tmp_path / "job"))
    reader.Reload()
    seen = [(scalar.step, scalar.value) for scalar in reader.Scalars("Train/Samples/train_loss")]
    assert seen == [(step, torch.tensor(loss).item()) for step, loss in zip(STEPS, LOSSES, strict=True)]  # fp32


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log after W&B's 7 bytes: blocks of 32 KiB; checksum 4, length 2, type 1 (2, 3, 4: first,
    middle, last part of a record), then the bytes."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_offline(folder: str) -> list[dict[str, Any]]:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    write_all({"wandb": {"enabled": True, "project": "p", "group": "g"}})
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    deadline_s = time.monotonic() + 30
    while True:  # W&B's own process writes the file, and may do so a moment after the run has ended
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(path.read_bytes())]
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline_s:
            break
        time.sleep(0.1)
    assert [(r.run.project, r.run.run_group) for r in records if r.HasField("run")] == [("p", "g")]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def test_wandb_in_offline_mode_has_the_values(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra [monitor] is not installed (make test-monitors)")
    rows = run_alone(wandb_offline, str(tmp_path), timeout=90)
    assert [(row["_step"], row["Train/Samples/train_loss"]) for row in rows] == list(zip(STEPS, LOSSES, strict=True))


def comet_offline(folder: str) -> list[tuple[int, float]]:
    os.environ |= {"COMET_OFFLINE_DIRECTORY": folder, "COMET_API_KEY": "none", "COMET_LOGGING_CONSOLE": "ERROR"}
    write_all(
        {"comet": {"enabled": True, "online": False, "samples_log_interval": 16, "project": "p", "mode": "create"}}
    )
    (path,) = Path(folder).glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line)["payload"] for line in archive.read("messages.json").splitlines()]
    metrics = [message["metric"] | {"at": message.get("step")} for message in messages if "metric" in message]
    return [
        (m.get("step", m["at"]), m["metricValue"]) for m in metrics if m["metricName"] == "Train/Samples/train_loss"
    ]


def test_comet_offline_has_the_values_of_every_so_many_samples(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml", reason="the extra [monitor] is not installed (make test-monitors)")
    seen = run_alone(comet_offline, str(tmp_path), timeout=90)
    assert [(int(step), float(value)) for step, value in seen] == [(8, LOSSES[0]), (24, LOSSES[2])]


def on_every_rank(rank: int, world_size: int, folder: str) -> bool:
    config = load_config({"csv_monitor": {"enabled": True, "output_path": f"{folder}/{rank}"}})
    master = MonitorMaster(config, Path(folder, str(rank), "run"))
    master.write_events(EVENTS)
    master.close()
    return master.enabled


def test_only_rank_0_writes(tmp_path: Path) -> None:
    assert run_ranks(2, on_every_rank, str(tmp_path)) == [True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"0"}


class Fails:
    """A backend without network, until it comes back."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_tried = 0
        self.seen: list[Event] = []

    def write(self, events: Sequence[Event]) -> None:
        self.num_tried += 1
        if self.num_tried <= self.num_failures:
            raise ConnectionError("no network")
        self.seen += events

    def close(self) -> None:
        raise ConnectionError("no network")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_backend_that_fails_is_told_once_and_tried_again(warnings: pytest.LogCaptureFixture) -> None:
    backend = Fails(3)
    monitor = Monitor(lambda: backend, enabled=True, name="wandb")
    for event in [EVENTS[0]] * 3 + [EVENTS[1]]:
        monitor.write_events([event])
    assert backend.seen == [EVENTS[1]]
    assert warnings.messages == ["wandb could not write, training goes on: ConnectionError: no network"]
    monitor.close()


def test_a_backend_that_never_works_is_given_up(warnings: pytest.LogCaptureFixture) -> None:
    backend = Fails(1000)
    monitor = Monitor(lambda: backend, enabled=True, name="wandb")
    for _ in range(MAX_FAILURES + 5):
        monitor.write_events(EVENTS)
    assert backend.num_tried == MAX_FAILURES
    assert len(warnings.messages) == 2
    assert "not tried again" in warnings.messages[1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet_ml"])
def test_a_package_that_is_missing_is_named_with_the_cure(
    name: str, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    for module in (name, "torch.utils.tensorboard") if name == "tensorboard" else (name,):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    section = name.removesuffix("_ml")
    master = MonitorMaster(load_config({section: {"enabled": True}}))
    master.write_events(EVENTS)
    assert f"pip install {name}" in warnings.text
    assert "training goes on" in warnings.text


def test_a_full_disk_does_not_reach_training(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "a.csv").symlink_to("/dev/full")
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    monitor = csvMonitor(CsvMonitorConfig(enabled=True, output_path=str(tmp_path), job_name="job"))
    monitor.write_events([("a", 1.0, 1)])
    record = Monitor(lambda: RunWriter(tmp_path), enabled=True, name="the run's record")
    record.write_events([("a", 1.0, 1)])
    assert "csv_monitor could not write, training goes on: OSError" in warnings.text
    assert "the run's record could not write, training goes on: OSError" in warnings.text


def test_a_folder_that_cannot_be_made_does_not_reach_training(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monitor = csvMonitor(CsvMonitorConfig(enabled=True, output_path=str(tmp_path / "file")))
    monitor.write_events(EVENTS)
    assert "csv_monitor could not start, training goes on: NotADirectoryError" in warnings.text


def test_without_a_section_nothing_is_enabled() -> None:
    master = MonitorMaster(load_config({}))
    assert not master.enabled
    assert not any(monitor.enabled for monitor in master.monitors)
