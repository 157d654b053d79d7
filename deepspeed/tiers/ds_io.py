"""The command `ds_io`: how fast a folder is written or read, for one or several block sizes, queue depths and threads.

Flags are those of the original's, which measures one configuration; here the three that matter take several values, every
combination of which is a line. `--json` also writes them to a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.io_trial import Trial, Workspace, check_direct, errors_as_exit, has_direct_io, parse_nbytes
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    options = _parser().parse_args(args)
    with errors_as_exit("ds_io"):
        workspaces = _workspaces(options)
        rows = []
        print(f"{'':6}{'block':>10}{'depth':>7}{'threads':>9}{'median GB/s':>13}{'best':>8}{'worst':>8}", flush=True)
        for block, depth, threads in itertools.product(options.block_size, options.queue_depth, options.io_parallel):
            aio = AioConfig(
                block_size=block,
                queue_depth=depth,
                intra_op_parallelism=threads,
                single_submit=options.single_submit,
                overlap_events=not options.sequential_requests,
                use_gds=options.use_gds,
            )
            row = _measure(options, workspaces, aio)
            rows.append(row)
            speeds = f"{row['median_gb_s']:13.2f}{row['best_gb_s']:8.2f}{row['worst_gb_s']:8.2f}"
            print(f"{row['operation']:6}{block:10}{depth:7}{threads:9}{speeds}", flush=True)
        for folder in sorted({workspace.folder for workspace in workspaces}):
            if not has_direct_io(folder):
                print(f"{folder} has no direct I/O: these are speeds of the page cache.")
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _measure(options: argparse.Namespace, workspaces: Sequence[Workspace], aio: AioConfig) -> dict[str, Any]:
    trial = Trial(
        workspaces=tuple(workspaces),
        nbytes=options.io_size,
        is_read=options.read,
        aio=aio,
        engine=options.engine,
        num_loops=options.loops,
        num_warmups=options.warmup_loops,
        is_validated=options.validate,
        pins_by_accelerator=options.use_accelerator_pin_memory,
        saves_legacy=options.torch_legacy_save,
        new_files=options.different_file_each_iteration,
    )
    seconds = trial.measure()[0 if options.include_warmup_time else options.warmup_loops :]
    speeds = [trial.gb_s(each) for each in seconds]
    return {
        "operation": "read" if options.read else "write",
        "engine": options.engine,
        "folders": [str(workspace.folder) for workspace in workspaces],
        "io_size": options.io_size,
        "aio": aio.model_dump(),
        "median_gb_s": statistics.median(speeds),
        "best_gb_s": max(speeds),
        "worst_gb_s": min(speeds),
    }


def _workspaces(options: argparse.Namespace) -> list[Workspace]:
    """One per worker. Raises DeepSpeedError for flags that do not go together, or not here."""
    if options.engine == "torch_fastio":
        raise NotAvailableError("--engine torch_fastio is not available yet.\n  Use aio_handle, aio_basic or torch_io.")
    if bool(options.folder) == bool(options.folder_to_device_mapping):
        raise DeepSpeedError("give one of --folder and --folder_to_device_mapping.")
    if options.use_gds and options.engine != "aio_handle":
        raise DeepSpeedError(
            f"--use_gds --engine {options.engine}: only aio_handle can do this.\n  Leave one of them out."
        )
    if options.use_gds:
        folders = (
            [options.folder] if options.folder else [p.rpartition(":")[0] for p in options.folder_to_device_mapping]
        )
        for folder in filter(os.path.isdir, folders):
            check_direct("--use_gds", Path(folder))
    device = get_accelerator().device_name() if options.gpu or options.use_gds else "cpu"
    if options.gpu and device == "cpu":
        raise DeepSpeedError("--gpu: this machine has no GPU.\n  Leave the flag out to measure transfers to memory.")
    workspaces = [Workspace(folder=Path(options.folder), device=device)] if options.folder else []
    for pair in options.folder_to_device_mapping:
        folder, _, index = pair.rpartition(":")
        if not folder or not index.isdecimal():
            raise DeepSpeedError(f"--folder_to_device_mapping {pair}: write FOLDER:DEVICE, such as /mnt/nvme0:0.")
        workspaces.append(Workspace(folder=Path(folder), device=f"{device}:{index}" if device != "cpu" else device))
    return workspaces * options.multi_process


def _parser() -> argparse.ArgumentParser:
    def nbytes(text: str) -> int:
        try:
            return parse_nbytes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def positive(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0.")
        return int(text)

    parser = argparse.ArgumentParser(prog="ds_io", description="Measure how fast a folder is written, or read.")
    flag = parser.add_argument
    flag("--folder", help="where; on the disk to measure")
    flag("--folder_to_device_mapping", nargs="+", default=[], metavar="FOLDER:DEVICE", help="one worker for each")
    flag("--io_size", type=nbytes, required=True, help="bytes per worker; K, M and G are powers of 1024")
    flag("--read", action="store_true", help="read (default: write)")
    flag("--multi_process", type=positive, default=1, help="workers per folder")
    flag("--block_size", type=nbytes, nargs="+", default=[1 << 20], help="bytes per request (1M); several to compare")
    flag("--queue_depth", type=positive, nargs="+", default=[32], help="requests in flight (32); several to compare")
    flag("--io_parallel", type=positive, nargs="+", default=[1], help="threads (1); several to compare")
    flag("--single_submit", action="store_true", help="submit requests one by one")
    flag("--sequential_requests", action="store_true", help="submit the next requests when all of the last are done")
    flag("--loops", type=positive, default=3, help="timed transfers of the whole size (3)")
    flag("--warmup_loops", type=int, default=1, help="transfers before those (1)")
    flag("--include_warmup_time", action="store_true", help="count those too")
    flag("--engine", choices=("aio_handle", "aio_basic", "torch_io", "torch_fastio"), default="aio_handle")
    flag("--fast_io_size", type=nbytes, default=64 << 20, help="the buffer of torch_fastio (64M)")
    flag("--torch_legacy_save", action="store_true", help="torch_io: torch.save's older format")
    flag("--validate", action="store_true", help="compare what is read with what was written")
    flag("--gpu", action="store_true", help="move tensors on the accelerator")
    flag("--use_gds", action="store_true", help="the same without passing through the CPU (GPUDirect Storage)")
    flag("--slow_bounce_buffer", action="store_true", help="no effect: the CPU's buffer is page-aligned memory")
    flag("--use_accelerator_pin_memory", action="store_true", help="memory pinned by the accelerator's library")
    flag("--different_file_each_iteration", action="store_true", help="a new file for each loop")
    flag("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser
