"""The store: what is got is what was put, or an error that names rank, key, file, offset and cure."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.config.storage import AioConfig
from deepspeed.tiers.nvme import NvmeStore, failures_as_one
from deepspeed.tiers.request import CHECKED, Fault, Means
from deepspeed.tiers.swap_folder import SwapFolder
from deepspeed.utils.errors import TierError
from tests import harness

AIO = AioConfig(block_size=CHECKED, queue_depth=4)
Make = Callable[..., NvmeStore]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Stores that are closed at the end: `make(means, *paths)`."""
    made: list[NvmeStore] = []

    def store(means: Means = Means.AUTO, *paths: Path, rank: int = 3) -> NvmeStore:
        made.append(NvmeStore(SwapFolder(paths or tmp_path, rank), AIO, means=means))
        return made[-1]

    yield store
    for each in made:
        each.close()


def noise(nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def get(store: NvmeStore, key: str, nbytes: int, offset: int = 0) -> Tensor:
    into = torch.zeros(nbytes, dtype=torch.uint8)
    store.start_get(key, into, offset).wait()
    return into


@pytest.mark.parametrize("num_paths", [1, 3])
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_gets_what_was_put(
    means: Means, make: Make, tmp_path: Path, in_memory: Path, num_paths: int, where: str
) -> None:
    store = make(means, *((tmp_path if where == "disk" else in_memory) / f"{i}" for i in range(num_paths)))
    data = {f"{n}": noise(n) for n in (0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 1_234_567)}
    pending = [store.start_put(key, tensor) for key, tensor in data.items()]
    for transfer in pending:
        transfer.wait()
        assert transfer.is_done
    assert all(torch.equal(get(store, key, tensor.nbytes), tensor) for key, tensor in data.items())
    assert len(store.folder.folders) == num_paths
    assert store.stats.bytes_written >= 1_445_000 <= store.stats.bytes_read
    assert store.stats.seconds_busy > 0 <= store.stats.seconds_waiting


def test_parts_written_in_any_order_read_as_from_memory(make: Make) -> None:
    store = make()

    @settings(max_examples=40, deadline=None)
    @given(changes=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 200_000)), max_size=6))
    def check(changes: list[tuple[int, int]]) -> None:
        model = noise(300_001)
        pending = [store.start_put("x", model.clone())]  # not waited for: later ones are ordered behind it
        for begin, nbytes in changes:
            part = noise(min(nbytes, 300_001 - begin))
            pending.append(store.start_put("x", part, begin))
            model[begin : begin + part.nbytes] = part
            assert torch.equal(get(store, "x", 300_001 - begin, begin), model[begin:])
        for transfer in pending:
            transfer.wait()
        assert torch.equal(get(store, "x", 300_001), model)

    check()


def test_tensors_of_any_dtype_shape_and_alignment(make: Make) -> None:
    store = make()
    for tensor in (torch.randn(3, 1000, 7), torch.randn(70_000).bfloat16()[1:], torch.arange(5), torch.tensor(2.5)):
        key = f"{tensor.dtype}{tensor.shape}"
        store.start_put(key, tensor).wait()
        into = torch.empty_like(tensor)
        store.start_get(key, into).wait()
        assert torch.equal(into, tensor)


def test_buffers_are_page_aligned(make: Make) -> None:
    store = make()
    for nbytes in (0, 1, 4097, 5_000_000):
        buffer = store.buffer(nbytes, pin_memory=True)
        assert buffer.shape == (nbytes,) and buffer.dtype == torch.uint8
        assert nbytes == 0 or buffer.data_ptr() % 4096 == 0


def test_transfers_of_one_key_that_overlap_keep_their_order(means: Means, make: Make) -> None:
    store = make(means)
    data = [noise(40 * CHECKED) for _ in range(6)]
    for each in data:
        store.start_put("x", each)
    assert torch.equal(get(store, "x", 40 * CHECKED), data[-1])
    into = torch.zeros_like(data[0])
    reading = store.start_get("x", into)
    store.start_put("x", data[0]).wait()
    reading.wait()
    assert torch.equal(into, data[-1])


