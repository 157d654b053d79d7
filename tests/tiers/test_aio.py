"""The aio_handle API, by every means: what is read is what was written, counts, errors by their words."""

from __future__ import annotations

import gc
import inspect
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.tiers.aio import aio_handle, aio_read, aio_write, deepspeed_memcpy
from deepspeed.tiers.request import Fault, Means
from deepspeed.utils.errors import NotAvailableError, TierError

SIZES = [0, 1, 4095, 4096, 4097, 65536, 3 * 1024 * 1024 + 5]
FAULTS = [
    (Fault.EIO, "expected 65536 bytes, got 0: Input/output error"),
    (Fault.ENOSPC, "expected 65536 bytes, got 0: No space left on device"),
    (Fault.END, "expected 65536 bytes, got 32768: the file ends there"),
]


def noise(nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def handle(means: Means, block_size: int = 65536, queue_depth: int = 4, **options: Any) -> aio_handle:
    return aio_handle(block_size, queue_depth, means=means, **options)


@pytest.mark.parametrize("nbytes", SIZES)
def test_reads_what_it_wrote_and_leaves_the_file_as_long_as_that(means: Means, tmp_path: Path, nbytes: int) -> None:
    data, back, path = noise(nbytes), noise(nbytes), tmp_path / "file"
    io = handle(means)
    assert io.sync_pwrite(data, path) == 1
    assert path.read_bytes() == data.numpy().tobytes()
    assert io.sync_pread(back, path) == 1
    assert torch.equal(back, data)


@pytest.mark.parametrize("offset", [1, 4095, 4096, 70000])
@pytest.mark.parametrize("skew", [0, 64])
def test_writes_at_an_offset_touch_no_other_byte(means: Means, tmp_path: Path, offset: int, skew: int) -> None:
    path, old = tmp_path / "file", noise(400_000)
    path.write_bytes(old.numpy().tobytes())
    io = handle(means)
    data = io.new_cpu_locked_tensor(200_001 + skew, old)[skew:]
    data.copy_(noise(200_001))
    io.sync_pwrite(data, path, offset)
    old[offset : offset + 200_001] = data
    assert path.read_bytes() == old.numpy().tobytes()
    back = torch.zeros_like(data)
    io.sync_pread(back, path, offset)
    assert torch.equal(back, data)


@pytest.mark.parametrize("overlap_events", [False, True])
@pytest.mark.parametrize("single_submit", [False, True])
@pytest.mark.parametrize("intra_op_parallelism", [1, 3])
def test_many_operations_in_flight_all_arrive_and_are_counted(
    means: Means, tmp_path: Path, overlap_events: bool, single_submit: bool, intra_op_parallelism: int
) -> None:
    io = handle(
        means,
        single_submit=single_submit,
        overlap_events=overlap_events,
        intra_op_parallelism=intra_op_parallelism,
    )
    data = [noise(300_000 + each) for each in range(12)]
    assert [io.async_pwrite(each, tmp_path / f"{i}") for i, each in enumerate(data)] == [0] * 12
    assert io.wait() == 12
    back = [torch.zeros_like(each) for each in data]
    for i, each in enumerate(back):
        io.async_pread(each, tmp_path / f"{i}")
    assert io.wait() == 12 and io.wait() == 0
    assert all(torch.equal(a, b) for a, b in zip(data, back, strict=True))


def test_threads_share_a_handle(means: Means, tmp_path: Path) -> None:
    io, wrong = handle(means), []

    def work(name: str) -> None:
        for _ in range(5):
            data = noise(150_001)
            io.sync_pwrite(data, tmp_path / name)
            back = torch.zeros_like(data)
            io.sync_pread(back, tmp_path / name)
            if not torch.equal(back, data):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(f"{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_system_that_refuses_direct_io_works_too(means: Means, small_disk: Callable[..., Path]) -> None:
    folder = small_disk("8m", kind="ramfs")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(folder / "file", os.O_CREAT | os.O_DIRECT)
    data, back = noise(1_000_001), torch.zeros(1_000_001, dtype=torch.uint8)
    io = handle(means)
    io.sync_pwrite(data, folder / "file")
    io.sync_pread(back, folder / "file")
    assert torch.equal(back, data) and (folder / "file").stat().st_size == 1_000_001


def test_direct_io_that_is_refused_after_all_goes_through_the_page_cache(means: Means, tmp_path: Path) -> None:
    data, back, io = noise(500_003), torch.zeros(500_003, dtype=torch.uint8), handle(means)
    for move, tensor in ((io.sync_pwrite, data), (io.sync_pread, back)):
        io._queue.inject(Fault.REFUSE, 3)
        move(tensor, tmp_path / "file")
    assert torch.equal(back, data)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_descriptors_are_taken_as_they_are_and_left_open(means: Means, tmp_path: Path, flags: int) -> None:
    data, back = noise(200_001), torch.zeros(200_001, dtype=torch.uint8)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | flags)
    io = handle(means)
    assert io.async_pwrite(data, fd, 4096) == 0 and io.wait() == 1
    assert io.async_pread(back, fd, 4096) == 0 and io.wait() == 1
    os.close(fd)
    assert torch.equal(back, data)


def test_other_dtypes_and_shapes(means: Means, tmp_path: Path) -> None:
    data, back = torch.randn(30, 70).bfloat16(), torch.zeros(30, 70).bfloat16()
    io = handle(means)
    io.write(data, tmp_path / "file", True)
    io.read(back, tmp_path / "file", True)
    assert torch.equal(back, data)


@pytest.mark.parametrize("faulty", ["write", "read"])
@pytest.mark.parametrize("skew", [0, 1])
def test_a_short_transfer_is_continued(means: Means, tmp_path: Path, faulty: str, skew: int) -> None:
    io = handle(means)
    data, back = noise(500_003), io.new_cpu_locked_tensor(500_003 + skew, noise(0))[skew:]
    io._queue.inject(Fault.SHORT if faulty == "write" else Fault.NONE, 3)
    io.sync_pwrite(data, tmp_path / "file")
    io._queue.inject(Fault.SHORT if faulty == "read" else Fault.NONE, 3)
    io.sync_pread(back, tmp_path / "file")
    assert torch.equal(back, data) and (tmp_path / "file").stat().st_size == 500_003


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=["eio", "enospc", "end"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_failing_piece_fails_the_operation_and_not_the_handle(
    means: Means, tmp_path: Path, fault: Fault, words: str, is_async: bool
) -> None:
    data, io = noise(10 * 65536), handle(means, queue_depth=1)
    io._queue.inject(fault, 2)
    with pytest.raises(TierError, match=rf"writing {tmp_path / 'file'} at offset \d+: {words}"):
        io.pwrite(data, tmp_path / "file", False, is_async)
        io.wait()
    assert io.sync_pwrite(data, tmp_path / "file") == 1 and io.wait() == 0


def test_what_cannot_be_read_says_file_offset_expected_and_got(tmp_path: Path) -> None:
    io, path = aio_handle(), tmp_path / "file"
    with pytest.raises(TierError, match=rf"\[rank 0\] reading {path}: No such file or directory"):
        io.sync_pread(noise(4096), path)
    path.write_bytes(b"x" * 5000)
    with pytest.raises(TierError, match=rf"reading {path} at offset 1000: expected 4096 bytes.*got 4000"):
        io.async_pread(noise(4096), path, 1000)
    with pytest.raises(TierError, match="expected 4096 bytes, the tensor's size, got 5000"):
        io.read(noise(4096), path, True)
    assert io.read(noise(4096), path, False) == 1
    with pytest.raises(TierError, match="not contiguous"):
        io.sync_pwrite(torch.zeros(4, 4)[:, 1:3], path)
    with pytest.raises(TierError, match="file_offset -1 is negative"):
        io.sync_pwrite(noise(4), path, -1)
    with pytest.raises(TierError, match=rf"writing {tmp_path}: Is a directory"):
        io.sync_pwrite(noise(4), tmp_path)
    with pytest.raises(TierError, match="descriptor 999: Bad file descriptor"):
        io.async_pread(noise(4), 999)


def test_validation_finds_what_was_read_wrong(means: Means, tmp_path: Path) -> None:
    io, path = handle(means), tmp_path / "file"
    io.write(noise(200_000), path, True)
    io._queue.inject(Fault.FLIP, 1)
    with pytest.raises(TierError, match=rf"validating {path} from offset 0: .* not those of the tensor"):
        io.read(noise(200_000), path, True)


def test_pinned_tensors_are_known_by_their_handle() -> None:
    io = aio_handle()
    pinned = io.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.float32))
    assert pinned.shape == (1000,) and pinned.dtype == torch.float32 and pinned.data_ptr() % io.get_alignment() == 0
    assert io.is_pinned(pinned) and io.is_pinned(pinned[10:]) and not io.is_pinned(torch.zeros(10))
    assert io.free_cpu_locked_tensor(pinned) and not io.free_cpu_locked_tensor(pinned) and not io.is_pinned(pinned)


