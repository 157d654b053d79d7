"""ds_io and ds_nvme_tune: tables, JSON, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deepspeed.config.storage import AioConfig
from deepspeed.tiers import ds_io, ds_nvme_tune
from deepspeed.tiers.io_trial import parse_nbytes


@pytest.mark.parametrize(
    "flags",
    [
        ["--validate"],
        ["--read", "--validate", "--include_warmup_time"],
        ["--engine", "aio_basic", "--read", "--different_file_each_iteration", "--validate"],
        ["--engine", "torch_io", "--torch_legacy_save", "--validate", "--use_accelerator_pin_memory"],
        ["--single_submit", "--sequential_requests", "--slow_bounce_buffer", "--fast_io_size", "1M"],
        ["--read", "--multi_process", "2"],
    ],
)
def test_ds_io_measures_every_combination_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    result = tmp_path / "result.json"
    sizes = ["1M"] if "--multi_process" in flags else ["64K", "1M"]
    what = ["--folder", str(tmp_path), "--io_size", "1M", "--block_size", *sizes, "--loops", "2", "--json", str(result)]
    ds_io.main([*what, *flags])
    rows = json.loads(result.read_text())
    assert [row["aio"]["block_size"] for row in rows] == [parse_nbytes(text) for text in sizes]
    assert all(0 < row["worst_gb_s"] <= row["median_gb_s"] <= row["best_gb_s"] for row in rows)
    assert {row["operation"] for row in rows} == {"read" if "--read" in flags else "write"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["block", "depth", "threads"] and len(lines) == 1 + len(sizes)
    assert os.listdir(tmp_path) == ["result.json"]


def test_ds_nvme_tune_writes_a_section_that_the_configuration_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, logs = tmp_path / "sweep.json", tmp_path / "logs"
    sweep.write_text(json.dumps({"block_size": ["64K", "1M"], "queue_depth": 4, "io_parallel": [1, 2]}))
    target = tmp_path / "disk"
    target.mkdir()
    ds_nvme_tune.main(
        [
            "--nvme_dir",
            str(target),
            "--io_size",
            "1M",
            "--sweep_config",
            str(sweep),
            "--log_dir",
            str(logs),
            "--verbose",
        ]
    )
    chosen = AioConfig(**json.loads((logs / "aio.json").read_text())["aio"])
    assert chosen.queue_depth == 4 and chosen.block_size in (65536, 1 << 20) and chosen.intra_op_parallelism in (1, 2)
    assert len(json.loads((logs / "results.json").read_text())) == 2 * 16
    said = capsys.readouterr().out
    assert "Best for read (" in said and "Best for write (" in said and f"written to {logs / 'aio.json'}" in said
    assert not os.listdir(target)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (ds_io, ["--io_size", "1M"], "give one of --folder and --folder_to_device_mapping"),
        (ds_io, ["--io_size", "1M", "--folder", "/no/such"], "/no/such is no folder"),
        (ds_io, ["--io_size", "1M", "--folder", "/tmp", "--use_gds"], "GPUDirect Storage is not available"),
        (
            ds_io,
            ["--io_size", "1M", "--folder", "/tmp", "--engine", "torch_fastio"],
            "torch_fastio is not available yet",
        ),
        (ds_io, ["--io_size", "1M", "--folder_to_device_mapping", "/tmp"], "write FOLDER:DEVICE"),
        (ds_nvme_tune, ["--nvme_dir", "/no/such"], "/no/such: not a folder that can be written"),
        (ds_nvme_tune, ["--nvme_dir", "/tmp", "--gds"], "GPUDirect Storage is not available"),
        (ds_nvme_tune, ["--nvme_dir", "/tmp", "--no_read", "--no_write"], "leave nothing to measure"),
        (ds_nvme_tune, ["--nvme_dir", "/tmp", "--sweep_config", "/no/such"], "--sweep_config /no/such: .*No such file"),
    ],
)
def test_what_the_commands_refuse(command: object, flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        command.main(flags)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["", "M", "1X", "-1", "0", "1.5M"])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_nbytes(text)
    with pytest.raises(SystemExit):
        ds_io.main(["--folder", "/tmp", "--io_size", text])
    assert "is no size" in capsys.readouterr().err or text == "-1"