def test_space_is_taken_when_it_is_reserved(make: Make, tmp_path: Path) -> None:
    store = make()
    store.reserve("x", 10 * 1024 * 1024)
    assert (store.folder.folders[0] / "data").stat().st_blocks * 512 >= 10 * 1024 * 1024
    store.reserve("x", 10 * 1024 * 1024)
    with pytest.raises(TierError, match=r"'x' has 10485760 bytes reserved, not 5"):
        store.reserve("x", 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.start_get("y", noise(5)), r"\[rank 3\] nothing is stored as 'y'"),
        (lambda s: s.start_get("x", noise(200_000)), r"get 'x': bytes 0 to 200000 are outside of its 150000"),
        (lambda s: s.start_put("x", noise(5), -1), r"put 'x': bytes -1 to 4 are outside"),
        (lambda s: s.start_put("x", torch.zeros(4, 4).t()), r"the tensor is on cpu, not contiguous"),
        (lambda s: s.start_put("x", torch.zeros(4, device="meta")), r"the tensor is on meta"),
        (lambda s: s.start_get("x", noise(150_000)), r"get 'x': bytes 0 to 150000 were never put"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(make: Make, call: Callable[[NvmeStore], object], words: str) -> None:
    store = make()
    store.reserve("x", 150_000)
    with pytest.raises(TierError, match=words):
        call(store)


def test_a_closed_store_says_so_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    store = make()
    store.start_put("x", noise(5_000_000))
    store.close()
    store.close()
    with pytest.raises(TierError, match="is closed"):
        store.start_get("x", noise(5))
    assert [path.name for path in (tmp_path / "deepspeed_swap").iterdir()] == ["lock"]


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("at", [0, 70_000, 149_999])
def test_one_changed_bit_is_an_error_that_names_the_place(means: Means, make: Make, at: int) -> None:
    store = make(means)
    store.start_put("first", noise(CHECKED)).wait()
    store.start_put("x", noise(150_000)).wait()
    path = store.folder.folders[0] / "data"
    with open(path, "r+b") as file:
        file.seek(CHECKED + at)
        byte = file.read(1)
        file.seek(CHECKED + at)
        file.write(bytes([byte[0] ^ 4]))
    block = CHECKED + at // CHECKED * CHECKED
    words = rf"\[rank 3\] reading bytes 0 to 150000 of 'x': {path}, offset {block}: the file was changed or damaged"
    transfer = store.start_get("x", noise(150_000))
    for _ in range(2):
        with pytest.raises(TierError, match=words):
            transfer.wait()
    assert get(store, "first", CHECKED) is not None


def test_blocks_that_changed_places_are_an_error(make: Make) -> None:
    store = make()
    store.start_put("x", noise(2 * CHECKED)).wait()
    path = store.folder.folders[0] / "data"
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(data[CHECKED:] + data[:CHECKED])
    with pytest.raises(TierError, match="changed or damaged"):
        get(store, "x", 2 * CHECKED)


def test_a_truncated_file_is_an_error(means: Means, make: Make) -> None:
    store = make(means)
    store.start_put("x", noise(10 * CHECKED)).wait()
    os.truncate(store.folder.folders[0] / "data", 5 * CHECKED + 100)
    with pytest.raises(
        TierError, match=rf"data, offset \d+: expected {CHECKED} bytes, got \d+.\n  The file was truncated"
    ):
        get(store, "x", 10 * CHECKED)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.EIO, r"offset \d+: Input/output error \(expected 65536 bytes, got 0\)"),
        (Fault.ENOSPC, r"offset \d+: No space left on device"),
        (Fault.END, r"offset \d+: expected 65536 bytes, got 32768"),
    ],
    ids=["eio", "enospc", "end"],
)
def test_a_put_that_failed_is_told_and_cannot_be_got(means: Means, make: Make, fault: Fault, words: str) -> None:
    store = make(means)
    old, new = noise(10 * CHECKED), noise(10 * CHECKED)
    store.start_put("x", old).wait()
    store._queue.inject(fault, 3)
    with pytest.raises(TierError, match=rf"\[rank 3\] writing bytes 0 to {10 * CHECKED} of 'x': .*{words}"):
        store.start_put("x", new).wait()
    with pytest.raises(TierError, match="their put failed"):
        store.start_get("x", torch.empty_like(new))
    with pytest.raises(TierError, match="changed or damaged"):
        store.start_put("x", noise(100), 5)  # would mix with what nobody knows
    store.start_put("x", new).wait()
    assert torch.equal(get(store, "x", 10 * CHECKED), new)


