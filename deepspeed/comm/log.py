"""The log of collectives: what `deepspeed.comm` lets a script ask of what was recorded.

`configure` puts the one recorder in its place (`recorder.Current`), to which `collectives.run` and the observed exchanges
report; the other functions read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch.distributed as dist

from deepspeed.comm.observe import measure_alone
from deepspeed.comm.recorder import Current, Recorder, straggling_ms, table


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Start, change or stop recording collectives: from the config's `comms_logger` section, then from the arguments."""
    section = getattr(deepspeed_config, "comms_logger", None)
    before = Current.recorder
    if enabled is None:
        enabled = section.enabled if section is not None else before is not None
    recorder = before or Recorder()
    given = {"prof_all": prof_all, "prof_ops": prof_ops, "verbose": verbose, "debug": debug}
    for name, value in given.items():
        if value is None and section is not None:
            value = getattr(section, name)
        if value is not None:
            setattr(recorder, name, value)
    Current.recorder = recorder if enabled else None


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Print on rank 0 what was recorded; with `return_dict`, return this rank's numbers. Collective.

    ZeRO's own traffic is asynchronous: its latency is measured here, on scratch memory with nothing beside it, at the first
    call for each message size. The dict: "summary" -> op -> message bytes -> numbers, "straggler_analysis" (None unless
    asked for: milliseconds this rank waited longer than the rank that waited least), "metadata".
    """
    recorder = Current.recorder or Recorder()
    dist.barrier()
    measure_alone(recorder)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    summary = recorder.summary(world_size)
    straggling = straggling_ms(summary) if show_straggler else {}
    if rank == 0:
        print(table(summary, straggling), flush=True)
    if not return_dict:
        return None
    return {
        "summary": summary,
        "straggler_analysis": straggling if show_straggler else None,
        "metadata": {"world_size": world_size, "rank": rank, "timestamp": datetime.now(timezone.utc).isoformat()},
    }


def reset_log() -> None:
    """Forget what was recorded; go on recording."""
    if Current.recorder is not None:
        Current.recorder.clear()


def has_comm_data() -> bool:
    """Whether anything was recorded."""
    return get_comm_operation_count() > 0


def get_comm_operation_count() -> int:
    """How many operations were recorded."""
    recorder = Current.recorder or Recorder()
    timed = sum(len(latencies) for sizes in recorder.records.values() for latencies in sizes.values())
    return timed + sum(flow.count for flow in recorder.flows.values())


def get_logged_comm_ops() -> list[str]:
    """The names of the recorded operations."""
    recorder = Current.recorder or Recorder()
    return list(dict.fromkeys([*recorder.records, *(op for (op, _, _), flow in recorder.flows.items() if flow.count)]))
