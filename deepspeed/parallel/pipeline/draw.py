"""Lists of actions as a picture: a row per rank, a box per action, its width the time that it takes; SVG as text.

For docs (`docs/images/schedules.svg`) and scripts; a run's own batch is drawn by its report. Stands on the simulation (`check`). Pure.

    open("mine.svg", "w").write(drawing([engine.actions]))

Invariant: all lists of a picture are on one clock, so that their lengths can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deepspeed.parallel.pipeline.actions import Actions, Op
from deepspeed.parallel.pipeline.check import Costs, Span, Timeline, peak_alive, simulate, steady_bubble
from deepspeed.utils.errors import DeepSpeedError

MOST = 8192
"""Actions that a picture has room for."""
_COLORS = {Op.FORWARD: "#4c7fd0", Op.BACKWARD: "#3a9a6b", Op.INPUT: "#3a9a6b", Op.WEIGHT: "#d98b3a"}
_WORDS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.INPUT: "gradient of the input",
    Op.WEIGHT: "of the weights",
}
_LEFT, _WIDTH, _ROW, _TITLE, _GAP = 52, 1100, 17, 20, 12
"""Pixels."""


def drawing(lists: Sequence[Actions], costs: Costs | None = None) -> str:
    """The lists under each other, as an SVG file's text.

    costs: of each stage, for lists of as many stages; without it a rank's forward, input and weight gradients take 1 each.
    Raises DeepSpeedError for lists that cannot be carried out, or that are too long to be seen (8,192 actions of all ranks).
    """
    num = sum(len(row) for actions in lists for row in actions.lists)
    if not 0 < num <= MOST:
        raise DeepSpeedError(
            f"a picture of {num} actions: it has room for 1 to {MOST}.\n  Draw the same schedule for fewer micro-batches."
        )
    clocks = [_costs(actions, costs) for actions in lists]
    lines = [simulate(actions, clock) for actions, clock in zip(lists, clocks, strict=True)]
    per_unit = (_WIDTH - _LEFT) / max(line.makespan for line in lines)
    parts, y = [_legend(lists)], 2 * _TITLE
    for actions, clock, line in zip(lists, clocks, lines, strict=True):
        parts.append(_text(0, y, _title(actions, clock, line), "t"))
        y += _TITLE // 2
        for rank, row in enumerate(line.spans):
            parts.append(_text(0, y + _ROW - 5, f"rank {rank}", "r"))
            parts += [_box(actions, span, y, per_unit) for span in row]
            y += _ROW
        y += _TITLE + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y - _TITLE}" font-family="sans-serif">\n<style>'
        ".t{font-size:13px;fill:#222}.r{font-size:11px;fill:#555}.m{font-size:9px;fill:#fff;text-anchor:middle}rect{stroke:#fff;stroke-width:.6}"
        f'</style>\n<rect width="{_WIDTH}" height="{y}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _costs(actions: Actions, costs: Costs | None) -> Costs:
    if costs is None:
        return Costs.equal(actions.num_stages, *[actions.num_ranks / actions.num_stages] * 3)
    if len(costs.forward) != actions.num_stages:
        raise DeepSpeedError(
            f"costs of {len(costs.forward)} stages for a list of {actions.num_stages}.\n  Give a number per stage, or no costs."
        )
    return costs


def _title(actions: Actions, costs: Costs, line: Timeline) -> str:
    alive = max(peak_alive(actions)) * actions.num_ranks / actions.num_stages
    return (
        f"{actions.name or 'a list'}: {actions.num_ranks} ranks, {actions.num_micro} micro-batches; bubble of one batch {line.bubble:.1%}, of "
        f"batches in a row {steady_bubble(actions, costs):.1%}; at most {alive:g} alive on a rank"
    )


def _legend(lists: Sequence[Actions]) -> str:
    used = {action.op for actions in lists for row in actions.lists for action in row}
    words: dict[str, str] = {}
    for op in (op for op in Op if op in used):
        color = _COLORS[op]
        words[color] = f"{words[color]} or {_WORDS[op]}" if color in words else _WORDS[op]
    x, parts = 0, list[str]()
    for color, said in words.items():
        parts += [f'<rect x="{x}" y="4" width="12" height="12" fill="{color}"/>', _text(x + 17, 14, said, "r")]
        x += 40 + 6 * len(said)
    if any(_has_chunks(actions) for actions in lists):
        parts.append(_text(x, 14, "darker: a rank's later stages", "r"))
    return "".join(parts)


def _has_chunks(actions: Actions) -> bool:
    return actions.num_stages > actions.num_ranks


def _box(actions: Actions, span: Span, y: int, per_unit: float) -> str:
    action = span.action
    x, width = _LEFT + span.start * per_unit, (span.end - span.start) * per_unit
    chunk = actions.stages_of(actions.rank_of[action.stage]).index(action.stage)
    shade = f' opacity="{max(0.45, 1 - 0.35 * (len(actions.rank_of) // actions.num_ranks - 1 - chunk)):g}"'
    box = (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 2}" fill="{_COLORS[action.op]}"{shade}>'
        f"<title>{action}</title></rect>"
    )
    fits = width > 5 * len(str(action.micro)) + 1
    return box + (f'<text x="{x + width / 2:.1f}" y="{y + _ROW - 6}" class="m">{action.micro}</text>' if fits else "")


def _text(x: int, y: int, words: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'