def test_a_get_that_failed_is_told(means: Means, make: Make) -> None:
    store = make(means)
    data = noise(10 * CHECKED)
    store.start_put("x", data).wait()
    store._queue.inject(Fault.EIO, 9)
    with pytest.raises(TierError, match="reading .* Input/output error"):
        get(store, "x", 10 * CHECKED)
    store._queue.inject(Fault.FLIP, 2)
    with pytest.raises(TierError, match="changed or damaged"):
        get(store, "x", 10 * CHECKED)
    store._queue.inject(Fault.SHORT, 2)
    assert torch.equal(get(store, "x", 10 * CHECKED), data)


def test_a_full_disk_is_known_before_anything_is_written(make: Make, small_disk: Callable[..., Path]) -> None:
    store = make(Means.AUTO, small_disk("1m"))
    store.start_put("small", noise(500_000)).wait()
    with pytest.raises(
        TierError, match=r"No space left on device while reserving 2000000 bytes for 'big': 2031616 more needed .* free"
    ):
        store.reserve("big", 2_000_000)
    store.reserve("fits", 300_000)


def test_one_full_disk_of_several_is_named(make: Make, small_disk: Callable[..., Path]) -> None:
    large, small = small_disk("8m"), small_disk("1m")
    with pytest.raises(TierError, match=rf"{small}/deepspeed_swap.*No space left.*while reserving 6000000 bytes"):
        make(Means.AUTO, large, small).reserve("x", 6_000_000)


def test_a_folder_that_vanished_is_an_error_at_the_next_transfer(make: Make, tmp_path: Path) -> None:
    store = make()
    store.start_put("x", noise(100_000)).wait()
    (tmp_path / "deepspeed_swap").rename(tmp_path / "elsewhere")
    with pytest.raises(TierError, match=r"rank3 was removed while this job was using it.\n  Keep the path mounted"):
        store.start_get("x", noise(100_000))


def test_a_disk_taken_away_is_an_error_at_the_next_transfer(make: Make, small_disk: Callable[..., Path]) -> None:
    import subprocess

    disk = small_disk("8m")
    store = make(Means.AUTO, disk)
    store.start_put("x", noise(100_000)).wait()
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)
    with pytest.raises(TierError, match="was removed while this job was using it"):
        store.start_put("x", noise(100_000))


def test_failures_of_ranks_become_one_message() -> None:
    assert failures_as_one({0: None, 1: None}) is None
    assert failures_as_one({2: "[rank 2] disk full", 0: None}) == "[rank 2] disk full"
    assert failures_as_one({2: "[rank 2] b", 1: "[rank 1] a", 3: "c"}) == "[rank 1] a\n  Also failed: ranks 2, 3."
    error = pickle.loads(pickle.dumps(TierError("[rank 1] a")))
    assert str(error) == "[rank 1] a"


def _every_rank_learns_of_a_full_disk(rank: int, world_size: int, disks: list[str]) -> str | None:
    import torch.distributed as dist

    store = NvmeStore(SwapFolder(disks[rank], rank, job_id="job"), AIO)
    message = None
    try:
        store.reserve("x", 2_000_000)
    except TierError as error:
        message = str(error)
    found: list[str | None] = [None] * world_size
    dist.all_gather_object(found, message)
    store.close()
    return failures_as_one(dict(enumerate(found)))


def test_every_rank_learns_of_one_rank_s_full_disk(small_disk: Callable[..., Path]) -> None:
    disks = [str(small_disk("4m")), str(small_disk("1m"))]
    texts = harness.run_ranks(2, _every_rank_learns_of_a_full_disk, disks)
    assert texts[0] == texts[1] and texts[0].startswith("[rank 1] ") and "No space left" in texts[0]
