"""`ds_report`: what works on this machine, found out by trying it; why something is off, and what that costs.

One table of trials: an operation's name, a function that runs it once and compares the result with plain PyTorch, and
what its absence costs. Adding an operation is adding a row. A trial returns how it ran; `Slower` says that it ran, but
not as it could; any other exception means that it does not work, and is the reason shown.

Invariant: nothing is shown as working that was not run here and now; a broken part never stops the report.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SMALL_SHM_NBYTES = 512 << 20
YES, SLOW, NO = "yes", "slower", "no"


class Slower(Exception):  # noqa: N818 - it is no error
    """The operation works, on a slower path; the text says why."""


class Row(NamedTuple):
    """One operation."""

    name: str
    trial: Callable[[], str]
    cost: str
    """Of its absence, or of its slower path."""


class Result(NamedTuple):
    """What a trial found."""

    name: str
    state: str
    how: str
    ms: float
    cost: str


def _close(result: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def _optimizer_trial(name: str, oracle: str, device: str, **arguments: Any) -> Callable[[], str]:
    """One step of one of our optimizers beside torch's."""

    def trial() -> str:
        import torch

        from deepspeed import optim
        from deepspeed.accelerator import get_accelerator
        from deepspeed.kernels import native

        where = "cpu" if device == "cpu" else get_accelerator().current_device_name()
        start = torch.linspace(-1, 1, 1000, device=where)
        params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
        made = [getattr(optim, name)(params[:1], lr=0.01, **arguments)]
        if oracle:
            made.append(getattr(torch.optim, oracle)(params[1:], lr=0.01, **arguments))
        for param in params:
            param.grad = torch.cos(start)
        for optimizer in made:
            optimizer.step()
        if oracle:
            _close(params[0].detach(), params[1].detach())
        elif not bool((params[0] != start).any()):
            raise RuntimeError("the step changed nothing")
        if device == "cpu" and native.library() is None:
            raise Slower(f"on torch's kernels: {(native.why_missing() or '').splitlines()[0]}")
        return f"compiled loops, {native.isas()[0]}" if device == "cpu" else f"on {where}"

    return trial


def _async_io() -> str:
    import torch

    from deepspeed.kernels import native
    from deepspeed.tiers.aio import aio_handle

    handle = aio_handle()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "block")
        written = torch.arange(1 << 18, dtype=torch.float32)
        read = torch.empty_like(written)
        handle.sync_pwrite(written, path)
        handle.sync_pread(read, path)
        if not torch.equal(read, written):
            raise RuntimeError("what was read is not what was written")
    if native.library() is None:
        raise Slower("by Python threads: the compiled library is missing")
    return f"1 MB written and read back in {tempfile.gettempdir()}"


def _gds() -> str:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils.errors import NotAvailableError

    accelerator = get_accelerator()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block"
        path.write_bytes(bytes(1 << 12))
        if accelerator.direct_file(str(path), os.O_RDWR) is None:
            raise NotAvailableError(f"torch has no GPUDirect Storage for {accelerator.name} devices")
    return "a file was opened through torch.cuda.gds"


def _gloo() -> str:
    import torch
    import torch.distributed as dist

    group: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=10))
    tensor = torch.ones(4)
    group.allreduce([tensor]).wait()
    _close(tensor, torch.ones(4))
    return "an all-reduce of one rank"


def _device_backend() -> str:
    import torch
    import torch.distributed as dist

    from deepspeed.accelerator import get_accelerator

    name, device = get_accelerator().communication_backend_name(), get_accelerator().current_device_name()
    if not dist.is_backend_available(name):
        raise RuntimeError(f"torch was built without {name}")
    tensor = torch.ones(4, device=device)
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(tensor)
    finally:
        if alone:
            dist.destroy_process_group()
    return f"{name}, an all-reduce on {device}"


def _bf16() -> str:
    import torch

    from deepspeed.accelerator import get_accelerator

    where = get_accelerator().current_device_name()
    a = torch.randn(64, 64, device=where)
    _ = (a.bfloat16() @ a.bfloat16()).float()
    if where == "cpu" and not any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        raise Slower("this CPU has no bf16 instructions: products are computed in fp32")
    return f"a product on {where}"


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}


def _triton() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA or ROCm device")
    import triton

    return str(triton.__version__)


