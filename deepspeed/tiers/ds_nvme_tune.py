"""The command `ds_nvme_tune`: sweeps the `aio` section's keys on given folders and writes the best section as JSON.

Flags are those of the original's. A disk swings, so the first pass only chooses: the `FINALISTS` fastest of it run again, in
turns, and the median decides. Of those that read and write the same bytes soonest, within `NOISE`, the one with the fewest
threads and the least in flight is written to `<log_dir>/aio.json`, ready to be merged into a configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.io_trial import Trial, Workspace, check_direct, errors_as_exit, has_direct_io, parse_nbytes
from deepspeed.utils.errors import DeepSpeedError

SWEEP: Mapping[str, Sequence[Any]] = {
    "block_size": ["1M", "8M"],
    "queue_depth": [32, 128],
    "sequential_requests": [True, False],
    "single_submit": [False, True],
    "io_parallel": [1, 2, 4, 8],
}
FINALISTS, FINAL_ROUNDS, NOISE = 4, 5, 0.03


def main(args: Sequence[str] | None = None) -> None:
    """Sweep, report, write."""
    options = _parser().parse_args(args)
    with errors_as_exit("ds_nvme_tune"):
        workspaces = _workspaces(options)
        candidates = list(_candidates(options))
        directions = [name for name, skipped in (("read", options.no_read), ("write", options.no_write)) if not skipped]
        speeds: dict[tuple[str, int], list[float]] = {}

        def measure(direction: str, index: int, num_loops: int) -> None:
            found = _measure(options, workspaces, candidates[index], direction, num_loops)
            speeds.setdefault((direction, index), []).extend(found)
            if options.verbose:
                print(f"{direction:5} {max(found):6.2f} GB/s  {json.dumps(_section(candidates[index]))}", flush=True)

        def ranking(direction: str) -> list[int]:
            return sorted(range(len(candidates)), key=lambda i: -statistics.median(speeds[direction, i]))

        for index, direction in itertools.product(range(len(candidates)), directions):
            measure(direction, index, options.loops)
        finalists = sorted({index for direction in directions for index in ranking(direction)[:FINALISTS]})
        for direction, index in itertools.product(directions, finalists):
            speeds[direction, index] = []
        for _, index, direction in itertools.product(range(FINAL_ROUNDS), finalists, directions):
            measure(direction, index, 1)

        def gb_s(direction: str, index: int) -> float:
            return statistics.median(speeds[direction, index])

        for direction in directions:
            best = max(finalists, key=lambda i: gb_s(direction, i))
            print(
                f"Best for {direction} ({gb_s(direction, best):.2f} GB/s): {json.dumps({'aio': _section(candidates[best])})}"
            )

        def gb_s_of_both(index: int) -> float:
            return 1 / sum(1 / gb_s(direction, index) for direction in directions)

        enough = max(map(gb_s_of_both, finalists)) * (1 - NOISE)
        overall = min(
            (index for index in finalists if gb_s_of_both(index) >= enough), key=lambda index: _cost(candidates[index])
        )
        options.log_dir.mkdir(parents=True, exist_ok=True)
        chosen = options.log_dir / "aio.json"
        chosen.write_text(json.dumps({"aio": _section(candidates[overall])}, indent=2) + "\n")
        rows = [
            {"operation": direction, "median_gb_s": statistics.median(found), "aio": _section(candidates[index])}
            for (direction, index), found in speeds.items()
        ]
        (options.log_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
        both = " and ".join(f"{direction} {gb_s(direction, overall):.2f} GB/s" for direction in directions)
        print(f"Best for both ({both}), written to {chosen}:\n{chosen.read_text()}", end="")


def _measure(
    options: argparse.Namespace, workspaces: Sequence[Workspace], aio: AioConfig, direction: str, num_loops: int
) -> list[float]:
    if options.flush_page_cache:
        _flush_page_cache()
    trial = Trial(
        workspaces=tuple(workspaces),
        nbytes=options.io_size,
        is_read=direction == "read",
        aio=aio,
        num_loops=num_loops,
        num_warmups=0 if direction == "read" else 1,
    )
    return [trial.gb_s(seconds) for seconds in trial.measure()[trial.num_warmups :]]


def _cost(aio: AioConfig) -> tuple[int, int, int]:
    return aio.intra_op_parallelism, aio.queue_depth * aio.block_size, aio.block_size


def _section(aio: AioConfig) -> dict[str, Any]:
    return aio.model_dump(exclude=set() if aio.use_gds else {"use_gds"})


def _candidates(options: argparse.Namespace) -> Iterator[AioConfig]:
    """Every combination of the sweep. Raises DeepSpeedError for a sweep that is none."""
    sweep = dict(SWEEP)
    if options.sweep_config is not None:
        try:
            given = json.loads(options.sweep_config.read_text())
        except (OSError, ValueError) as error:
            raise DeepSpeedError(f"--sweep_config {options.sweep_config}: {error}") from error
        if not isinstance(given, dict) or not given.keys() <= SWEEP.keys():
            raise DeepSpeedError(f"--sweep_config {options.sweep_config}: an object with the keys {', '.join(SWEEP)}.")
        sweep |= {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    for block, depth, is_sequential, is_single, threads in itertools.product(*(sweep[key] for key in SWEEP)):
        try:
            yield AioConfig(
                block_size=parse_nbytes(str(block)),
                queue_depth=depth,
                overlap_events=not is_sequential,
                single_submit=is_single,
                intra_op_parallelism=threads,
                use_gds=options.gds,
            )
        except ValueError as error:
            raise DeepSpeedError(f"--sweep_config {options.sweep_config}: {error}") from error


def _workspaces(options: argparse.Namespace) -> list[Workspace]:
    if options.no_read and options.no_write:
        raise DeepSpeedError("--no_read and --no_write leave nothing to measure.")
    device = get_accelerator().device_name() if options.gpu or options.gds else "cpu"
    if options.gpu and device == "cpu":
        raise DeepSpeedError("--gpu: this machine has no GPU.\n  Leave the flag out to measure transfers to memory.")
    workspaces = []
    for folder in map(Path, options.nvme_dir):
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise DeepSpeedError(f"--nvme_dir {folder}: not a folder that can be written.")
        if options.gds:
            check_direct("--gds", folder)
        if not has_direct_io(folder):
            print(f"{folder} has no direct I/O: what follows are speeds of the page cache.")
        workspaces.append(Workspace(folder=folder, device=device))
    return workspaces


def _flush_page_cache() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as error:
        raise DeepSpeedError(
            f"--flush_page_cache: {error.strerror}.\n  Run as root, or leave it out: I/O is direct."
        ) from error


def _parser() -> argparse.ArgumentParser:
    def nbytes(text: str) -> int:
        try:
            return parse_nbytes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(
        prog="ds_nvme_tune", description="Find the fastest `aio` section for some folders."
    )
    flag = parser.add_argument
    flag("--nvme_dir", nargs="+", required=True, metavar="FOLDER", help="folders used at the same time, one per disk")
    flag("--sweep_config", type=Path, help=f"JSON: the values to try of {', '.join(SWEEP)}")
    flag("--no_read", action="store_true", help="do not measure reading")
    flag("--no_write", action="store_true", help="do not measure writing")
    flag("--io_size", type=nbytes, default=400 << 20, help="bytes per folder (400M)")
    flag("--gpu", action="store_true", help="move tensors on the accelerator")
    flag("--gds", action="store_true", help="the same without passing through the CPU (GPUDirect Storage)")
    flag("--flush_page_cache", action="store_true", help="before each measurement; needs root")
    flag(
        "--log_dir", type=Path, default=Path("_aio_bench_logs"), help="for aio.json and results.json (_aio_bench_logs)"
    )
    flag("--loops", type=int, default=1, help="of the first pass (1)")
    flag("--verbose", action="store_true", help="print every measurement")
    return parser
