"""The progress line, as text."""

from __future__ import annotations

import gc
from typing import Any

from deepspeed.monitor.line import RankNumbers, progress_line, short
from deepspeed.monitor.step import StepNumbers
from deepspeed.monitor.stretch import Stretch


def numbers(**changes: Any) -> StepNumbers:
    known: dict[str, Any] = {
        "step": 10, "samples": 80, "time": 0.0, "step_s": 0.5, "loss": 2.0, "lr": [1e-3, 1e-3], "grad_norm": 0.5, "loss_scale": 1.0, "skipped": 0,
        "step_samples": 8, "step_tokens": 512, "flops": 1e9, "peak_flops": 1e10, "wait_comm_s": 0.05, "wait_offload_s": 0.01,
        "memory": {"device": 10**9, "device_peak": 2 * 10**9, "cpu": 5 * 10**8},
    }  # fmt: skip
    return StepNumbers(**(known | changes))


def stretch(*steps: StepNumbers) -> Stretch:
    made = Stretch()
    for step in steps:
        made.add(step)
    return made


def rank(**changes: Any) -> RankNumbers:
    known: dict[str, Any] = {
        "loss": 2.0,
        "wall_s": 1.0,
        "wait_comm_s": 0.1,
        "device_nbytes": 10**9,
        "device_peak_nbytes": 2 * 10**9,
    }
    return RankNumbers(**(known | changes))


def test_the_line_has_everything() -> None:
    line = progress_line(
        stretch(numbers(step=9), numbers()), [rank(), rank(loss=3.0, wait_comm_s=0.3, device_nbytes=11 * 10**8)]
    )
    assert line == (
        "step 10 | loss 2.5000 | lr 0.001 | norm 0.5 | 1.02k tokens/s | 0.002 TFLOP/s | MFU 20.0 % | "
        "device 1.1 GB (peak 2), cpu 0.5 GB | wait: communication 10 % (10 to 30), offload 2 %"
    )


def test_what_is_not_known_is_left_out() -> None:
    line = progress_line(
        stretch(numbers(loss=None, grad_norm=None, step_tokens=None, flops=None, memory={})), [rank(loss=None)]
    )
    assert line == (
        "step 10 | loss - | lr 0.001 | 16 samples/s | device 1 GB (peak 2) | wait: communication 10 %, offload 2 %"
    )


def test_breakdowns_scale_and_skipped_steps_are_added() -> None:
    line = progress_line(
        stretch(numbers(loss_scale=1024.0, skipped=2, lr=[1e-3, 2e-3])), [rank()], {"forward": 1.25, "step": 3.0}, {"gradients": 10**9}
    )  # fmt: skip
    assert "lr 0.001, 0.002 | norm 0.5 | scale 1024 | skipped 2 |" in line
    assert line.endswith("| forward 1.2 ms, step 3.0 ms | gradients 1 GB")


def test_a_long_stretch_keeps_no_step_but_the_last() -> None:
    steps = [numbers(step=i) for i in range(100)]
    made = stretch(*steps)
    assert made.num_steps == 100
    assert sum(any(held is step for step in steps) for held in gc.get_referents(made.__dict__)) == 1


def test_derived_numbers_follow_from_the_step() -> None:
    step = numbers()
    assert (step.samples_per_s, step.tokens_per_s, step.tflops, step.mfu) == (16.0, 1024.0, 0.002, 0.2)
    assert step.as_record()["mfu"] == 0.2
    events = {name: (value, x) for name, value, x in step.as_events()}
    assert events["Train/Samples/train_loss"] == (2.0, 80)
    assert events["Train/Samples/lr"] == (1e-3, 80)
    assert "Train/Samples/loss_scale" not in events


def test_numbers_are_short() -> None:
    assert [short(n) for n in (0, 12, 999, 1234, 10_844_160, 7e9, 1.5e12, 2e15)] == [
        "0", "12", "999", "1.23k", "10.8M", "7G", "1.5T", "2e+03T",
    ]  # fmt: skip