ROWS: Sequence[Row] = (
    Row(
        "cpu_adam",
        _optimizer_trial("DeepSpeedCPUAdam", "AdamW", "cpu", weight_decay=0.1),
        "offloaded steps take longer",
    ),
    Row("cpu_adagrad", _optimizer_trial("DeepSpeedCPUAdagrad", "Adagrad", "cpu"), "offloaded steps take longer"),
    Row("cpu_lion", _optimizer_trial("DeepSpeedCPULion", "", "cpu"), "offloaded steps take longer"),
    Row("fused_adam", _optimizer_trial("FusedAdam", "AdamW", "device", weight_decay=0.1), "use torch.optim.AdamW"),
    Row("fused_lamb", _optimizer_trial("FusedLamb", "", "device"), "no LAMB"),
    Row("fused_lion", _optimizer_trial("FusedLion", "", "device"), "no Lion"),
    Row("async_io", _async_io, "offload to NVMe waits for the disk more often"),
    Row("gds", _gds, "reads for a GPU go through a buffer on the CPU"),
    Row("gloo", _gloo, "no training on CPUs, no barriers on the host"),
    Row("collectives", _device_backend, "no training on several devices"),
    Row("bf16", _bf16, "bf16 training is slower than fp32 there"),
    Row("triton", _triton, "no GPU kernels: the torch paths run"),
)


def attempt(row: Row) -> Result:
    """Run a trial."""
    start_s = time.perf_counter()
    try:
        state, how = YES, row.trial()
    except Slower as reason:
        state, how = SLOW, str(reason)
    except Exception as error:
        state, how = NO, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ms = (time.perf_counter() - start_s) * 1e3
    return Result(row.name, state, how, ms, "" if state == YES else row.cost)


def operator_report() -> list[str]:
    """The table of operations, each run once."""
    lines = ["operations, each run once on this machine", f"{'op':<14}{'works':<9}{'ms':>8}  how, or why not"]
    for result in map(attempt, ROWS):
        cost = f"  -> {result.cost}" if result.cost else ""
        lines.append(f"{result.name:<14}{result.state:<9}{result.ms:>8.1f}  {result.how}{cost}")
    return lines


def launcher_report() -> list[str]:
    """Which launchers for several nodes are installed."""
    from deepspeed.launcher.starters import STARTERS

    lines = ["", "launchers for several nodes"]
    for name, starter in STARTERS.items():
        try:
            found = starter.detect()
        except Exception as error:
            found = f"broken: {error}"
        lines.append(f"{name:<14}{found or 'not installed'}")
    return lines


def general_report(hide_warnings: bool = False) -> list[str]:
    """Versions, paths, devices, shared memory."""
    import torch

    from deepspeed.accelerator import get_accelerator

    accelerator, package = get_accelerator(), sys.modules["deepspeed"]
    facts = {
        "torch install path": list(torch.__path__),
        "torch version": torch.__version__,
        "deepspeed install path": list(package.__path__),
        "deepspeed info": f"{package.__version__}, {package.__git_hash__}, {package.__git_branch__}",
        "torch cuda version": torch.version.cuda,
        "torch hip version": torch.version.hip,
        "nvcc": shutil.which("nvcc") or "not needed",
        "ninja": "not needed: nothing is compiled at run time",
        "python": sys.version.split()[0],
        "accelerator": f"{accelerator.device_name()}, {accelerator.device_count()} device(s)",
        "cpu cores": os.cpu_count(),
    }
    shm = _shm_nbytes()
    if shm is not None:
        facts["shared memory (/dev/shm) size"] = f"{shm / 2**30:.2f} GB"
    lines = ["", "general"] + [f"{name} {'.' * max(1, 32 - len(name))} {value}" for name, value in facts.items()]
    if shm is not None and shm < SMALL_SHM_NBYTES and not hide_warnings:
        lines.append(
            "[WARNING] /dev/shm is smaller than 512 MiB: ranks may die with SIGBUS; see --shm-size of docker run"
        )
    return lines


def _shm_nbytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Print the report."""
    lines = [] if hide_operator_status else [*operator_report(), *launcher_report()]
    print("\n".join([*lines, *general_report(hide_errors_and_warnings)]))


def cli_main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code, always 0."""
    parser = argparse.ArgumentParser(
        prog="ds_report", description="What works on this machine, found out by trying it."
    )
    parser.add_argument("--hide_operator_status", action="store_true", help="leave out the table of operations")
    parser.add_argument("--hide_errors_and_warnings", action="store_true", help="leave out warnings")
    args = parser.parse_args(arguments)
    main(args.hide_operator_status, args.hide_errors_and_warnings)
    return 0


if __name__ == "__main__":
    sys.exit(cli_main())
