"""What is known about each kind of accelerator without touching one: a table.

Read by `get_accelerator` to make the accelerator object, and by the launcher, which must start fast and so imports
neither torch nor a vendor's plugin. Invariant: this module imports neither.

Order in the table is the order of automatic choice. The names are those of DS_ACCELERATOR.
"""

from __future__ import annotations

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


_ROWS = (
    Platform(name="xpu", device_type="xpu", backend="xccl", visible_devices="ZE_AFFINITY_MASK"),
    Platform(
        name="npu",
        device_type="npu",
        backend="hccl",
        plugin="torch_npu",
        visible_devices="ASCEND_RT_VISIBLE_DEVICES",
        export_prefixes=("ASCEND", "HCCL", "LD_LIBRARY", "PATH"),
    ),
    Platform(
        name="sdaa", device_type="sdaa", backend="tccl", plugin="torch_sdaa", visible_devices="SDAA_VISIBLE_DEVICES"
    ),
    Platform(name="mps", device_type="mps", backend="gloo"),
    Platform(
        name="hpu", device_type="hpu", backend="hccl", plugin="habana_frameworks.torch.core", visible_devices=None
    ),
    Platform(name="mlu", device_type="mlu", backend="cncl", plugin="torch_mlu", visible_devices="MLU_VISIBLE_DEVICES"),
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
    Platform(name="cuda", device_type="cuda", backend="nccl", export_prefixes=("NCCL",)),
    Platform(name="cpu", device_type="cpu", backend="gloo"),
)
PLATFORMS: Mapping[str, Platform] = {row.name: row for row in _ROWS}

_DEVICE_NODES: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ("davinci*", "habanalabs*", "cambricon_*")),
    ("cuda", ("nvidia[0-9]*", "kfd")),
    (None, ("dri/renderD*", "dxg", "accel*")),
)
"""What drivers leave in /dev, and the platform that means; without a name, torch has to be asked."""


def override(environ: Mapping[str, str]) -> Platform | None:
    """The platform that DS_ACCELERATOR names; None where it is unset. Raises DeepSpeedError for an unknown name."""
    name = environ.get(OVERRIDE)
    if not name:
        return None
    if name not in PLATFORMS:
        raise DeepSpeedError(
            f"{OVERRIDE}={name} is not a known accelerator.\n"
            f"  Use one of {', '.join(PLATFORMS)}, or unset it to have one found."
        )
    return PLATFORMS[name]


def known_without_torch(environ: Mapping[str, str], dev: Path = Path("/dev")) -> Platform | None:
    """The platform as far as it can be told fast: from DS_ACCELERATOR or device nodes. None: torch has to be asked."""
    chosen = override(environ)
    if chosen is not None or sys.platform != "linux":
        return chosen
    for name, patterns in _DEVICE_NODES:
        if any(next(dev.glob(pattern), None) for pattern in patterns):
            return PLATFORMS[name] if name else None
    return PLATFORMS["cpu"]


def cpu_device_count(environ: Mapping[str, str], nodes: Path = Path("/sys/devices/system/node")) -> int:
    """How many ranks a CPU-only machine runs by default: LOCAL_SIZE, else NUMA nodes with cores, else 1."""
    local_size = environ.get("LOCAL_SIZE", "")
    if local_size.isdecimal() and int(local_size) > 0:
        return int(local_size)
    return sum(bool(cores.read_text().strip()) for cores in nodes.glob("node[0-9]*/cpulist")) or 1
