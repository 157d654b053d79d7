"""Counts and times collectives, per operation and message size; off unless configured.

While there is a recorder, three things reach it. `collectives.run` hands it every collective that is called through
`deepspeed.comm`, `watched` what layers and sequences that lie in parts send; these are waited for on the spot and timed. ZeRO's own traffic stays asynchronous: `comm.observe` counts it
in `Flow`s, with the time it was waited for, and how long it takes by itself. Without a recorder nothing here runs.

    records[op][message bytes] = latencies in ms
    flows[op, message bytes, mesh dim] = count, waits, seconds alone

Algorithm bandwidth is message bytes / time. Bus bandwidth scales it by what the operation must move per link, so that
it compares to the hardware whatever the world size: the factors of nccl-tests (doc/PERFORMANCE.md). The message of an
all-gather, a reduce-scatter or an all-to-all is the full buffer over all ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import logger
from deepspeed.utils.waits import COMMUNICATION, Waits

_BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
}


def bus_factor(op: str, world_size: int) -> float:
    """Bus bandwidth / algorithm bandwidth of an operation, by the longest name it begins with; 1 for the others."""
    name = next((known for known in _BUS_FACTORS if known in op), None)
    return _BUS_FACTORS[name](world_size) if name and world_size > 1 else 1.0


@dataclass(eq=False)
class Flow:
    """One asynchronous operation of one message size over one group."""

    make_call: Callable[[], Callable[[], None]]
    """Makes a call of the operation on scratch memory, to time it alone."""
    count: int = 0
    waits: Waits = field(default_factory=Waits)
    """How long this rank stood still for it, in all."""
    alone_s: float | None = None
    """How long it takes with nothing beside it; None until measured."""


@dataclass
class Recorder:
    """What was recorded since the last reset, and what is to be recorded."""

    prof_all: bool = True
    prof_ops: Sequence[str] = ()
    verbose: bool = False
    debug: bool = False
    records: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    flows: dict[tuple[str, int, str], Flow] = field(default_factory=dict)
    num_ranks: dict[str, int] = field(default_factory=dict)
    """By operation, over how many ranks it went, where those are not all."""

    def wants(self, log_name: str, prof: bool) -> bool:
        """Whether this operation is recorded: all are, or it is listed, or the call asks for it."""
        return self.prof_all or prof or log_name in self.prof_ops

    def timed(self, call: Callable[[], Any], log_name: str, nbytes: int, caller: str) -> Any:
        """Run a collective to its end, note how long it took, and return what it returned."""
        with self.timing(log_name, nbytes, caller):
            handle = call()
            if handle is not None and not isinstance(handle, int):  # recv returns a rank
                handle.wait()
        return handle

    @contextlib.contextmanager
    def timing(self, log_name: str, nbytes: int, caller: str) -> Iterator[None]:
        """Note how long what is inside took, with what the device had to do for it."""
        synchronize = get_accelerator().synchronize
        synchronize()
        start_s = time.perf_counter()
        yield
        synchronize()
        latency_ms = (time.perf_counter() - start_s) * 1e3
        self.records.setdefault(log_name, {}).setdefault(nbytes, []).append(latency_ms)
        self.tell(log_name, nbytes, latency_ms, caller)

    def flow(self, op: str, nbytes: int, dim: str, make_call: Callable[[], Callable[[], None]]) -> Flow:
        """The flow of an asynchronous operation, made at its first use."""
        key = (op, nbytes, dim)
        if key not in self.flows:
            self.flows[key] = Flow(make_call)
        return self.flows[key]

    def tell(self, log_name: str, nbytes: int, time_ms: float, caller: str) -> None:
        """With `verbose`, a line per operation: how long it took, or was waited for."""
        if self.verbose:
            by = f" from {caller}" if self.debug else ""
            logger.warning(f"comm op: {log_name}{by} | time (ms): {time_ms:.2f} | msg size: {size_text(nbytes)}")

    def clear(self) -> None:
        """Forget what was recorded; what was measured alone stays known."""
        self.records.clear()
        for flow in self.flows.values():
            flow.count, flow.waits = 0, Waits()

    def summary(self, world_size: int) -> dict[str, dict[int, dict[str, Any]]]:
        """op -> message bytes -> count, total and average latency, bandwidths, time waited, share hidden."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for op, sizes in self.records.items():
            for nbytes, latencies in sorted(sizes.items()):
                total_ms = sum(latencies)
                ranks = self.num_ranks.get(op, world_size)
                found.setdefault(op, {})[nbytes] = _line(op, nbytes, len(latencies), total_ms, total_ms, ranks)
        for op, nbytes in sorted({key[:2] for key, flow in self.flows.items() if flow.count}):
            same = [flow for key, flow in self.flows.items() if key[:2] == (op, nbytes) and flow.count]
            waited_ms = sum(flow.waits.seconds for flow in same) * 1e3
            # Not measured alone: that it took at least as long as it was waited for is all that is known.
            total_ms = sum(
                flow.count * flow.alone_s * 1e3 if flow.alone_s else flow.waits.seconds * 1e3 for flow in same
            )
            count = sum(flow.count for flow in same)
            found.setdefault(op, {})[nbytes] = _line(op, nbytes, count, total_ms, waited_ms, world_size)
        return found


