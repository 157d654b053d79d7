"""A plan as one page: the layout of the cluster, the step as it is simulated, where memory and time go, and the runners-up.

Called by `deepspeed plan --html`; `doctor_page` borrows its style. One file without references to others and without scripts; drawings are SVG.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

from deepspeed.memory.shape import ModelShape
from deepspeed.parallel.pipeline.actions import Op
from deepspeed.parallel.pipeline.check import Timeline
from deepspeed.planner.cluster import GB, Cluster
from deepspeed.planner.layouts import Plan
from deepspeed.planner.search import Answer, timeline_of
from deepspeed.utils.figures import count, many, nbytes, seconds

COLORS = ["#3b5bdb", "#1098ad", "#74b816", "#f59f00", "#e8590c", "#ae3ec9", "#4dabf7", "#63e6be"]
WIDE = 500
"""Pixels from which a drawing is moved aside on a narrow screen, and not made smaller."""
MAX_NODES = 16
"""Rows of the drawings: more would not be seen."""
STYLE = """
:root{--paper:#fbfbfd;--card:#fff;--ink:#1d2333;--soft:#667085;--line:#e4e7ee;--track:#f1f3f8}
@media(prefers-color-scheme:dark){:root{--paper:#12151d;--card:#1a1f2b;--ink:#e7eaf2;--soft:#98a2b8;--line:#2b3242;--track:#232a39}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 28px 60px}h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin:0 0 10px;font-weight:600}
.lead,.key{color:var(--soft);margin:0 0 20px}.key{font-size:12.5px;margin:0 0 10px}.card{background:var(--card);border:1px solid var(--line);
border-radius:14px;padding:20px 22px;margin-bottom:18px;overflow-x:auto}.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;
margin-bottom:18px}.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}
.tile b{display:block;font-size:20px;letter-spacing:-.02em;font-weight:650}.tile span{color:var(--soft);font-size:12.5px}
table{border-collapse:collapse;width:100%;font-size:12.5px}td,th{padding:4px 8px;border-top:1px solid var(--line);text-align:left}
th{color:var(--soft);font-weight:600;border:0}td.n,th.n{text-align:right;white-space:nowrap}svg{max-width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:11px system-ui,"DejaVu Sans",sans-serif}svg .s{fill:var(--soft)}.bar{display:flex;height:22px;border-radius:6px;
overflow:hidden;background:var(--track);margin-bottom:8px}.bar i{display:block}.legend span{display:inline-block;margin-right:16px;font-size:12.5px;color:var(--soft)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:5px;vertical-align:-1px}
.legend{line-height:1.9}pre{margin:0;font:12.5px/1.55 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.drawn{width:36%}td:first-child{overflow-wrap:anywhere}.tile b{overflow-wrap:anywhere}
@media(max-width:760px){main{padding:24px 14px 40px}.card{padding:16px}.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile b{font-size:16px}
svg.wide{max-width:none}td:first-child{min-width:130px}.drawn{display:none}}
"""


def page(shape: ModelShape, cluster: Cluster, answer: Answer, seq: int) -> str:
    """The page."""
    best = answer.plans[0]
    layout = best.layout
    batch = layout.dp * layout.micro * layout.accumulation
    what = "the fastest that fits" if answer.num_layouts > 1 else "as asked" if answer.num_fitting else "does not fit"
    waits = (f"{100 * best.bubble:.1f}%", "of the pipeline's time is bubble")
    tiles = [
        (html.escape(layout.name), what),
        (seconds(best.step_s), f"a step of {many(batch, 'sample')}, {batch * seq / best.step_s:,.0f} tokens/s"),
        (nbytes(best.device_nbytes), f"of {cluster.device.memory_gb:g} GB on the fullest device"),
        waits if layout.pp > 1 else ("no pipeline", "so no bubble"),
    ]
    top = "".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
    name = html.escape(shape.name)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Plan for {name}</title><style>{STYLE}</style><main><h1>Plan for {name}</h1>"
        f'<p class="lead">{count(shape.num_params)} parameters in {many(shape.num_blocks, "block")} on {many(cluster.num_devices, "device")}; '
        f"{many(answer.num_layouts, 'layout')} compared, within the memory of a device: {answer.num_fitting:,}.</p>"
        f'<div class="tiles">{top}</div>{_cluster(cluster, best)}{_step(best)}{_bars(best, cluster)}{_table(cluster, answer.plans, seq)}</main></html>'
    )


def _cluster(cluster: Cluster, best: Plan) -> str:
    """The first nodes, a square per device; its color is its pipeline stage, its text its places in the data-parallel and sequence ranks."""
    layout = best.layout
    per_stage = layout.num_ranks // layout.pp
    step = max(1, cluster.nodes // MAX_NODES)
    nodes = list(range(0, cluster.nodes, step))[:MAX_NODES]
    side, gap = 30, 4
    wide = max(side, 14 + 6 * len(str(layout.dp - 1)))
    squares = []
    for row, node in enumerate(nodes):
        y = 8 + row * (side + 8)
        squares.append(f'<text class="s" x="0" y="{y + 20}">node {node}</text>')
        for slot in range(cluster.devices_per_node):
            rank = node * cluster.devices_per_node + slot
            stage, inside = rank // per_stage, rank % per_stage
            data, part, tensor = inside // (layout.sp * layout.tp), inside // layout.tp % layout.sp, inside % layout.tp
            x = 76 + slot * (wide + gap)
            hue, light = 228 + 360 * stage / layout.pp, 44 - 20 * tensor / layout.tp  # dark enough for white letters
            tip = f"rank {rank}: stage {stage}, data {data}, sequence {part}, tensor {tensor}"
            lines = [f"d{data}", *([f"s{part}"] if layout.sp > 1 else [])]
            label = "".join(
                f'<text x="{x + 4}" y="{y + (19 if len(lines) == 1 else 13 + 12 * i)}" style="fill:#fff;font-size:10px">{text}</text>'
                for i, text in enumerate(lines)
            )
            squares.append(
                f'<g><title>{tip}</title><rect x="{x}" y="{y}" width="{wide}" height="{side}" rx="5" fill="hsl({hue % 360:.0f} 60% {light:.0f}%)"/>{label}</g>'
            )
    width = 84 + cluster.devices_per_node * (wide + gap)
    height = 16 + len(nodes) * (side + 8)
    shown = f"{len(nodes)} of {cluster.nodes} nodes, one of each {step}" if step > 1 else many(cluster.nodes, "node")
    key = [
        *(["color: pipeline stage"] if layout.pp > 1 else []),
        *(["shade: tensor-parallel rank"] if layout.tp > 1 else []),
        "d: data-parallel rank",
        *(["s: part of the sequence"] if layout.sp > 1 else []),
    ]
    return (
        f'<div class="card"><h2>Where ranks lie</h2><p class="key">{shown}; '
        f'{", ".join(key)}.</p><svg{" class=wide" if width > WIDE else ""} viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(squares)}</svg></div>'
    )


def _step(best: Plan) -> str:
    timeline = timeline_of(best)
    if timeline is None:
        return ""
    return (
        '<div class="card"><h2>A step of the pipeline</h2><p class="key">Simulated; a row per stage, blue forward, green backward, '
        f"gaps are bubble.</p>{_gantt(timeline)}</div>"
    )


def _gantt(timeline: Timeline) -> str:
    width, row_height, left = 1040, 20, 44
    ranks = len(timeline.spans)
    step = max(1, ranks // MAX_NODES)
    parts = []
    for row, rank in enumerate(range(0, ranks, step)):
        y = row * (row_height + 3)
        parts.append(f'<text class="s" x="0" y="{y + 14}">stage {rank}</text>')
        for span in timeline.spans[rank]:
            x = left + (width - left) * span.start / timeline.makespan
            w = max(0.4, (width - left) * (span.end - span.start) / timeline.makespan - 0.5)
            color = "#4dabf7" if span.action.op is Op.FORWARD else "#51cf66"
            label = f'<text x="{x + 2:.1f}" y="{y + 14}" style="fill:#123">{span.action.micro}</text>' if w > 16 else ""
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row_height}" rx="2" fill="{color}"><title>{span.action}</title></rect>{label}'
            )
    height = (row + 1) * (row_height + 3)
    return f'<svg class=wide viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def _bars(best: Plan, cluster: Cluster) -> str:
    room = cluster.device.memory_gb * GB
    memory = bar(best.memory, room, nbytes)
    times = {
        "compute, with traffic inside of layers": best.compute_s,
        "bubble": best.bubble_s,
        "ZeRO's traffic that is not hidden": best.exposed_s,
        "update": best.update_s,
    }
    traffic = {key: value for key, value in best.traffic.items() if value}
    sent = bar(traffic, sum(traffic.values()) or 1.0, lambda value: nbytes(value, 2))
    return (
        f'<div class="card"><h2>Memory of the fullest device</h2>{memory}</div>'
        f'<div class="card"><h2>Time of a step</h2>{bar(times, best.step_s, seconds)}</div>'
        f'<div class="card"><h2>What a rank sends in a step</h2>{sent}</div>'
    )


def bar(parts: Mapping[str, float], whole: float, tell: Callable[[float], str]) -> str:
    """A bar of parts of a whole, and its legend, each part as `tell` says it."""
    bars, legend = "", ""
    for color, (key, value) in zip(COLORS, ((k, v) for k, v in parts.items() if v), strict=False):
        bars += f'<i style="width:{100 * value / whole:.2f}%;background:{color}" title="{html.escape(key)}"></i>'
        legend += f'<span><i style="background:{color}"></i>{html.escape(key)} {tell(value)}</span>'
    return f'<div class="bar">{bars}</div><div class="legend">{legend}</div>'


def _table(cluster: Cluster, plans: Sequence[Plan], seq: int) -> str:
    rows = ""
    for plan in plans:
        batch = plan.layout.dp * plan.layout.micro * plan.layout.accumulation
        cost = plan.cost(cluster) / (batch * seq) * 1e9
        cells = [
            nbytes(plan.device_nbytes),
            nbytes(sum(plan.traffic.values()), 2),
            f"{100 * plan.bubble:.1f}%" if plan.layout.pp > 1 else "-",
            seconds(plan.step_s),
            f"{batch * seq / plan.step_s:,.0f}",
            f"{cost:,.4g}" if cost else "-",
        ]
        rows += (
            f"<tr><td>{html.escape(plan.layout.name)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        )
    columns = ("memory", "sent", "bubble", "step", "tokens/s", "cost of 1e9 tokens")
    head = f"<tr><th>layout{''.join(f'<th class=n>{column}' for column in columns)}</tr>"
    title = "The fastest layouts" if len(plans) > 1 else "The layout"
    return f'<div class="card"><h2>{title}</h2><table>{head}{rows}</table></div>'
