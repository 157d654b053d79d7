"""The ranked layouts of a model over a cluster: all that fit, the fastest first, their pipelines simulated. Pure.

What does not fit is dropped by its memory alone; every other layout is evaluated by formula, and those that come out first are simulated: the schedule's own list of actions, on the clock of
`parallel.pipeline.check`, with the seconds of each stage and of each hop. So a bubble in the answer is that of a list that the
executor would carry out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepspeed.memory.shape import ModelShape
from deepspeed.mesh.shape import DEGREES
from deepspeed.parallel.pipeline.actions import Actions
from deepspeed.parallel.pipeline.check import Costs, Timeline, makespan, simulate
from deepspeed.parallel.pipeline.schedules import NAMED
from deepspeed.planner.cluster import GB, Cluster
from deepspeed.planner.layouts import Layout, Plan, evaluate, layouts, memory_of
from deepspeed.utils.errors import DeepSpeedError

NUM_SIMULATED = 12
MAX_ACTIONS = 40_000
"""Of one simulated step; larger ones keep the formula, which 1F1B meets exactly where stages are alike."""


@dataclass(frozen=True)
class Answer:
    """Ranked plans, and how many layouts were looked at."""

    plans: Sequence[Plan]
    num_layouts: int
    num_fitting: int


def plan_cluster(shape: ModelShape, cluster: Cluster, batch: int, *, most: int = 10) -> Answer:
    """The fastest layouts for `batch` samples per step. Raises DeepSpeedError where none divides, or none fits."""
    room = cluster.device.memory_gb * GB
    found = [(sum(memory_of(shape, layout)[0].values()), layout) for layout in layouts(shape, cluster, batch)]
    if not found:
        raise DeepSpeedError(
            f"no layout divides a batch of {batch} samples over {cluster.num_devices} devices.\n"
            f"  Give a batch that is a multiple of {cluster.num_devices}, or of a part of it."
        )
    fitting = [evaluate(shape, cluster, layout) for nbytes, layout in found if nbytes <= room]
    if not fitting:
        fitting = [plan for plan in _offloaded(shape, cluster, found) if plan.fits(cluster)]
    if not fitting:
        needed, least = min(found)
        raise DeepSpeedError(
            f"nothing fits {cluster.device.memory_gb:g} GB per device: the least of {len(found)} layouts, "
            f"{least.name}, needs {needed / GB:.1f} GB.\n  Use more devices, or larger ones."
        )
    fitting.sort(key=lambda plan: (plan.step_s, plan.layout))
    first = [simulated(plan) for plan in _varied(fitting)[:NUM_SIMULATED]]
    first.sort(key=lambda plan: (plan.step_s, plan.layout))
    return Answer(first[:most], len(found), len(fitting))


def _offloaded(shape: ModelShape, cluster: Cluster, found: Sequence[tuple[float, Layout]]) -> list[Plan]:
    """The same with states on the hosts."""
    return [evaluate(shape, cluster, replace(layout, offload=True)) for _, layout in found if layout.stage >= 1]


def _varied(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest of each division of the ranks first, then the others."""
    seen: set[tuple[int, ...]] = set()
    first: list[Plan] = []
    rest: list[Plan] = []
    for plan in plans:
        at = plan.layout
        dims = (at.pp, at.dp, at.sp, at.tp, at.ep)
        (rest if dims in seen else first).append(plan)
        seen.add(dims)
    return first + rest


def timeline_of(plan: Plan, schedule: str = "1f1b") -> Timeline | None:
    """The step's pipeline on a clock; None for a layout without one, or with too many actions to show."""
    listed = _listed(plan, schedule)
    return simulate(*listed) if listed is not None else None


def _listed(plan: Plan, schedule: str) -> tuple[Actions, Costs] | None:
    layout = plan.layout
    if layout.pp == 1 or 2 * layout.pp * layout.accumulation > MAX_ACTIONS:
        return None
    costs = Costs(
        forward=[plan.forward_s / plan.turns] * layout.pp,
        input=[plan.backward_s / 2 / plan.turns] * layout.pp,
        weight=[plan.backward_s / 2 / plan.turns] * layout.pp,
        hop=plan.hop_s,
    )
    return NAMED[schedule](layout.pp, layout.accumulation), costs


def simulated(plan: Plan) -> Plan:
    """The plan with its bubble from a simulated step."""
    listed = _listed(plan, "1f1b")
    return plan if listed is None else replace(plan, bubble_s=max(0.0, makespan(*listed) - plan.compute_s))


def parse_layout(text: str) -> Layout:
    """ "pp2 dp4 zero1 4x8" as a layout; the inverse of its name. Raises DeepSpeedError."""
    values: dict[str, int | bool] = {}
    for word in text.split():
        name = word.rstrip("0123456789")
        number = word[len(name) :]
        if name in DEGREES and number:
            said: dict[str, int | bool] = {name: int(number)}
        elif name == "zero" and number in ("0", "1", "2", "3"):
            said = {"stage": int(number)}
        elif "x" in word and [part.isdecimal() for part in word.split("x")] == [True, True]:
            said = dict(zip(("micro", "accumulation"), map(int, word.split("x")), strict=True))
        elif word in ("recompute", "offload"):
            said = {word: True}
        elif word in ("one", "rank"):
            continue
        else:
            raise DeepSpeedError(f"{word!r} is no part of a layout.\n  Write it as pp2 dp4 tp2 zero1 4x8 recompute.")
        if values.keys() & said.keys() or ("stage" not in said and 0 in said.values()):
            what = "says again what another word does" if values.keys() & said.keys() else "has a 0"
            raise DeepSpeedError(f"--layout {text}: {word} {what}.\n  Give each once, and at least 1.")
        values |= said
    return Layout(**values)  # type: ignore[arg-type]
