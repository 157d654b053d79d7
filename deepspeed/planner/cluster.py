"""A cluster as its owner describes it, in JSON: nodes, devices, links, disks, prices. Pure.

    {"nodes": 512, "devices_per_node": 8,
     "device": {"memory_gb": 80, "tflops": 400, "memory_gb_s": 2000},
     "links": {"within_gb_s": 300, "between_gb_s": 25, "latency_us": 10, "overlap": 0.8},
     "host": {"memory_gb": 1000, "link_gb_s": 25}, "disk": {"read_gb_s": 6, "write_gb_s": 3},
     "price_per_device_hour": 2.0}

Where ranks compute on CPUs: "processors" of a node that its devices take turns on, and of `device` "call_us", what a module's call takes
whatever it computes, forward and backward; of `links` "inside_us" and "wait", what a message costs amid computing, and by what share of it ranks
wait for each other; the other rates of a device are those while all of them compute.

tflops: of the dtype that is trained in, as a large matrix product reaches it. Links: bytes (1e9) per second that one device sends,
while all do. Only the number of devices and `device` must be given.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from deepspeed.planner.cost import OVERLAP
from deepspeed.profiling.rates import Rates
from deepspeed.utils.errors import DeepSpeedError

GB = 1e9
RATES = ("tflops", "memory_gb_s", "within_gb_s", "between_gb_s", "link_gb_s")
"""Keys that seconds are divided by. Disks may be missing, so theirs may be 0."""
SHARES = ("overlap", "wait")
COUNTS = ("nodes", "devices_per_node", "processors")
MOST = 1 << 20
"""Of nodes, and of devices of one: every divisor of their number is a layout."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator."""

    memory_gb: float
    tflops: float
    memory_gb_s: float = 1000.0
    call_us: float = 0.0
    """Of a module, forward and backward, beside what it computes; 0 where that hides behind the device's work."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between devices of a node, and of different nodes."""

    within_gb_s: float = 100.0
    between_gb_s: float = 10.0
    latency_us: float = 10.0
    """Between two; messages of more ranks take as many steps as their number has doublings."""
    inside_us: float = 0.0
    """Of a message that layers stand still for, on CPUs that compute before and after it; 0: as `latency_us`."""
    wait: float = 0.0
    """Share of what ranks compute between such messages that one of them waits for the others."""
    overlap: float = OVERLAP
    """Of backward that messages hide behind; 0 where the processors that compute also move them."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node's main memory, and one device's link to it."""

    memory_gb: float = 0.0
    link_gb_s: float = 25.0


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A node's disk; 0: none."""

    read_gb_s: float = 0.0
    write_gb_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is to train on."""

    nodes: int = 1
    devices_per_node: int = 1
    device: Device
    links: Links = field(default_factory=Links)
    host: Host = field(default_factory=Host)
    disk: Disk = field(default_factory=Disk)
    price_per_device_hour: float = 0.0
    processors: int | None = None
    """Of a node, that its devices take turns on; None: each has its own."""

    @property
    def turns(self) -> float:
        """Of how many devices that compute one has its turn."""
        return max(1.0, self.devices_per_node / self.processors) if self.processors else 1.0

    def latency_s(self, ranks: int) -> float:
        """Of a message that so many ranks take part in."""
        return self.links.latency_us * 1e-6 * max(1, (ranks - 1).bit_length())

    def inside_s(self, ranks: int) -> float:
        """Of a message that layers of so many ranks stand still for."""
        doublings = max(1, (ranks - 1).bit_length())
        return doublings * self.links.inside_us * 1e-6 if self.links.inside_us else self.latency_s(ranks)

    @property
    def num_devices(self) -> int:
        """Ranks, one per device."""
        return self.nodes * self.devices_per_node

    def wire_nbytes_s(self, ranks: int, stride: int) -> float:
        """Bytes per second of a rank, in a group of `ranks` that are `stride` apart; every rank of the node in a group of its own."""
        reach = ranks * stride
        if reach <= self.devices_per_node:
            return self.links.within_gb_s * GB
        return self.links.between_gb_s * GB

    def rates(self) -> Rates:
        """As the cost model knows them, with groups over all devices."""
        return Rates(
            matmul_flops=self.device.tflops * 1e12,
            copy_nbytes_s=self.device.memory_gb_s * GB,
            wire_nbytes_s=self.wire_nbytes_s(self.num_devices, 1),
            wire_latency_s=self.links.latency_us * 1e-6,
            host_nbytes_s=self.host.link_gb_s * GB,
            disk_read_nbytes_s=self.disk.read_gb_s * GB / max(1, self.devices_per_node),
            disk_write_nbytes_s=self.disk.write_gb_s * GB / max(1, self.devices_per_node),
        )


def read_cluster(source: str | Path | Mapping[str, Any]) -> Cluster:
    """A cluster from a JSON file or a dict. Raises DeepSpeedError with the key, its value, and the cure."""
    if isinstance(source, Mapping):
        data: Any = dict(source)
    else:
        path = Path(source)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DeepSpeedError(f"--cluster {path} cannot be read: {error.strerror}.\n  Check the path.") from None
        except ValueError as error:
            raise DeepSpeedError(
                f"--cluster {path} is not JSON: {error}.\n  docs/planning.md has an example."
            ) from None
    if not isinstance(data, dict) or "device" not in data:
        raise DeepSpeedError(
            'the cluster has no "device".\n  Give at least {"nodes": 1, "devices_per_node": 8, "device": {"memory_gb": 80, "tflops": 400}}.'
        )
    sections: dict[str, Any] = {"device": Device, "links": Links, "host": Host, "disk": Disk}
    made = {key: _make(kind, data.pop(key), f"{key}.") for key, kind in sections.items() if key in data}
    return _make(Cluster, {**data, **made}, "")


def _make(kind: type[T], data: Any, prefix: str) -> T:
    if not isinstance(data, dict):
        raise DeepSpeedError(f"cluster: {prefix.rstrip('.')} = {data!r} is no section.\n  Write an object, {{...}}.")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise DeepSpeedError(
                f"cluster: {prefix}{key} is not a key.\n  "
                + (f"Did you mean {prefix}{near[0]}?" if near else f"The keys are {', '.join(known)}.")
            )
        if key in ("device", "links", "host", "disk"):
            continue
        is_count = key in COUNTS
        if isinstance(value, (list, dict)):
            raise DeepSpeedError(
                f"cluster: {prefix}{key} is {'a list' if isinstance(value, list) else 'an object'}, and takes one number: all nodes and devices are alike.\n"
                "  Plan for the kinds that there are one by one, or give the slowest one's numbers for all: ranks wait for it."
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in SHARES and number and not 0 <= value <= 1:
            raise DeepSpeedError(f"cluster: {prefix}{key} = {value!r} is no share.\n  Give a number from 0 to 1.")
        is_wrong = not number or not math.isfinite(value) or value < 0 or (key in RATES and not value)
        if is_wrong or (is_count and (value != int(value) or not 1 <= value <= MOST)):
            need = (
                f"a whole number from 1 to {MOST:,}"
                if is_count
                else f"a number, {'above' if key in RATES else 'at least'} 0"
            )
            raise DeepSpeedError(f"cluster: {prefix}{key} = {value!r} is not {need}.\n  Give one.")
    counts = {key: int(data[key]) for key in COUNTS if key in data}  # 1e3 is one too
    try:
        return kind(**{**data, **counts})
    except TypeError:
        missing = [n for n in known if n not in data and n in ("memory_gb", "tflops", "device")]
        raise DeepSpeedError(f"cluster: {prefix}{missing[0]} is missing.\n  Give a number.") from None