def test_the_handle_s_contract() -> None:
    io = aio_handle()
    given = [io.get_block_size(), io.get_queue_depth(), io.get_single_submit(), io.get_overlap_events()]
    assert [*given, io.get_intra_op_parallelism()] == [1024 * 1024, 128, False, False, 1]
    names = "block_size queue_depth single_submit overlap_events intra_op_parallelism"
    assert list(inspect.signature(aio_handle).parameters)[:5] == names.split()
    assert aio_handle(1 << 20, 8, True, True, 2).get_intra_op_parallelism() == 2


def test_module_functions(tmp_path: Path) -> None:
    data, back = noise(100_000), torch.zeros(100_000, dtype=torch.uint8)
    assert aio_write(data, tmp_path / "file", 65536, 8, False, False, True) == 1
    assert aio_read(back, tmp_path / "file", 65536, 8, False, False, True) == 1
    assert torch.equal(back, data)
    assert deepspeed_memcpy(back, torch.ones_like(back)) == 0 and back.all()
    with pytest.raises(TierError, match="the destination has 100000 bytes, the source 1"):
        deepspeed_memcpy(back, torch.ones(1, dtype=torch.uint8))


def test_handles_end_their_threads(means: Means) -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        handle(means, intra_op_parallelism=2).sync_pwrite(noise(1), os.devnull)
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= before


def test_builders_load_without_compiling() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder, GDSBuilder

    assert AsyncIOBuilder().load().aio_handle is aio_handle and AsyncIOBuilder().is_compatible()
    assert not GDSBuilder().is_compatible()
    with pytest.raises(NotAvailableError, match="GPUDirect Storage needs CUDA"):
        GDSBuilder().load()
