"""What a batch's list of actions took on every rank, beside its plan, for the run's record and its report.

Told by the pipeline engine after some steps: the second, the fourth, and so on, doubling, so that a record stays small. The plan is
the list on a clock on which each stage's actions take what they took here in the middle, and nothing between ranks takes time: what
stands still beyond it is hops, and ranks that were late.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deepspeed.mesh import Mesh
from deepspeed.monitor.master import MonitorMaster
from deepspeed.parallel.pipeline.actions import Actions, Op
from deepspeed.parallel.pipeline.check import Costs, simulate
from deepspeed.parallel.pipeline.executor import Done
from deepspeed.utils.logging import current_rank

MOST = 4096
"""Actions of all ranks that are worth a drawing."""
Row = list[tuple[str, float, float, float]]
"""A rank's actions: text, seconds of start and end, of that seconds waited."""


def is_due(step: int, actions: Actions, monitor: MonitorMaster) -> bool:
    """Whether a step is told; the same on all ranks."""
    num = sum(map(len, actions.lists))
    return monitor.run_dir is not None and step >= 2 and step & (step - 1) == 0 and 0 < num <= MOST


def tell(step: int, actions: Actions, done: Sequence[Done], mesh: Mesh, monitor: MonitorMaster) -> None:
    """Write the line. Collective over the pipeline."""
    to_wall = time.time() - time.perf_counter()  # ranks may be on different nodes
    mine = [(str(d.action), d.start_s + to_wall, d.end_s + to_wall, d.waited_s) for d in done]
    rows: list[Row] = mesh.gather_objects("pipeline", mine)
    if current_rank() == 0:
        monitor.write_line("pipeline", {"step": step, **described(actions, rows)})


def described(actions: Actions, rows: Sequence[Row]) -> dict[str, Any]:
    """Measured and planned, in seconds from the first action; who each wait was for."""
    began = min(row[0][1] for row in rows if row)
    planned = simulate(actions, _costs(actions, rows))
    measured = [
        [
            [text, round(start - began, 6), round(end - began, 6), round(waited, 6), _waited_for(actions, action)]
            for (text, start, end, waited), action in zip(row, actions.lists[rank], strict=True)
        ]
        for rank, row in enumerate(rows)
    ]
    plan = [
        [[str(span.action), round(span.start, 6), round(span.end, 6), 0.0, None] for span in row]
        for row in planned.spans
    ]
    return {"name": actions.name, "measured": measured, "planned": plan}


def _waited_for(actions: Actions, action: Any) -> int | None:
    if action.op is Op.WEIGHT:
        return None
    other = action.stage + (-1 if action.op is Op.FORWARD else 1)
    return actions.rank_of[other] if 0 <= other < actions.num_stages else None


def _costs(actions: Actions, rows: Sequence[Row]) -> Costs:
    taken: dict[tuple[int, Op], list[float]] = {}
    for rank, row in enumerate(rows):
        for (_, start, end, waited), action in zip(row, actions.lists[rank], strict=True):
            taken.setdefault((action.stage, action.op), []).append(end - start - waited)

    def median(stage: int, op: Op) -> float:
        found = sorted(taken.get((stage, op), [0.0]))
        return found[len(found) // 2]

    stages = range(actions.num_stages)
    inputs = [median(s, Op.INPUT) or median(s, Op.BACKWARD) for s in stages]
    # Where some backwards are whole and others in halves, the whole ones tell the weight gradient beside the half.
    weights = [median(s, Op.WEIGHT) for s in stages]
    return Costs([median(s, Op.FORWARD) for s in stages], inputs, weights)
