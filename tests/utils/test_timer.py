"""Timers that scripts use by their old names."""

from __future__ import annotations

import time

from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer


def test_a_running_timer_tells_its_time_so_far() -> None:
    timer = SynchronizedWallClockTimer()("forward")
    timer.start()
    time.sleep(0.002)
    assert timer.elapsed() >= 2.0
    assert timer.elapsed() < 2.0, "the first reading reset it"
    timer.stop(record=True)
    assert timer.mean() > 0


def test_memory_is_told_as_text() -> None:
    assert SynchronizedWallClockTimer.memory_usage().startswith(("device ", "host "))


def test_throughput_is_told_every_so_many_steps() -> None:
    said: list[str] = []
    timer = ThroughputTimer(None, 8, start_step=0, steps_per_output=2, monitor_memory=True, logging_fn=said.append)
    for _ in range(4):
        timer.start()
        timer.stop(global_step=True)
    assert [line.partition(":")[0] for line in said] == ["step 2", "step 4"]
    assert "samples per second, " in said[0] and "GiB" in said[0]


def test_timers_that_are_off_take_the_same_calls() -> None:
    timer = NoopTimer()
    timer("a").start()
    timer("a").stop(True)
    assert timer("a").elapsed(False) == 0.0
