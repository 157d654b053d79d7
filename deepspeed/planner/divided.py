"""Seconds of a step where ranks share layers, sequences, experts or the model's depth. Pure.

Read by the autotuner's prior. A rank's own work is made of the model's shape (`memory.shape`) as the layout divides it, and goes
through the same cost model as a data-parallel rank's (`cost`), so that divided and undivided candidates are comparable. On top come
what its layers send (`layouts.sent_inside`), at the rates that this machine was measured at, and the pipeline's bubble, from the
schedule's own list on a clock.

Invariant: of a layout that divides nothing it is `cost.step_parts`.
"""

from __future__ import annotations

from dataclasses import replace

from deepspeed.memory.shape import ModelShape
from deepspeed.parallel.pipeline.check import Costs, makespan
from deepspeed.parallel.pipeline.schedules import NAMED
from deepspeed.planner.cost import Choice, Parts, Work, step_parts
from deepspeed.planner.layouts import Layout, moved_inside, rank_params, sent_inside, stage_work
from deepspeed.profiling.rates import Rates


def divided_parts(
    rates: Rates,
    work: Work,
    choice: Choice,
    shape: ModelShape | None,
    layout: Layout,
    schedule: str = "1f1b",
    *,
    flops: float | None = None,
) -> Parts:
    """A step of a layout. `work`: of the whole model; `choice`: its ranks are those that ZeRO shards over. Without a shape all is divided evenly.

    flops: a rank's own of a sample, where its part was traced: a head that its ranks do not cut is whole on each.
    """
    local = _local(work, shape, layout)
    if flops is not None:
        share = flops / max(work.flops, 1.0)
        local = replace(
            local,
            flops=flops,
            forward_flops=work.forward_flops * share,
            clocked=work.clocked and work.clocked.scaled(1 / layout.pp, share),
        )
    parts = step_parts(rates, local, choice)
    inside = _inside_s(rates, shape, layout, choice, parts.busy)
    return replace(parts, inside=inside, bubble=_bubble_s(rates, parts.busy + inside, shape, layout, schedule))


def _local(work: Work, shape: ModelShape | None, layout: Layout) -> Work:
    """A rank's share of a model's step."""
    ways = layout.pp * layout.sp * layout.tp
    one = replace(layout, micro=1)
    whole = Layout()
    if shape is None:
        params, flops, kept = 1 / (layout.pp * layout.tp), 1 / ways, 1 / ways
    else:
        blocks = -(-shape.num_blocks // layout.pp)
        params = rank_params(shape, one, blocks) / rank_params(shape, whole, shape.num_blocks)
        flops, kept = (
            mine / max(all_of_it, 1.0)
            for mine, all_of_it in zip(stage_work(shape, one), stage_work(shape, whole), strict=True)
        )
    return replace(
        work,
        num_params=max(1, round(work.num_params * params)),
        flops=work.flops * flops,
        forward_flops=work.forward_flops * flops,
        activation_nbytes=work.activation_nbytes * kept,
        num_modules=-(-work.num_modules // layout.pp),
        num_tensors=-(-work.num_tensors // layout.pp),
        clocked=work.clocked and work.clocked.scaled(1 / layout.pp, flops),
    )


def _inside_s(rates: Rates, shape: ModelShape | None, layout: Layout, choice: Choice, busy_s: float) -> float:
    """Of a step that computes for `busy_s`. Without a shape it is what was counted of the step, if it was."""
    if shape is None:
        times, sent = 1, moved_inside(choice.messages or {}, layout)
    else:
        times, sent = layout.accumulation, sent_inside(shape, layout)
    rate = rates.shared_nbytes_s or rates.sum_nbytes_s or rates.wire_nbytes_s or 1.0
    latency = rates.shared_message_s or rates.sum_latency_s or rates.wire_latency_s
    waited_s = rates.shared_wait * busy_s if any(each.calls for each in sent.values()) else 0.0
    return waited_s + times * sum(each.nbytes / rate + each.calls * latency for each in sent.values())


def _bubble_s(rates: Rates, busy_s: float, shape: ModelShape | None, layout: Layout, schedule: str) -> float:
    """What the busiest rank of a pipeline waits in a step, by the schedule's list."""
    if layout.pp == 1:
        return 0.0
    micro_s = busy_s / layout.accumulation
    hop = rates.wire_latency_s
    if shape is not None:
        hop += shape.boundary_nbytes * layout.micro / layout.sp / max(rates.wire_nbytes_s, 1.0)
    costs = Costs.equal(layout.pp, micro_s / 3, micro_s / 3, micro_s / 3, hop)
    actions = NAMED[schedule if schedule in NAMED else "1f1b"](layout.pp, layout.accumulation)
    if actions.num_stages != layout.pp:
        costs = Costs.equal(actions.num_stages, *(micro_s / 3 * layout.pp / actions.num_stages,) * 3, hop)
    return max(0.0, makespan(actions, costs) - busy_s)