class Current:
    """Holds the recorder while there is one."""

    recorder: Recorder | None = None
    predicted: Callable[[str, int], None] | None = None
    """Where a step is predicted: told of each message that its layers would send, by operation and bytes; nothing is sent or counted."""


@contextlib.contextmanager
def watched(op: str, nbytes: int, num_ranks: int) -> Iterator[None]:
    """Count what is inside as a wait for `op`, a message over `num_ranks` ranks; time it where something records.

    Of what began before, only the rest that is waited for is seen.
    """
    if Current.predicted is not None:
        Current.predicted(op, nbytes)
        yield
        return
    recorder = Current.recorder
    with COMMUNICATION.during(op, nbytes):
        if recorder is None or not recorder.wants(op, False):
            yield
            return
        recorder.num_ranks[op] = num_ranks
        with recorder.timing(op, nbytes, "layers"):
            yield


def _line(op: str, nbytes: int, count: int, total_ms: float, waited_ms: float, world_size: int) -> dict[str, Any]:
    gbps = nbytes * 8 * count / (total_ms / 1e3) / 1e9 if total_ms > 0 else 0.0
    return {
        "count": count,
        "total_latency_ms": total_ms,
        "avg_latency_ms": total_ms / count,
        "waited_ms": waited_ms,
        "hidden": max(0.0, 1 - waited_ms / total_ms) if total_ms > 0 else 0.0,
        "tput_avg_gbps": gbps,
        "busbw_avg_gbps": gbps * bus_factor(op, world_size),
        "msg_size_bytes": nbytes,
        "msg_size_str": size_text(nbytes),
    }


def straggling_ms(summary: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, float]]:
    """op -> message bytes -> how much longer this rank waited than the one that waited least, in all. Collective.

    The rank that waits least is the one that the others wait for.
    """
    mine = {(op, nbytes): line["waited_ms"] for op, sizes in summary.items() for nbytes, line in sizes.items()}
    of_ranks: list[dict[tuple[str, int], float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    result: dict[str, dict[int, float]] = {}
    for key, total_ms in mine.items():
        op, nbytes = key
        result.setdefault(op, {})[nbytes] = total_ms - min(rank[key] for rank in of_ranks if key in rank)
    return result


def table(summary: dict[str, dict[int, dict[str, Any]]], straggling: dict[str, dict[int, float]]) -> str:
    """The summary as aligned text, with a column of straggling times if there are any."""
    header = f"{'op':<26}{'message':>12}{'count':>8}{'total ms':>12}{'avg ms':>10}{'Gbps':>10}{'bus Gbps':>10}{'waited ms':>12}{'hidden':>8}"
    lines = [header + (f"{'straggler ms':>14}" if straggling else "")]
    for op, sizes in summary.items():
        for nbytes, line in sizes.items():
            text = (
                f"{op:<26}{line['msg_size_str']:>12}{line['count']:>8}{line['total_latency_ms']:>12.2f}"
                f"{line['avg_latency_ms']:>10.2f}{line['tput_avg_gbps']:>10.2f}{line['busbw_avg_gbps']:>10.2f}"
                f"{line['waited_ms']:>12.2f}{line['hidden']:>8.0%}"
            )
            lines.append(text + (f"{straggling[op][nbytes]:>14.2f}" if straggling else ""))
    return "\n".join(lines)


def size_text(nbytes: float) -> str:
    """1536 -> "1.5 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TB"
