"""Worker processes: exit codes, last words, and that nothing is left running. Workers are shell scripts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepspeed.launcher import supervise
from deepspeed.launcher.failure import describe_exit, last_words, shell_code
from deepspeed.launcher.job import Worker
from deepspeed.launcher.outlet import Outlet, WholeLines
from deepspeed.launcher.supervise import Supervisor
from deepspeed.utils.errors import DeepSpeedError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")
REPOSITORY = Path(__file__).resolve().parents[2]
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nValueError: boom'


def _shell(rank: int, script: str, log: Path | None = None) -> Worker:
    return Worker(rank=rank, command=["/bin/sh", "-c", script], environ={**os.environ, "RANK": str(rank)}, log=log)


def _run(*scripts: str, grace_s: float = 10.0) -> int:
    return Supervisor([_shell(rank, script) for rank, script in enumerate(scripts)], grace_s=grace_s).run()


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _pids(folder: Path, count: int) -> list[int]:
    """The ids that `count` processes wrote into files of the folder."""
    assert _until(lambda: sum(bool(f.read_text().endswith("\n")) for f in folder.glob("*.pid")) == count, 60.0)
    return [int(file.read_text()) for file in folder.glob("*.pid")]


def test_all_ranks_well_is_zero() -> None:
    assert _run("true", "sleep 0.05", "exit 0") == 0


def test_the_first_failing_ranks_code_is_the_result() -> None:
    assert _run("sleep 30", "sleep 0.05; exit 3", "sleep 30") == 3


def test_a_rank_killed_by_a_signal_gives_256_minus_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("kill -9 $$", "sleep 30") == 247
    written = capfd.readouterr().err
    assert "rank 0 failed first (host " in written
    assert written.rstrip().splitlines()[-1].startswith("rank 0: exit code -9, SIGKILL: killed from outside, probably")


def test_the_failing_ranks_traceback_is_the_last_thing_written(capfd: pytest.CaptureFixture[str]) -> None:
    noisy = "trap 'echo stopped >&2; exit 1' TERM; while :; do sleep 0.01; done"
    code = _run(noisy, f"sleep 0.2; echo before >&2; echo '{TRACEBACK}' >&2; exit 1")
    written = capfd.readouterr().err
    assert code == 1
    assert written.endswith(f"): exit code 1 ----\n{TRACEBACK}\n")
    assert "stopped" in written
    assert written.count("ValueError: boom") == 2


def test_output_passes_through_while_workers_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo progress >&2; until [ -e {go} ]; do sleep 0.01; done; printf 'no newline' >&2"
    seen: list[str] = []

    def note(number: int, frame: object) -> None:
        seen.append(capfd.readouterr().err)
        if "".join(seen).endswith("progress\n"):
            go.touch()
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        assert _run(script) == 0, "a worker that goes on only when its words were seen"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "".join(seen) == "progress\n"
    assert capfd.readouterr().err == "no newline"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_lines_of_several_ranks_come_whole(
    descriptor: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "HOLD_S", 60.0)  # a rank that waits for a processor is not late
    script = f"for i in $(seq 300); do printf 'rank ' >&{descriptor}; printf \"$RANK \" >&{descriptor}; echo $i >&{descriptor}; done"
    assert _run(script, script) == 0
    lines = capfd.readouterr()[descriptor - 1].splitlines()
    assert sorted(lines) == sorted(f"rank {rank} {i}" for rank in (0, 1) for i in range(1, 301))
    assert [line for line in lines if line.startswith("rank 1")] == [f"rank 1 {i}" for i in range(1, 301)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """The rank that fails does so after the other has written."""
    last = f"until [ -e {tmp_path}/written ]; do sleep 0.05; done; echo two; exit 3"
    call = f"_run('echo one; touch {tmp_path}/written', '{last}')"
    code = f"from tests.launcher.test_supervise import _run\nimport sys; sys.exit({call})"
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 3
    assert "8 bytes of the ranks' output could not be written: No space left on device ----" in ended.stderr


def test_the_beginning_of_a_line_is_shown_when_its_end_does_not_come(capfd: pytest.CaptureFixture[str]) -> None:
    lines = WholeLines(Outlet(1), hold_s=5.0)
    seen = []
    for data, now_s in [(b"name: ", 0.0), (b"", 4.0), (b"x\n10 %\r", 4.0), (b"20 %", 6.0), (b"", 12.0)]:
        lines.write(data, now_s)
        lines.let_go(now_s)
        seen.append(capfd.readouterr().out)
    assert seen == ["", "", "name: x\n10 %\r", "", "20 %"]
    assert not lines.holds_any


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    start_s = time.monotonic()
    assert _run("trap '' TERM; while :; do sleep 0.05; done", "sleep 0.1; exit 2", grace_s=0.3) == 2
    assert 0.3 < time.monotonic() - start_s < 5


def test_children_of_workers_end_with_them(tmp_path: Path) -> None:
    child = f"sleep 60 & echo $! > {tmp_path}/child.pid; wait"
    assert _run(child, "sleep 0.3; exit 1") == 1
    [pid] = _pids(tmp_path, 1)
    assert not _is_alive(pid)


def test_what_workers_that_ended_well_leave_running_ends(tmp_path: Path) -> None:
    assert _run(f"sleep 100 & echo $! > {tmp_path}/0.pid") == 0
    assert not any(map(_is_alive, _pids(tmp_path, 1)))


def test_a_job_that_is_asked_to_end_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("kill -s TERM $PPID; sleep 100") == 1
    assert capfd.readouterr().err == "\n---- stopped by SIGTERM; all ranks were ended ----\n"


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Started by a shell's `&` or nohup, this process ignores SIGINT, and so would the supervisor in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_lets_a_rank_save_before_it_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saver = f"trap 'sleep 0.2; touch {tmp_path}/$0; exit 1' INT; while :; do sleep 0.01; done"
    assert (
        _run(f"sh -c {shlex.quote(saver)} a", f"sh -c {shlex.quote(saver)} b & sleep 0.3; kill -s INT $PPID; wait") == 1
    )
    assert (tmp_path / "a").exists()
    assert capfd.readouterr().err == "\n---- stopped by SIGINT; all ranks were ended ----\n"


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_rank_that_ignores_ctrl_c_is_asked_to_end_and_then_killed(tmp_path: Path) -> None:
    start_s = time.monotonic()
    rank = f"trap '' INT; trap 'touch {tmp_path}/asked' TERM; while :; do sleep 0.01; done"
    assert _run(rank, "sleep 0.1; kill -s INT $PPID; exit 0", grace_s=0.4) == 1
    assert (tmp_path / "asked").exists()
    assert 0.8 < time.monotonic() - start_s < 8


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_kills_at_once() -> None:
    start_s = time.monotonic()
    twice = "sleep 0.1; kill -s INT $PPID; sleep 0.3; kill -s INT $PPID; sleep 100"
    assert _run("trap '' INT TERM; while :; do sleep 0.01; done", f"trap '' INT; {twice}", grace_s=30) == 1
    assert time.monotonic() - start_s < 15


def test_who_had_ended_well_before_a_peer_missed_it_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("exit 0", "sleep 0.5; echo 'RuntimeError: Connection closed by peer' >&2; exit 1") == 1
    assert "\nended before it, without an error: rank 0. Do all ranks" in capfd.readouterr().err
    assert _run("exit 0", "sleep 0.2; echo 'ValueError' >&2; exit 1") == 1
    assert "ended before it" not in capfd.readouterr().err


def test_the_commands_own_pipes_are_never_its_standard_streams(tmp_path: Path) -> None:
    """Started with 0, 1 and 2 closed, as some daemons start things."""
    (tmp_path / "x.py").write_text("import sys; print('x' * 100000); open(sys.argv[-1], 'w').write('done')")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", str(tmp_path / "x.py")]
    line = f"exec {shlex.join([*command, str(tmp_path / 'out')])} <&- >&- 2>&-"
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(["sh", "-c", line], env=environ, timeout=60).returncode == 0
    assert (tmp_path / "out").read_text() == "done"


def test_a_child_that_saves_its_work_on_sigterm_may_finish_within_the_grace_period(tmp_path: Path) -> None:
    saver = f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM; while :; do sleep 0.01; done"
    _run(f'/bin/sh -c "{saver}" & wait', "sleep 0.3; exit 1")
    assert (tmp_path / "saved").exists()


def test_each_rank_writes_its_own_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    scripts = ["echo out; echo err >&2; sleep 30", f"sleep 0.2; echo '{TRACEBACK}' >&2; exit 1"]
    code = Supervisor([_shell(rank, scripts[rank], logs[rank]) for rank in range(2)]).run()
    written = capfd.readouterr()
    assert (code, logs[0].read_text(), written.out) == (1, "out\nerr\n", "")
    assert f"its output is in {logs[1]}" in written.err
    assert written.err.endswith(f"{TRACEBACK}\n")


def test_a_command_that_cannot_start_stops_the_others(tmp_path: Path) -> None:
    absent = Worker(rank=1, command=[str(tmp_path / "absent")], environ={})
    present = _shell(0, f"echo $$ > {tmp_path}/0.pid; sleep 60")
    with pytest.raises(DeepSpeedError, match=r"rank 1 cannot be started: '.*absent': No such file"):
        Supervisor([present, absent]).run()
    assert not any(_is_alive(int(file.read_text() or 0)) for file in tmp_path.glob("*.pid"))


def test_signal_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    _run("true")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def _heed_signals() -> None:
    """Undo what `nohup` or a shell's `&` around the tests had this process ignore, and a launcher rightly inherits."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `deepspeed` command with two ranks that write their process ids and wait."""
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/$RANK.pid\nexec sleep 60\n")
    script.chmod(0o755)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_python", "--save_pid"]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, str(script)],
        cwd=REPOSITORY,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGKILL, -9)]
)
def test_no_worker_outlives_the_command(
    launcher: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pids = _pids(tmp_path, 2)
    pid_file = tmp_path / f"{launcher.pid}.deepspeed"
    assert pid_file.read_text() == str(launcher.pid)
    launcher.send_signal(number)
    assert launcher.wait(10) == code
    assert _until(lambda: not any(map(_is_alive, pids)))
    assert pid_file.exists() == (number == signal.SIGKILL)


def test_a_killed_worker_ends_the_command_and_the_other_workers(
    launcher: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pids = _pids(tmp_path, 2)
    os.kill(pids[0], signal.SIGKILL)
    assert launcher.wait(10) == 247
    assert not any(map(_is_alive, pids))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "exit code 1"),
        (-9, "exit code -9, SIGKILL: .*memory ran out"),
        (137, "exit code 137, SIGKILL: .*memory ran out"),
        (-7, "exit code -7, SIGBUS: .*/dev/shm"),
        (-11, "exit code -11, SIGSEGV: invalid memory access"),
        (139, "exit code 139, SIGSEGV"),
        (-6, "exit code -6, SIGABRT: native code gave up"),
        (-15, "exit code -15, SIGTERM: asked to end"),
        (-10, "exit code -10, SIGUSR1$"),
        (255, "exit code 255$"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="signal numbers are Linux's")
def test_exit_codes_are_decoded(code: int, words: str) -> None:
    assert re.match(words, describe_exit(code))


def test_negative_codes_become_what_a_shell_can_see() -> None:
    assert [shell_code(code) for code in (0, 3, -9, -15)] == [0, 3, 247, 241]


def test_last_words_are_the_last_traceback_with_what_it_came_from() -> None:
    old, cause, last = (TRACEBACK.replace("boom", word) for word in ("old", "cause", "last"))
    chain = f"{cause}\n\nDuring handling of the above exception, another exception occurred:\n\n{last}"
    assert last_words(f"{old}\nnoise\n{chain}\n".encode()) == chain
    prefixed = f"noise\n[rank0]: {TRACEBACK}"
    assert last_words(prefixed.encode()) == f"[rank0]: {TRACEBACK}"


def test_without_a_traceback_the_last_lines_are_the_last_words() -> None:
    lines = [f"line {i}" for i in range(100)]
    assert last_words("\n".join(lines).encode()).splitlines() == lines[-20:]
    assert last_words(b"") == ""


def test_a_line_without_end_is_not_all_shown() -> None:
    assert last_words(b"Traceback (most recent call last):\nValueError: " + b"z" * 50000).endswith(
        "z... (50012 characters)"
    )
