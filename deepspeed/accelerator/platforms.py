"""What is known about each kind of accelerator without touching one: a table.

Read by `get_accelerator` to make the accelerator object, and by the launcher, which must start fast and so imports
neither torch nor a vendor's plugin. Invariant: this module imports neither.

Order in the table is the order of automatic choice. The names are those of DS_ACCELERATOR. A device that is not in the
table comes in by one door, torch's PrivateUse1: a package renames it, gives torch a module `torch.<name>` with the functions of
torch.cuda and torch.distributed a backend for the device; then <name> is a platform here too (`custom`), chosen after the table's
and before the CPU.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed.utils.errors import DeepSpeedError

OVERRIDE = "DS_ACCELERATOR"


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """One row: a kind of accelerator as torch, the communication library and the launcher name it."""

    name: str
    """As DS_ACCELERATOR spells it."""
    device_type: str
    """torch's name of the device type, and of the module `torch.<device_type>`."""
    backend: str
    """torch.distributed's backend."""
    plugin: str | None = None
    """The package that adds the device type to torch; None where torch has it."""
    visible_devices: str | None = "CUDA_VISIBLE_DEVICES"
    """The variable that limits which devices a process sees; None where there is none to set."""
    export_prefixes: tuple[str, ...] = ()
    """Variables with these prefixes go along to remote nodes."""
    has_triton: bool = False
    """Whether there is a Triton that compiles for it."""
    has_float64: bool = True
    """Whether it multiplies in float64; single cards may still say no."""
    has_host_registration: bool = False
    """Whether memory that is there already can be page-locked in place, by CUDA's runtime."""
    orders_by_itself: bool = False
    """Whether results can be used across streams, and memory given up, without telling streams of each other."""
    compile_backend: str = "inductor"
    """What `engine.compile` uses unless told otherwise."""


_ROWS = (
    Platform(name="xpu", device_type="xpu", backend="xccl", visible_devices="ZE_AFFINITY_MASK", has_triton=True),
    Platform(
        name="npu",
        device_type="npu",
        backend="hccl",
        plugin="torch_npu",
        visible_devices="ASCEND_RT_VISIBLE_DEVICES",
        export_prefixes=("ASCEND", "HCCL", "LD_LIBRARY", "PATH"),
        has_triton=True,
        has_float64=False,
    ),
    Platform(
        name="sdaa", device_type="sdaa", backend="tccl", plugin="torch_sdaa", visible_devices="SDAA_VISIBLE_DEVICES"
    ),
    Platform(name="mps", device_type="mps", backend="gloo", has_float64=False),
    Platform(
        name="hpu",
        device_type="hpu",
        backend="hccl",
        plugin="habana_frameworks.torch.core",
        visible_devices=None,
        has_float64=False,
        orders_by_itself=True,
        compile_backend="hpu_backend",
    ),
    Platform(
        name="mlu",
        device_type="mlu",
        backend="cncl",
        plugin="torch_mlu",
        visible_devices="MLU_VISIBLE_DEVICES",
        has_triton=True,
    ),
    Platform(
        name="supa",
        device_type="supa",
        backend="sccl",
        plugin="torch_br",
        visible_devices="SUPA_VISIBLE_DEVICES",
        export_prefixes=("BCCL", "BIREN", "SUPA", "LD_LIBRARY", "PATH"),
    ),
    Platform(
        name="klxpu", device_type="cuda", backend="nccl", plugin="torch_xmlir", visible_devices="XPU_VISIBLE_DEVICES"
    ),
    Platform(
        name="cuda",
        device_type="cuda",
        backend="nccl",
        export_prefixes=("NCCL",),
        has_triton=True,
        has_host_registration=True,
    ),
    Platform(name="cpu", device_type="cpu", backend="gloo"),
)
PLATFORMS: Mapping[str, Platform] = {row.name: row for row in _ROWS}

_DEVICE_NODES: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ("davinci*", "habanalabs*", "cambricon_*")),
    ("cuda", ("nvidia[0-9]*", "kfd")),
    (None, ("dri/renderD*", "dxg", "accel*")),
)
"""What drivers leave in /dev, and the platform that means; without a name, torch has to be asked."""


UNNAMED = "privateuseone"
"""What torch calls PrivateUse1 as long as nobody uses it."""


def custom(name: str, backend: str = "") -> Platform:
    """The row of a device that a package brings to torch as PrivateUse1; `backend` as torch.distributed knows it."""
    return Platform(name=name, device_type=name, backend=backend, visible_devices=None)


def _brings_devices() -> bool:
    """Whether a package is installed that torch loads for its device (entry points of the group "torch.backends")."""
    return bool(importlib.metadata.entry_points(group="torch.backends"))


def _name_in_torch() -> str:
    """PrivateUse1's name where torch is imported already."""
    torch = sys.modules.get("torch")
    return UNNAMED if torch is None else str(torch._C._get_privateuse1_backend_name())


def override(environ: Mapping[str, str]) -> Platform | None:
    """The platform that DS_ACCELERATOR names; None where it is unset. Raises DeepSpeedError for an unknown name.

    Another name than the table's may be that of a device which a package brings; torch will know.
    """
    name = environ.get(OVERRIDE)
    if not name:
        return None
    if name in PLATFORMS:
        return PLATFORMS[name]
    if name == _name_in_torch() or _brings_devices():
        return custom(name)
    raise DeepSpeedError(
        f"{OVERRIDE}={name} is not a known accelerator.\n"
        f"  Use one of {', '.join(PLATFORMS)}, or unset it to have one found."
    )


def known_without_torch(environ: Mapping[str, str], dev: Path = Path("/dev")) -> Platform | None:
    """The platform as far as it can be told fast: from DS_ACCELERATOR or device nodes. None: torch has to be asked."""
    chosen = override(environ)
    if chosen is not None or sys.platform != "linux":
        return chosen
    for name, patterns in _DEVICE_NODES:
        if any(next(dev.glob(pattern), None) for pattern in patterns):
            return PLATFORMS[name] if name else None
    return None if _brings_devices() else PLATFORMS["cpu"]


def cpu_device_count(environ: Mapping[str, str], nodes: Path = Path("/sys/devices/system/node")) -> int:
    """How many ranks a CPU-only machine runs by default: LOCAL_SIZE, else NUMA nodes with cores, else 1."""
    local_size = environ.get("LOCAL_SIZE", "")
    if local_size.isdecimal() and int(local_size) > 0:
        return int(local_size)
    return sum(bool(cores.read_text().strip()) for cores in nodes.glob("node[0-9]*/cpulist")) or 1
