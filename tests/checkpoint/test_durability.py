"""Saves that fail, full disks, what stays behind, retention, replacement, asynchronous saves."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed.checkpoint import files, writer
from deepspeed.checkpoint.aside import remove_stale, retain
from deepspeed.checkpoint.find import latest_tag
from deepspeed.checkpoint.staging import BLOCK
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed.utils.errors import CheckpointError
from tests.checkpoint.runs import batches_of, config_of, train
from tests.engine.runs import engine_of
from tests.harness import run_ranks
from tests.models import build
from tests.soak.crash import soak

ASYNC = {"checkpoint": {"async_save": True}}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fail_then_succeed(rank: int, world_size: int, folder: Path, call: str, failing: int, is_async: bool) -> str:
    """A save, a save in which `call` fails on rank `failing`, another save; the error's words."""
    model = build("mlp")
    real = getattr(os, call)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "injected")

    with engine_of(model, config_of(2, world_size, **(ASYNC if is_async else {}))) as engine:
        train(engine, batches_of(model, 1), rank, world_size)
        engine.save_checkpoint(str(folder), tag="first")
        engine.wait_for_checkpoint()
        if rank == failing:
            setattr(os, call, broken)
        try:
            with pytest.raises(CheckpointError) as caught:
                engine.save_checkpoint(str(folder), tag="second")
                engine.wait_for_checkpoint()
        finally:
            setattr(os, call, real)
        before = latest_tag(folder), (folder / "second").exists()
        assert before == ("first", False)
        torch.distributed.barrier()
        engine.save_checkpoint(str(folder), tag="third")
        engine.wait_for_checkpoint()
    return str(caught.value)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("call", "failing"),
    [("pwrite", 1), ("fsync", 1), ("posix_fallocate", 1), ("ftruncate", 0), ("fsync", 0), ("rename", 0)],
)
def test_a_write_error_on_one_rank_is_raised_on_all_and_harms_nothing(
    tmp_path: Path, call: str, failing: int, is_async: bool
) -> None:
    texts = run_ranks(2, _fail_then_succeed, tmp_path, call, failing, is_async)
    assert texts[0] == texts[1]
    assert f"[rank {failing}] OSError: [Errno 5] injected" in texts[0]
    assert "second" in texts[0]
    assert [name for name in _names(tmp_path) if not name.startswith(".")] == [
        "first",
        "latest",
        "third",
        "zero_to_fp32.py",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill_the_disk(rank: int, world_size: int, folder: Path) -> tuple[int, str]:
    model = torch.nn.Linear(128, 80)  # 41 kB of weights, 123 kB with moments
    with engine_of(model, config_of(2, world_size)) as engine:
        x = torch.randn(2, 128)
        engine.backward(engine(x).square().mean())
        engine.step()
        for number in range(40):
            try:
                engine.save_checkpoint(str(folder), tag=f"save{number}")
            except CheckpointError as error:
                return number, str(error)
    raise AssertionError("the disk never filled")


def test_a_full_disk_leaves_the_last_whole_checkpoint(small_disk: Path) -> None:
    (number, text), (other, _) = run_ranks(2, _fill_the_disk, small_disk)
    assert number == other > 2
    assert "No space left on device: '" in text
    assert "Make room" in text
    assert latest_tag(small_disk) == f"save{number - 1}"
    assert not [name for name in _names(small_disk) if name.startswith(".")]
    assert get_fp32_state_dict_from_zero_checkpoint(small_disk)["weight"].shape == (80, 128)


def _save_many(rank: int, world_size: int, folder: Path, tags: list[str], extra: dict[str, Any]) -> list[float]:
    model = build("mlp")
    times = []
    with engine_of(model, config_of(1, world_size, **extra)) as engine:
        for tag, batch in zip(tags, batches_of(model, len(tags)), strict=True):
            train(engine, [batch], rank, world_size)
            engine.save_checkpoint(str(folder), tag=tag)
        times.append(engine.wait_for_checkpoint().total_ms)
    return times


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    (tmp_path / "not-a-checkpoint").mkdir()
    run_ranks(2, _save_many, tmp_path, ["a", "b", "c", "d"], {"checkpoint": {"keep_last_n": 2}})
    assert _names(tmp_path) == ["c", "d", "latest", "not-a-checkpoint", "zero_to_fp32.py"]
    (tmp_path / "latest_universal").write_text("c")
    retain(tmp_path, 1, tmp_path / "d")
    assert _names(tmp_path)[:2] == ["c", "d"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_saving_over_a_tag_replaces_it_and_keeps_what_others_put_there(tmp_path: Path, can_swap: bool) -> None:
    save = _save_many if can_swap else _save_without_swap
    run_ranks(1, save, tmp_path, ["same"], {})
    old = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    (tmp_path / "same" / "notes.txt").write_text("mine")
    run_ranks(2, save, tmp_path, ["same"] * 3, {})
    new = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert not torch.equal(old["head.weight"], new["head.weight"])
    assert (tmp_path / "same" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "same" / "shard-00000-of-00001.safetensors").exists()
    assert _names(tmp_path) == ["latest", "same", "zero_to_fp32.py"]


def _save_without_swap(rank: int, world_size: int, *args: Any) -> list[float]:
    real, files.swap = files.swap, lambda one, other: False
    try:
        return _save_many(rank, world_size, *args)
    finally:
        files.swap = real


def test_a_replacement_that_died_between_two_renames_is_found(tmp_path: Path) -> None:
    run_ranks(1, _save_many, tmp_path, ["same"], {})
    (tmp_path / "same").rename(tmp_path / ".same.0123abcd.old")
    assert "head.weight" in get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    remove_stale(tmp_path)
    assert (tmp_path / ".same.0123abcd.old").exists()


def test_what_dead_saves_left_is_removed_and_other_folders_are_not(tmp_path: Path) -> None:
    for name in (".a.01234567.tmp", ".a.01234567.trash", ".git", ".a.tmp", "b.01234567.tmp"):
        (tmp_path / name).mkdir()
    remove_stale(tmp_path)
    assert _names(tmp_path) == [".a.tmp", ".git", "b.01234567.tmp"]


def test_asynchronous_saves_write_the_same_bytes(tmp_path: Path) -> None:
    tags = ["a", "b", "c"]
    run_ranks(2, _save_many, tmp_path / "sync", tags, {})
    run_ranks(2, _save_many, tmp_path / "async", tags, ASYNC)
    for tag in tags:
        for path in sorted((tmp_path / "sync" / tag).glob("shard-*")):
            assert path.read_bytes() == (tmp_path / "async" / tag / path.name).read_bytes()


def _save_and_go_elsewhere(rank: int, world_size: int, folder: Path, checkpoint: dict[str, Any]) -> None:
    home = Path.cwd()
    try:
        os.chdir(folder)
        with engine_of(torch.nn.Linear(4, 4), config_of(1, world_size, checkpoint=checkpoint)) as engine:
            engine.save_checkpoint("here", tag="t")
            os.chdir("/")
            engine.wait_for_checkpoint()
    finally:
        os.chdir(home)


@pytest.mark.parametrize("checkpoint", [{}, ASYNC])
def test_a_relative_folder_is_the_one_of_the_call_wherever_the_script_goes(tmp_path: Path, checkpoint: Any) -> None:
    run_ranks(2, _save_and_go_elsewhere, tmp_path, checkpoint)
    assert (tmp_path / "here" / "t").is_dir()
    assert (tmp_path / "here" / "latest").read_text().strip() == "t"


def _train_while_saving(rank: int, world_size: int, folder: Path, staging_bytes: int | None) -> tuple[int, bool]:
    """Overwrite everything while a slow disk still writes; (staging bytes held, whether the thread was still writing)."""
    model = torch.nn.Linear(2048, 2048)
    checkpoint = {"async_save": True, "staging_bytes": staging_bytes}
    gate = threading.Event()
    real = writer._write_all

    def slow(*args: Any) -> None:
        gate.wait(20 if staging_bytes is None else 0.05)
        real(*args)

    with engine_of(model, config_of(1, world_size, checkpoint=checkpoint)) as engine:
        writer._write_all = slow
        try:
            engine.save_checkpoint(str(folder), tag="t", client_state={"weight": model.weight.detach()})
            was_writing = (folder / "t").exists() is False
            with torch.no_grad():
                for master in engine._built.masters:
                    master.tensor.fill_(7.0)
            gate.set()
            engine.wait_for_checkpoint()
        finally:
            gate.set()
            writer._write_all = real
        return engine._checkpoints._staging.nbytes, was_writing


@pytest.mark.parametrize("staging_bytes", [None, 2 * BLOCK])
def test_training_goes_on_while_files_are_written_and_does_not_reach_them(
    tmp_path: Path, staging_bytes: int | None
) -> None:
    results = run_ranks(2, _train_while_saving, tmp_path, staging_bytes)
    assert all(was_writing for _, was_writing in results)
    if staging_bytes is not None:
        assert all(nbytes <= 12 * BLOCK for nbytes, _ in results)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    saved = torch.load(tmp_path / "t" / "mp_rank_00_model_states.pt", weights_only=True)["weight"]
    assert torch.equal(state["weight"], saved)
    assert not bool((state["weight"] == 7).any())


def test_the_name_of_a_large_checkpoint_is_free_at_once_and_its_space_soon(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    with open(tmp_path / "large" / "shard", "wb") as file:
        file.truncate(files.MUCH)
    files.remove_tree(tmp_path / "large")
    assert not (tmp_path / "large").exists()
    files.finish_removals()
    assert _names(tmp_path) == []


def _interrupt(rank: int, world_size: int, folder: Path) -> tuple[list[str], int]:
    """Ctrl-C while weights are copied; what is left, and how many more files are open than before."""
    real = writer.FileWriter.fill

    def interrupted(*args: Any) -> None:
        dist.barrier()  # Ctrl-C reaches all ranks of a node
        raise KeyboardInterrupt

    with engine_of(build("mlp"), config_of(2, world_size)) as engine:
        engine.save_checkpoint(str(folder), tag="first")
        num_open = len(os.listdir("/proc/self/fd"))
        writer.FileWriter.fill = interrupted  # type: ignore[method-assign]
        try:
            with pytest.raises(KeyboardInterrupt):
                engine.save_checkpoint(str(folder), tag="second")
        finally:
            writer.FileWriter.fill = real  # type: ignore[method-assign]
        dist.barrier()
        left = _names(folder)
        num_more = len(os.listdir("/proc/self/fd")) - num_open
        engine.save_checkpoint(str(folder), tag="third")
    return left, num_more


def test_ctrl_c_in_a_save_leaves_nothing_behind(tmp_path: Path) -> None:
    for left, num_more in run_ranks(2, _interrupt, tmp_path):
        assert left == ["first", "latest", "zero_to_fp32.py"]
        assert num_more == 0
    assert latest_tag(tmp_path) == "third"


def _end_while_saving(rank: int, world_size: int, folder: Path) -> None:
    """What a script's last line does, `destroy_process_group()`, to the group that the save in flight uses."""
    gate = threading.Event()
    real = writer._write_all

    def slow(*args: Any) -> None:
        gate.wait(20)
        real(*args)

    with engine_of(build("mlp"), config_of(2, world_size, **ASYNC)) as engine:
        writer._write_all = slow
        try:
            engine.save_checkpoint(str(folder), tag="last")
            dist.destroy_process_group(engine.mesh._groups.pop((("dp_shard",), "checkpoint")))
            gate.set()
            engine.wait_for_checkpoint()
        finally:
            gate.set()
            writer._write_all = real


def test_a_save_in_flight_outlives_the_process_group(tmp_path: Path) -> None:
    run_ranks(2, _end_while_saving, tmp_path)
    assert latest_tag(tmp_path) == "last"
    assert get_fp32_state_dict_from_zero_checkpoint(tmp_path)


@pytest.mark.quick("async")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kill_9_leaves_the_previous_or_the_new_checkpoint(mode: str) -> None:
    outcome = soak(mode, 4, seed=3, num_steps=10, span_s=0.3)
    assert sum(outcome.values()) == 4
