"""The harness keeps its promises: results in order, failures told in full and quickly, nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import harness
from tests.harness import RanksFailedError, UnpicklableError, run_alone, run_ranks


def _sum_of_ranks(rank: int, world_size: int, scale: float) -> tuple[torch.Tensor, int]:
    total = torch.tensor(rank * scale)
    dist.all_reduce(total)
    return total, world_size


def _process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def _fail_on_last_rank_while_others_wait(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise KeyError("lost weight")
    dist.barrier()


class _HeldError(Exception):
    def __init__(self, text: str, lock: object) -> None:
        super().__init__(text)
        self.lock = lock


def _fail_with_a_lock(rank: int, world_size: int) -> None:
    raise _HeldError("held", threading.Lock())


def _sleep_in_named_function(rank: int, world_size: int) -> None:
    time.sleep(60)


def _wait_in_a_collective(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()
    time.sleep(60)


def _compute_on_core(rank: int, world_size: int, core: int, cpu_s: float) -> float:
    """How long it took."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    start, until = time.monotonic(), time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass
    os.sched_setaffinity(0, allowed)
    return time.monotonic() - start


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _sleep_deaf_to_signals(rank: int, world_size: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    time.sleep(60)


def _take_the_signal(rank: int, world_size: int) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _leak_environment(rank: int, world_size: int) -> None:
    os.environ["LEFT_OVER"] = "1"


def _leak_thread(rank: int, world_size: int) -> None:
    threading.Thread(target=time.sleep, args=(60,), name="left-over", daemon=True).start()


def _leak_group(rank: int, world_size: int) -> None:
    dist.new_group([0, 1])


def _make_a_shared_group(rank: int, world_size: int) -> None:
    dist.new_group(list(range(world_size)), group_desc="dp.control")


def _end_default_group(rank: int, world_size: int) -> None:
    dist.destroy_process_group()


def _seed_and_threads(rank: int, world_size: int) -> tuple[float, int]:
    return torch.rand(1).item(), torch.get_num_threads()


def _take_more_threads(rank: int, world_size: int) -> None:
    torch.set_num_threads(3)


def _distributed_names(*names: str) -> tuple[list[str], bool]:
    return [name for name in names if name in os.environ], dist.is_initialized()


def test_results_come_in_rank_order() -> None:
    total, world_size = run_ranks(2, _sum_of_ranks, 10.0)[1]
    assert (total.item(), world_size) == (10.0, 2)
    assert run_ranks(2, _sum_of_ranks, scale=0.5)[0][0].item() == 0.5


def test_processes_are_reused_and_a_second_call_is_fast() -> None:
    first = run_ranks(2, _process_id)
    start = time.perf_counter()
    assert run_ranks(2, _process_id) == first
    assert time.perf_counter() - start < 1.0


def test_pools_that_hold_many_groups_end_longest_idle_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(2, _make_a_shared_group)
    pair, single = run_ranks(2, _process_id), run_ranks(1, _process_id)
    assert run_ranks(2, _process_id) == pair  # now the pool of one is the longest idle
    monkeypatch.setattr(harness, "KEPT_GROUPS", 4)
    assert run_ranks(2, _process_id) == pair
    assert run_ranks(1, _process_id) != single
    assert run_ranks(2, _process_id) != pair


def test_every_call_starts_with_one_thread_and_the_same_seed() -> None:
    (first, threads), (second, _) = run_ranks(2, _seed_and_threads)
    run_ranks(2, _take_more_threads)
    again, threads_again = run_ranks(2, _seed_and_threads)[0]
    assert first == second == again
    assert threads == threads_again == 1


def test_an_error_on_one_rank_ends_the_others_waiting_in_a_collective() -> None:
    run_ranks(2, _process_id)
    limit = harness.Limit([], 10.0)
    with pytest.raises(RanksFailedError, match="rank 1: KeyError") as caught:
        run_ranks(2, _fail_on_last_rank_while_others_wait)
    assert limit.left_s() > 0, "the others were waited for"
    assert isinstance(caught.value.rank_exceptions[1], KeyError)
    assert "raise KeyError" in str(caught.value)
    assert "_fail_on_last_rank_while_others_wait" in str(caught.value).split("rank 0 was still running")[1]
    assert run_ranks(2, _sum_of_ranks, 1.0)[0][1] == 2, "the next call has a new pool"


def test_an_exception_that_cannot_be_pickled_still_shows_its_type_and_traceback() -> None:
    with pytest.raises(RanksFailedError, match="raise _HeldError") as caught:
        run_ranks(2, _fail_with_a_lock)
    assert set(caught.value.rank_exceptions) == {0, 1}
    assert isinstance(caught.value.rank_exceptions[0], UnpicklableError)


def test_a_timeout_names_the_ranks_and_where_they_are() -> None:
    with pytest.raises(RanksFailedError, match="_sleep_in_named_function") as caught:
        run_ranks(2, _sleep_in_named_function, timeout=0.3)
    assert [type(error) for error in caught.value.rank_exceptions.values()] == [TimeoutError, TimeoutError]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not say who waits for a core")
def test_seconds_in_which_others_use_the_core_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_LOAD", 1000.0)
    core = min(os.sched_getaffinity(0))
    others = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(5)]
    try:
        for other in others:
            os.sched_setaffinity(other.pid, {core})
        assert run_ranks(1, _compute_on_core, core, 0.3, timeout=1.0)[0] > 1.0
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_the_main_thread_is_shown_where_another_thread_takes_the_signal() -> None:
    with pytest.raises(RanksFailedError, match="_sleep_deaf_to_signals"):
        run_ranks(2, _sleep_deaf_to_signals, timeout=0.3)


def test_a_call_that_takes_the_signal_does_not_blind_the_next() -> None:
    first = run_ranks(2, _process_id)
    run_ranks(2, _take_the_signal)
    assert run_ranks(2, _process_id) == first
    with pytest.raises(RanksFailedError, match="_sleep_in_named_function"):
        run_ranks(2, _sleep_in_named_function, timeout=0.3)


def test_a_dead_process_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RanksFailedError, match="exit code 7"):
        run_ranks(2, _die)


def test_a_leaked_environment_variable_fails_the_test() -> None:
    with pytest.raises(RanksFailedError, match="left behind: environment variable LEFT_OVER"):
        run_ranks(2, _leak_environment)


def test_a_leaked_thread_fails_the_test() -> None:
    with pytest.raises(RanksFailedError, match="left behind: thread left-over"):
        run_ranks(2, _leak_thread)


def test_a_leaked_process_group_fails_the_test() -> None:
    with pytest.raises(RanksFailedError, match=r"left behind: process group \[0, 1\]"):
        run_ranks(2, _leak_group)


def test_ending_the_pools_own_process_group_fails_the_test() -> None:
    with pytest.raises(RanksFailedError, match="an ended process group"):
        run_ranks(2, _end_default_group)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="not a module-level function"):
        run_ranks(2, lambda rank, world_size: None)


def test_run_alone_has_no_process_group_and_no_launcher_environment() -> None:
    assert run_alone(_distributed_names, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") == ([], False)


_HANG = """
from tests import harness, test_harness
if __name__ == "__main__":
    print(*harness.run_ranks(2, test_harness._process_id), flush=True)
    {}
"""


@pytest.mark.parametrize("then", ["input()", "harness.run_ranks(2, test_harness._wait_in_a_collective)"])
def test_workers_die_when_the_test_process_is_killed(then: str, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(_HANG.format(then))
    root = str(Path(__file__).resolve().parent.parent)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in workers)


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
