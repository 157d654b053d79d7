"""`aio.use_gds`: bytes between files and a device, by a library that has a fake here, are the bytes that went through memory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from deepspeed.config.storage import AioConfig
from deepspeed.tiers import direct, ds_io, ds_nvme_tune
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.tiers.request import CHECKED
from deepspeed.tiers.swap_folder import SwapFolder
from deepspeed.utils.errors import TierError
from tests.device import cufile, sim
from tests.device.adversity import differences
from tests.device.cases import config_of, tier_section
from tests.device.test_training import IS_WHOLE
from tests.engine.runs import Run, train
from tests.harness import run_ranks

SIZES = (1, 4095, CHECKED, 3 * CHECKED + 17)


def store_in(folder: Path, num_files: int) -> NvmeStore:
    """A store that asks for the library; stripes of CHECKED bytes."""
    return NvmeStore(
        SwapFolder([folder / f"{num_files}-{i}" for i in range(num_files)], 0), AioConfig(block_size=1, use_gds=True)
    )


def move(rank: int, world_size: int, seed: int) -> None:
    sim.reset(seed)
    with tempfile.TemporaryDirectory() as folder, cufile.installed() as library:
        for num_files in (1, 3):
            store = store_in(Path(folder), num_files)
            for nbytes in SIZES:
                both_ways(store, nbytes)
            store.close()
        assert library.num_bytes > 0
    sim.check()
    sim.reset()


def both_ways(store: NvmeStore, nbytes: int) -> None:
    """What a device puts is got on the CPU, and the other way round, whole storages and parts of them."""
    here = torch.randint(0, 256, (nbytes + 5,), dtype=torch.uint8)
    there = here.to(sim.NAME)
    for k, offset in enumerate((0, 5)):
        key, part, device_part = f"{nbytes} {k}", here[offset : offset + nbytes], there[offset : offset + nbytes]
        store.reserve(key, nbytes)
        put = store.start_put(key, device_part)
        there.add_(0)  # work on the device meanwhile
        put.wait()
        into = torch.zeros(nbytes, dtype=torch.uint8)
        store.start_get(key, into).wait()
        assert torch.equal(into, part)
        store.start_put(key, part.flip(0).contiguous()).wait()
        whole = torch.zeros(nbytes + k, dtype=torch.uint8, device=sim.NAME)
        store.start_get(key, whole[k:]).wait()
        assert torch.equal(whole[k:].cpu(), part.flip(0))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_device_and_the_cpu_read_each_others_bytes(seed: int) -> None:
    run_ranks(1, move, seed, device=sim.NAME)


def trained(rank: int, world_size: int, has_library: bool, use_gds: bool, seed: int | None) -> tuple[Run, int]:
    sim.reset(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(3, zero=tier_section("nvme", "nvme", Path(folder)), aio={"use_gds": use_gds})
        with cufile.installed() if has_library else contextlib.nullcontext(cufile.GdsFile) as library:
            run = train(rank, world_size, "gpt_tied", config, num_steps=3)
    sim.check()
    sim.reset()
    return run, library.num_bytes if has_library else 0


def test_training_from_disk_has_the_same_bits_whoever_moves_the_bytes() -> None:
    expected, _ = run_ranks(2, trained, False, False, None, device=sim.NAME)[0]
    for has_library, seed in ((True, 0), (True, 3), (False, None)) if IS_WHOLE else ((True, 0),):
        run, num_bytes = run_ranks(2, trained, has_library, True, seed, device=sim.NAME)[0]
        assert differences(run, expected) == []
        assert (num_bytes > 0) is has_library


def _save_at_once(
    self: direct.DirectFiles, index: int, offset: int, memory: torch.Tensor, event: object, is_write: bool
) -> None:
    self._opened[index].save_storage(memory.untyped_storage(), offset)


def too_early(rank: int, world_size: int) -> bool:
    sim.reset(0)
    with tempfile.TemporaryDirectory() as folder, cufile.installed():
        store = store_in(Path(folder), 1)
        here, there = (
            torch.arange(64, dtype=torch.uint8).pin_memory(),
            torch.zeros(64, dtype=torch.uint8, device=sim.NAME),
        )
        there.copy_(here, non_blocking=True)
        with mock.patch.object(direct.DirectFiles, "_move", _save_at_once):
            store.start_put("a", there).wait()
        into = torch.zeros_like(here)
        store.start_get("a", into).wait()
        store.close()
    sim.reset()
    return torch.equal(into, here)


def test_bytes_that_leave_before_they_are_there_are_noticed() -> None:
    assert run_ranks(1, too_early, device=sim.NAME) == [False]


def measured(rank: int, world_size: int) -> list[int]:
    moved = []
    with tempfile.TemporaryDirectory() as folder, cufile.installed() as library:
        common = ["--folder", folder, "--io_size", "1M", "--use_gds", "--validate", "--loops", "1"]
        for flags in (["--read"], ["--io_parallel", "3"]):
            ds_io.main([*common, *flags])
            moved.append(library.num_bytes)
        logs, sweep = Path(folder) / "logs", Path(folder) / "sweep.json"
        sweep.write_text('{"block_size": "1M", "queue_depth": 4, "io_parallel": [1, 2]}')
        tune = ["--nvme_dir", folder, "--gds", "--io_size", "64K", "--log_dir", str(logs), "--sweep_config", str(sweep)]
        ds_nvme_tune.main(tune)
        assert json.loads((logs / "aio.json").read_text())["aio"]["use_gds"] is True
        moved.append(library.num_bytes)
        with mock.patch.object(library, "load_storage", side_effect=OSError(5, "gone")):
            with pytest.raises(SystemExit, match="GPUDirect Storage failed at byte 0: Input/output error"):
                ds_io.main([*common, "--read"])
        with pytest.raises(SystemExit, match="only aio_handle can do this"):
            ds_io.main([*common, "--engine", "torch_io"])
        assert sorted(os.listdir(folder)) == ["logs", "sweep.json"]
    return moved


def test_the_commands_measure_what_the_library_moves() -> None:
    (moved,) = run_ranks(1, measured, device=sim.NAME)
    assert moved[0] == 3 << 20  # laid out, a warm-up and a loop
    assert moved[1] == moved[0] + (4 << 20)  # written and read back, twice
    assert moved[2] > moved[1]


def fails(rank: int, world_size: int) -> str:
    with tempfile.TemporaryDirectory() as folder, cufile.installed() as library:
        store = store_in(Path(folder), 1)
        tensor = torch.ones(64, dtype=torch.uint8, device=sim.NAME)
        with mock.patch.object(library, "save_storage", side_effect=RuntimeError("cuFileWrite failed: 5005")):
            with pytest.raises(TierError) as caught:
                store.start_put("a", tensor).wait()
        with pytest.raises(TierError, match="never put, or their put failed"):
            store.start_get("a", tensor)
        store.close()
    return str(caught.value)


def test_a_failed_write_names_the_file_and_cannot_be_read() -> None:
    assert "writing bytes 0 to 64 of 'a'" in run_ranks(1, fails, device=sim.NAME)[0]


def told(rank: int, world_size: int, has_library: bool) -> str:
    broken = mock.patch.object(cufile.GdsFile, "__init__", side_effect=RuntimeError("cuFileDriverOpen failed"))
    with contextlib.ExitStack() as undo:
        if has_library:
            undo.enter_context(cufile.installed())
            undo.enter_context(broken)
            undo.enter_context(mock.patch.object(cufile.GdsFile, "__del__", return_value=None))
        warn = undo.enter_context(mock.patch.object(direct, "warn_once"))
        store_in(Path(undo.enter_context(tempfile.TemporaryDirectory())), 1).close()
    return str(warn.call_args.args[0])


@pytest.mark.parametrize(
    ("has_library", "why"), [(False, "has no GPUDirect Storage for sim devices."), (True, "cuFileDriverOpen failed.")]
)
def test_without_the_library_one_line_says_so(has_library: bool, why: str) -> None:
    (line,) = run_ranks(1, told, has_library, device=sim.NAME)
    assert line.startswith("aio.use_gds = true has no effect, bytes pass through pinned memory: ")
    assert line.endswith(why)
