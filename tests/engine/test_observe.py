"""What the engine tells while it trains: the record, the line, profiles and traces; and that watching changes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed import comm
from deepspeed.comm.recorder import Current
from deepspeed.engine.observer import PhaseClocks
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.waits import OFFLOAD
from tests.engine.runs import LR, engine_of, make_config
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share

STEPS, ACCUMULATION, SAMPLES = 5, 2, 4


class Seen(dict[str, Any]):
    """What one rank saw of a run: `out`, `losses`, `norms`, `weights`."""


def train(rank: int, world_size: int, stage: int, folder: str, extra: dict[str, Any], steps: int = STEPS) -> Seen:
    """Train the tiny GPT in `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    config = make_config(stage, micro=SAMPLES // world_size, accumulation=ACCUMULATION, clip=1.0, **extra)
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=steps, accumulation=ACCUMULATION, samples=SAMPLES)
    out, losses, norms = io.StringIO(), [], []
    try:
        with contextlib.redirect_stdout(out), engine_of(model, config) as engine:
            for step in batches:
                of_step = []
                for micro in step:
                    loss = engine(*rank_share(micro, rank, world_size))
                    engine.backward(loss)
                    engine.step()
                    of_step.append(loss.detach())
                losses.append(torch.stack(of_step).mean().item())
                norms.append(engine.get_global_grad_norm())
            weights = engine._zero3_consolidated_16bit_state_dict() or {}
            return Seen(out=out.getvalue(), losses=losses, norms=norms, weights=weights)
    finally:
        os.chdir(before)
        comm.configure(enabled=False)
        Current.recorder = None


def record(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


EVERYTHING = {
    "steps_per_print": 2,
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "monitor": {"run_dir": "run", "trace_step": 3},
    "comms_logger": {"enabled": True},
    "csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "job"},
    "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "profile.txt"},
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_everything_at_once_tells_the_truth_and_changes_nothing(stage: int, tmp_path: Path) -> None:
    (tmp_path / "off").mkdir()
    plain = run_ranks(2, train, stage, str(tmp_path / "off"), {})
    seen, other = run_ranks(2, train, stage, str(tmp_path), EVERYTHING, timeout=100)
    assert (seen["losses"], seen["norms"]) == (plain[0]["losses"], plain[0]["norms"])
    assert all(torch.equal(value, plain[0]["weights"][name]) for name, value in seen["weights"].items())
    assert other["out"] == plain[0]["out"] == plain[1]["out"] == ""
    assert list((tmp_path / "off").iterdir()) == []

    start, *lines = record(tmp_path / "run")
    assert (start["model"], start["zero_stage"], start["ranks"], start["train_batch_size"]) == ("TinyGpt", stage, 2, 8)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["loss"] for step in steps] == pytest.approx(seen["losses"], rel=1e-6)
    assert [step["grad_norm"] for step in steps] == seen["norms"]
    assert {(step["step_tokens"], step["step_samples"], step["lr"][0]) for step in steps} == {(8 * 12, 8, LR)}
    assert all(step["step_s"] >= step["forward_s"] + step["backward_s"] + step["update_s"] for step in steps)
    assert all(0 < step["wait_comm_s"] < step["step_s"] for step in steps)
    # 4 samples per rank of 12 tokens; two blocks of width 32, vocabulary 48.
    forward = 2 * 4 * 12 * (12 * 2 * 32 * 32 + 48 * 32) + 4 * 4 * 12 * 12 * 32 * 2
    assert {step["flops"] for step in steps} == {3 * forward}
    assert steps[0]["mfu"] == pytest.approx(3 * forward / steps[0]["step_s"] / steps[0]["peak_flops"])
    assert all(step["memory"]["device_peak"] >= step["memory"]["device"] > 0 for step in steps)
    logs = [line for line in lines if line["kind"] == "comm"]
    assert [log["step"] for log in logs] == [2, 4]
    assert 0 <= logs[-1]["hidden"] <= 1
    assert ("zero.all_reduce" in logs[-1]["ops"]) == (stage == 0)

    first, *shown = seen["out"].splitlines()
    assert first.startswith("deepspeed: TinyGpt with 27.4k")
    assert f"ZeRO-{stage} over 2 ranks, fp32, FusedAdam, 8 samples per step (2 x 2 x 2); record in run" in first
    assert [line.split(" | ")[0] for line in shown] == ["step 2", "step 4"]
    assert f"loss {(seen['losses'][3] + other['losses'][3]) / 2:.4f}" in shown[1]
    for words in ("tokens/s", "TFLOP/s", "MFU", "wait: communication", "forward ", "optimizer "):
        assert words in shown[1]

    rows = (tmp_path / "csv" / "job" / "Train_Samples_train_loss.csv").read_text().split()
    assert [float(row.split(",")[1]) for row in rows[1:]] == pytest.approx(seen["losses"], rel=1e-6)
    assert (tmp_path / "csv" / "job" / "Train_Samples_elapsed_time_ms_backward_allreduce.csv").exists()

    profile = json.loads((tmp_path / "profile.json").read_text())
    half = forward // 2  # one micro-batch
    assert profile["model"]["flops"]["forward"] == half
    assert profile["model"]["flops"]["backward"] == 2 * half
    assert profile["model"]["params"] == start["params"]
    assert profile["model"]["forward_s"] > 0
    assert profile["update_s"] > 0
    for rank in (0, 1):
        trace = json.loads((tmp_path / "run" / f"trace-rank{rank}.json").read_text())["traceEvents"]
        spans = [event["name"] for event in trace if event.get("cat") == "user_annotation"]
        assert (spans.count("engine.forward"), spans.count("engine.step")) == (2, 1)
        assert "zero.reduce" in spans
        assert ("zero.unshard" in spans) == (stage == 3)


def test_a_run_that_asks_for_nothing_has_no_observers_and_writes_nothing(tmp_path: Path) -> None:
    (off,) = run_ranks(1, train, 2, str(tmp_path), {"steps_per_print": None})
    assert off["out"] == ""
    assert list(tmp_path.iterdir()) == []


def observers(rank: int, world_size: int, extra: dict[str, Any], environment: dict[str, str]) -> tuple[list[str], str]:
    os.environ.update(environment)
    try:
        with engine_of(build("mlp"), make_config(0, micro=2, **extra)) as engine:
            watching = [o for o in engine._observers if not isinstance(o, PhaseClocks)]
            run_dir = engine.monitor.run_dir
            assert run_dir is None or run_dir.is_absolute()  # the script may go elsewhere before the first record
            return [type(observer).__name__ for observer in watching], run_dir.name if run_dir else "None"
    finally:
        for name in environment:
            os.environ.pop(name)


@pytest.mark.parametrize(
    ("extra", "environment", "expected"),
    [
        ({}, {}, ([], "None")),
        ({"monitor": {"run_dir": "there"}}, {}, (["StepReport"], "there")),
        ({}, {"DS_RUN_DIR": "env"}, (["StepReport"], "env")),
        ({"monitor": {"run_dir": "there"}}, {"DS_RUN_DIR": "env"}, (["StepReport"], "there")),
        ({"monitor": {"enabled": False}, "steps_per_print": 5}, {"DS_RUN_DIR": "env"}, (["StepReport"], "None")),
        ({"comms_logger": {"enabled": True}}, {}, (["StepReport"], "None")),
        ({"flops_profiler": {"enabled": True}}, {}, (["StepProfiler"], "None")),
        ({"flops_profiler": {"enabled": True, "profile_step": -1}}, {}, ([], "None")),
    ],
)
def test_what_is_asked_for_decides_what_watches_and_where_the_record_goes(
    extra: dict[str, Any], environment: dict[str, str], expected: tuple[list[str], str], tmp_path: Path
) -> None:
    (found,) = run_ranks(1, in_folder, str(tmp_path), extra, environment)
    assert found == expected


def in_folder(rank: int, world_size: int, folder: str, *args: Any) -> Any:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return observers(rank, world_size, *args)
    finally:
        os.chdir(before)
        comm.configure(enabled=False)
        Current.recorder = None


def test_progress_lines_alone_write_nothing(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, train, 1, str(tmp_path), {"steps_per_print": 5})
    assert "step 5 | loss" in seen["out"]
    assert "record in" not in seen["out"]
    assert list(tmp_path.iterdir()) == []


def refused_in_folder(rank: int, world_size: int, folder: str, asked: dict[str, Any]) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        in_folder(rank, world_size, folder, {"monitor": asked}, {})
    return str(caught.value)


@pytest.mark.parametrize("asked", [{"enabled": True}, {"trace_step": 1}])
def test_a_record_or_a_trace_without_a_folder_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    (words,) = run_ranks(1, refused_in_folder, str(tmp_path), asked)
    assert "needs a directory, and none is named" in words
    assert "--run_dir" in words


def test_a_disk_that_is_full_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.jsonl").symlink_to("/dev/full")
    (tmp_path / "csv").touch()  # a file where a folder should go
    extra = {
        "monitor": {"run_dir": "run", "trace_step": 1},
        "csv_monitor": {"enabled": True, "output_path": "csv"},
        "wandb": {"enabled": True, "project": "\0"},
        "flops_profiler": {"enabled": True, "output_file": "csv/below/a/file.txt"},
    }
    (seen,) = run_ranks(1, train, 2, str(tmp_path), extra)
    (plain,) = run_ranks(1, train, 2, str(tmp_path), {})
    assert seen["losses"] == plain["losses"]


def own_backward(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """A script that calls loss.backward() itself, evaluates in between, and waits for a tier."""
    config = make_config(2, micro=2, monitor={"run_dir": folder, "peak_tflops": 2.0})
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=2, accumulation=1, samples=2)
    with engine_of(model, config) as engine:
        for (micro,) in batches:
            loss: Tensor = engine(*micro)
            loss.backward()
            with torch.no_grad():
                engine(*micro)
            OFFLOAD.add(0.25, "read", 10)
            engine.step()
        engine.monitor.write_events([("mine", 3.0, engine.global_samples)])
    return record(Path(folder))


def test_plain_backward_evaluation_and_offload_waits_are_told_apart(tmp_path: Path) -> None:
    ((_, *steps, event),) = run_ranks(1, own_backward, str(tmp_path))
    forward = 2 * 2 * 12 * (12 * 2 * 32 * 32 + 48 * 32) + 4 * 2 * 12 * 12 * 32 * 2
    for step in steps:
        assert "loss" not in step  # nobody told
        assert (step["flops"], step["step_tokens"], step["peak_flops"]) == (3 * forward, 24, 2e12)
        assert step["backward_s"] > 0
        assert step["wait_offload_s"] == pytest.approx(0.25)
    assert (event["kind"], event["name"], event["value"]) == ("event", "mine", 3.0)


def traced(rank: int, world_size: int, path: str) -> None:
    (((x, y),),) = make_batches(build("mlp"), num_steps=1, accumulation=1, samples=2)
    with engine_of(build("mlp"), make_config(0, micro=2)) as engine, engine.trace(path):
        engine(x, y)


def test_a_trace_can_be_taken_by_hand(tmp_path: Path) -> None:
    run_ranks(1, traced, str(tmp_path / "a" / "trace.json"))
    names = [event["name"] for event in json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]]
    assert "engine.forward" in names


def profile_of_first_step(rank: int, world_size: int) -> str:
    out = io.StringIO()
    config = make_config(0, micro=2, flops_profiler={"enabled": True, "detailed": False})
    batches = make_batches(build("mlp"), num_steps=3, accumulation=1, samples=2)
    with contextlib.redirect_stdout(out), engine_of(build("mlp"), config) as engine:
        for i, (micro,) in enumerate(batches):
            engine.backward(engine(*micro))
            engine.step()
            assert ("flops profile" in out.getvalue()) == (i >= 1)
        assert not any(m._forward_pre_hooks for m in engine.module.modules())
    return out.getvalue()


def test_a_profile_without_a_file_is_printed_once_and_takes_its_hooks_away() -> None:
    (text,) = run_ranks(1, profile_of_first_step)
    assert text.count("DeepSpeed flops profile: Mlp, step 2") == 1
    assert "Every module" not in text
