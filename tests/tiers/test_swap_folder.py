"""Swap folders: locked while their owner lives, removed when it does not, never touched in doubt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspeed.tiers import swap_folder
from deepspeed.tiers.swap_folder import SwapFolder, file_system, remove_stale
from deepspeed.utils.errors import TierError
from deepspeed.utils.logging import logger

ANOTHER_JOB = """
    import sys
    from deepspeed.tiers.swap_folder import SwapFolder
    folder = SwapFolder(sys.argv[1], 0, sys.argv[2])
    (folder.folders[0] / "data").write_bytes(bytes(4_000_000))
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def another_job(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that holds a folder under `tmp_path` until a line arrives at its input."""
    started: list[subprocess.Popen[str]] = []

    def start(job_id: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(ANOTHER_JOB), str(tmp_path), job_id]
        job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(job)
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        return job

    yield start
    for job in started:
        job.kill()
        job.communicate()


def jobs_in(path: Path) -> list[str]:
    return sorted(each.name for each in (path / "deepspeed_swap").iterdir() if each.is_dir())


def plant(path: Path, **owner: object) -> Path:
    """What a rank leaves that died: its folder, and a lock that nobody holds."""
    folder = path / "deepspeed_swap" / "dead" / "rank0"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"x" * 100)
    (folder / "lock").write_text(json.dumps(owner))
    return folder


def test_a_folder_lives_as_long_as_its_owner_wants(tmp_path: Path) -> None:
    folders = [SwapFolder(tmp_path, rank, "job") for rank in (0, 1)]
    assert [f.folders for f in folders] == [(tmp_path / f"deepspeed_swap/job/rank{rank}",) for rank in (0, 1)]
    folders[0].close()
    assert not folders[0].folders[0].exists() and folders[1].folders[0].exists()
    folders[1].close()
    folders[1].close()
    assert jobs_in(tmp_path) == []


def test_two_jobs_on_one_path_do_not_meet(tmp_path: Path) -> None:
    first, second = SwapFolder(tmp_path, 0), SwapFolder(tmp_path, 0)
    assert first.folders != second.folders and first.folders[0].exists() and second.folders[0].exists()
    first.close()
    second.close()


def test_the_same_job_and_rank_twice_is_an_error(
    tmp_path: Path, another_job: Callable[[str], subprocess.Popen[str]]
) -> None:
    job = another_job("job")
    with pytest.raises(TierError, match=rf"\[rank 0\] .*/job/rank0 is in use by process {job.pid} on .*, since 20"):
        SwapFolder(tmp_path, 0, "job")
    assert (tmp_path / "deepspeed_swap/job/rank0/data").stat().st_size >= 4_000_000


def test_a_killed_job_s_files_go_when_the_next_one_starts(
    tmp_path: Path, another_job: Callable[[str], subprocess.Popen[str]]
) -> None:
    living, killed = another_job("living"), another_job("killed")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert jobs_in(tmp_path) == ["killed", "living"]
    mine = SwapFolder(tmp_path, 0, "mine")
    assert jobs_in(tmp_path) == ["living", "mine"]
    mine.close()
    living.communicate("\n", timeout=30)
    assert jobs_in(tmp_path) == []  # ended in the ordinary way: it removed its own


def test_a_job_that_restarts_under_its_old_name_begins_afresh(
    tmp_path: Path, another_job: Callable[[str], subprocess.Popen[str]]
) -> None:
    killed = another_job("job")
    killed.kill()
    killed.wait()
    folder = SwapFolder(tmp_path, 0, "job")
    assert [path.name for path in folder.folders[0].iterdir()] == ["lock"]
    folder.close()


@pytest.mark.parametrize("is_shared", [False, True])
def test_on_a_local_disk_any_free_lock_is_a_dead_owner_s(tmp_path: Path, is_shared: bool) -> None:
    folder = plant(tmp_path, host="another", boot="another")
    assert remove_stale(tmp_path / "deepspeed_swap", is_shared=is_shared) == ([] if is_shared else [folder])
    assert folder.exists() == is_shared


def test_on_a_shared_disk_this_host_s_dead_are_removed_and_others_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(swap_folder, "warn_once", warned.append)
    mine = plant(tmp_path, **swap_folder._this_host())
    assert remove_stale(tmp_path / "deepspeed_swap", is_shared=True) == [mine]
    plant(tmp_path, host="another", boot="another")
    assert remove_stale(tmp_path / "deepspeed_swap", is_shared=True) == []
    assert "dead/rank0 of another. Delete dead jobs'" in warned[0]


def test_a_folder_whose_maker_died_before_it_was_locked_is_stale(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_swap" / "half" / "rank0").mkdir(parents=True)
    SwapFolder(tmp_path, 0, "mine").close()
    assert jobs_in(tmp_path) == []


def test_a_job_that_ends_while_another_starts_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = SwapFolder(tmp_path, 0, "ending")
    listed = os.listdir

    def end_then_list(path: Any = ".") -> list[str]:
        if Path(path).name == "ending":
            ending.close()
        return listed(path)

    monkeypatch.setattr(os, "listdir", end_then_list)
    starting = SwapFolder(tmp_path, 0, "starting")
    assert jobs_in(tmp_path) == ["starting"]
    starting.close()


@pytest.mark.parametrize("job_id", ["", "one_job"])
def test_ranks_that_start_and_end_at_once_do_not_meet(tmp_path: Path, job_id: str) -> None:
    code = """if True:
        import sys
        from deepspeed.tiers.swap_folder import SwapFolder
        for _ in range(200):
            SwapFolder(sys.argv[1], int(sys.argv[2]), sys.argv[3] or None).close()
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), job_id], stderr=subprocess.PIPE, text=True) for rank in range(3)]
    assert [(rank.communicate()[1], rank.returncode) for rank in ranks] == [("", 0)] * 3
    assert jobs_in(tmp_path) == []


def test_other_files_beside_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_swap" / "notes").mkdir(parents=True)
    (tmp_path / "deepspeed_swap" / "notes" / "readme").write_text("mine")
    SwapFolder(tmp_path, 0).close()
    assert (tmp_path / "deepspeed_swap" / "notes" / "readme").read_text() == "mine"


def test_a_forked_child_that_ends_takes_nothing_with_it(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path, 0)
    child = os.fork()
    if not child:
        folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    folder.check()
    folder.close()


def test_an_unusable_path_says_why_and_what_to_do(tmp_path: Path, small_disk: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "no" / "such", "No such file or directory.\n  Its parent does not exist: mount the disk"),
        (tmp_path / "file", "File exists.\n  Name a folder, not a file."),
        (tmp_path / "file" / "below", "Not a directory.\n  Name a folder"),
        (small_disk("1m", "ro"), "Read-only file system.\n  It is mounted read-only"),
    ]
    for path, words in cases:
        with pytest.raises(TierError) as raised:
            SwapFolder(path, 2)
        assert str(raised.value) == f"[rank 2] nvme_path {path}: " + str(raised.value).partition(": ")[2]
        assert words in str(raised.value)


def test_a_path_of_another_user_says_so(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for parent in tmp_path.parents[:2]:
        os.chmod(parent, 0o755)
    os.chmod(tmp_path, 0o755)
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        os.setresuid(65534, 65534, 65534)
        try:
            SwapFolder(locked, 1)
        except TierError as error:
            os.write(tells, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(told, 10_000).decode()
    os.close(told)
    os.close(tells)
    assert text.startswith(f"[rank 1] nvme_path {locked}: Permission denied.\n  Make it writable for this user")


def test_several_paths_are_named_once_each(tmp_path: Path) -> None:
    for paths in ([], [tmp_path, tmp_path / ".." / tmp_path.name]):
        with pytest.raises(TierError, match="name at least one folder, each once"):
            SwapFolder(paths, 0)
    with pytest.raises(TierError, match="job id '../x' does not name a folder"):
        SwapFolder(tmp_path, 0, "../x")


def test_a_failure_on_the_second_path_leaves_nothing_on_the_first(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="No such file"):
        SwapFolder([tmp_path, tmp_path / "no" / "such"], 0)
    assert jobs_in(tmp_path) == []


def test_a_path_in_memory_is_pointed_out(in_memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert file_system(in_memory) == "tmpfs"
    logger.addHandler(caplog.handler)
    try:
        SwapFolder(in_memory, 0).close()
    finally:
        logger.removeHandler(caplog.handler)
    assert f"nvme_path {in_memory} is in memory (tmpfs)" in caplog.text
