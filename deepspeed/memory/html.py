"""A survey as one page: a stacked bar per option, the limit as a line, and what to change.

Called by `deepspeed estimate --html`. One file without references to others, readable offline and without scripts; a small
script shows the figures of the bar that is pointed at or focused.
"""

from __future__ import annotations

import html
import itertools
import json
from pathlib import Path

from deepspeed.memory.ledger import KINDS
from deepspeed.memory.options import Option, Survey
from deepspeed.utils import whole_files
from deepspeed.zero.policy import Tier

GIB, MIB = 2**30, 2**20

COLORS = dict(
    zip(
        KINDS,
        ["#3b5bdb", "#4dabf7", "#845ef7", "#15aabf", "#74c0fc", "#adb5bd", "#e599f7", "#f59f00", "#ff8787"],
        strict=True,
    )
)
ROUNDING = "allocator rounding"
ROUNDING_COLOR = "#ced4da"

_STYLE = """
:root{--paper:#fbfbfd;--card:#fff;--ink:#1d2333;--soft:#667085;--line:#e4e7ee;--track:#f1f3f8;--good:#2b8a3e;
--goodbg:#ebfbee;--bad:#c92a2a;--badbg:#fff5f5;--mark:#3b5bdb}
@media(prefers-color-scheme:dark){:root{--paper:#12151d;--card:#1a1f2b;--ink:#e7eaf2;--soft:#98a2b8;--line:#2b3242;
--track:#232a39;--good:#69db7c;--goodbg:#16261b;--bad:#ff8787;--badbg:#2b191b;--mark:#91a7ff}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 28px 60px}h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin:0;font-weight:600}
.lead{color:var(--soft);margin:0 0 24px}.card{background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:20px 22px;margin-bottom:18px}.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-bottom:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}
.tile b{display:block;font-size:22px;letter-spacing:-.02em;font-weight:650}.tile span{color:var(--soft);font-size:12.5px}
.advice{border-left:4px solid var(--good);background:var(--goodbg)}.advice.no{border-color:var(--bad);background:var(--badbg)}
.advice p{margin:0 0 2px;font-weight:600}.advice pre{margin:10px 0 0;font:12.5px/1.55 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:14px 0 6px;color:var(--soft);font-size:12.5px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.group{display:grid;grid-template-columns:64px 1fr;border-top:1px solid var(--line);padding:12px 0 10px}
.group>strong{font-size:13px;padding-top:3px}.row{display:grid;grid-template-columns:190px 78px 1fr 88px;align-items:center;gap:10px;
padding:2px 6px;border-radius:7px;outline:0}.row:hover,.row:focus{background:var(--track)}.row .o{font-size:12.5px}
.row .r{font-size:12.5px;color:var(--soft)}.row .v{text-align:right;font-size:12.5px;font-weight:600;white-space:nowrap}
.row.over .v{color:var(--bad)}.row.fits .v{color:var(--good)}.row.now .o:after{content:"yours";margin-left:7px;font-size:10.5px;
font-weight:700;color:#fff;background:var(--mark);border-radius:99px;padding:1px 7px}.row.best .o:after{content:"change to this";
margin-left:7px;font-size:10.5px;font-weight:700;color:#fff;background:var(--good);border-radius:99px;padding:1px 7px;white-space:nowrap}
.track{position:relative;height:18px;background:var(--track);border-radius:5px}.bar{display:flex;height:100%;border-radius:5px;overflow:hidden}
.bar i{display:block;height:100%}.host{height:4px;margin-top:2px;border-radius:2px;background:repeating-linear-gradient(135deg,var(--soft) 0 3px,transparent 3px 6px)}
.limit{position:absolute;top:-4px;bottom:-4px;width:0;border-left:2px dashed var(--bad)}.axis{display:grid;grid-template-columns:64px 1fr}
.axis div{display:grid;grid-template-columns:190px 78px 1fr 88px;gap:10px;padding:0 6px}.axis .t{position:relative;height:20px;color:var(--soft);font-size:11.5px}
.axis .t span{position:absolute;transform:translateX(-50%);white-space:nowrap}.axis .t .l{color:var(--bad);font-weight:600;top:16px}
#detail{min-height:74px;color:var(--soft);font-size:12.5px;display:flex;flex-wrap:wrap;gap:4px 20px;align-content:flex-start}
#detail b{color:var(--ink);flex-basis:100%}footer{color:var(--soft);font-size:12px;margin-top:22px}
@media(max-width:760px){.tiles{grid-template-columns:1fr 1fr}.row,.axis div{grid-template-columns:110px 60px 1fr 76px}}
@media(max-width:620px){.group,.axis,.axis>div{grid-template-columns:1fr}.axis b{display:none}
.row{grid-template-columns:1fr auto 84px;gap:2px 10px;padding:4px 6px}.row>div{grid-column:1/-1;grid-row:2}}
"""

_SCRIPT = """
const box=document.getElementById('detail');
for(const row of document.querySelectorAll('.row')){const show=()=>{const d=JSON.parse(row.dataset.d);box.replaceChildren();
const b=document.createElement('b');b.textContent=d[0];box.append(b);for(const [k,c,v] of d[1]){const s=document.createElement('span');
const i=document.createElement('i');i.style.cssText='display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px;background:'+c;
s.append(i,k+' '+v);box.append(s)}};row.addEventListener('mouseenter',show);row.addEventListener('focus',show)}
(document.querySelector('.row.now')||document.querySelector('.row')).dispatchEvent(new Event('mouseenter'));
"""


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:,.1f} MiB"


def write_page(result: Survey, path: Path) -> None:
    """Write the page of a survey. Raises DeepSpeedError where that fails."""
    whole_files.write_page(path, page(result))


def page(result: Survey) -> str:
    """The page."""
    name = html.escape(result.model_name)
    ranks = f"{result.world_size} rank{'s' if result.world_size > 1 else ''}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Memory of {name}</title><style>{_STYLE}</style><main><h1>Memory of {name}</h1>"
        f'<p class="lead">Predicted peak of one rank, before anything is allocated: {result.num_params / 1e6:,.1f}M parameters, '
        f"micro-batch {html.escape(result.batch)}, {ranks} on {html.escape(result.device_type)}.</p>"
        f"{_tiles(result)}{_advice(result)}{_chart(result)}"
        "<footer>Bytes that the allocator hands out, at the moment of a training step when most are in use. The thin hatched "
        "bar is main memory of the host. Rounding is what a caching allocator adds to these blocks; libraries and the "
        f"device's own context come on top.</footer></main><script>{_SCRIPT}</script></html>"
    )


def _tiles(result: Survey) -> str:
    current = result.current.estimate
    least = min(result.options, key=lambda option: option.estimate.peak_nbytes)
    room = result.limits.device_nbytes
    tiles = [
        (size(current.peak_nbytes), f"your configuration, peak in {current.phase}"),
        (size(current.on(Tier.CPU)) if current.on(Tier.CPU) else "none", "of the host's memory"),
        (size(room) if room else "not given", "memory of a device"),
        (size(least.estimate.peak_nbytes), f"the least: stage {least.stage}, offload {least.offload}"),
    ]
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{a}</b><span>{html.escape(b)}</span></div>" for a, b in tiles)}</div>'


def _advice(result: Survey) -> str:
    advice, room = result.advice, result.limits.device_nbytes
    if advice is None or room is None:
        return ""
    if not advice.changes:
        return f'<div class="card advice"><p>Your configuration fits {size(room)}.</p></div>'
    peak = size(advice.option.estimate.peak_nbytes + advice.option.estimate.allowance_nbytes)
    changes = html.escape("\n".join(f'"{key}": {json.dumps(value)}' for key, value in advice.changes.items()))
    if advice.fits:
        text = f"Does not fit {size(room)}. The smallest change that does, with {peak}:"
        return f'<div class="card advice"><p>{text}</p><pre>{changes}</pre></div>'
    text = f"Nothing fits {size(room)}, not even one sample: use more ranks. The least is {peak}, with:"
    return f'<div class="card advice no"><p>{text}</p><pre>{changes}</pre></div>'


def _nice_step(top: float) -> float:
    """A round distance of about five ticks."""
    unit = GIB if top >= GIB / 2 else MIB
    return next(
        step * unit
        for power in range(-2, 5)
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if top / (step * unit) <= 6
    )


def _chart(result: Survey) -> str:
    top = 1.02 * max(option.estimate.peak_nbytes + option.estimate.allowance_nbytes for option in result.options)
    room = result.limits.device_nbytes
    if room is not None and room < 1.6 * top:
        top = max(top, 1.06 * room)
    kinds = [kind for kind in KINDS if any(kind in option.estimate.by_kind for option in result.options)]
    legend = "".join(
        f'<span><i style="background:{color}"></i>{kind}</span>'
        for kind, color in [*((kind, COLORS[kind]) for kind in kinds), (ROUNDING, ROUNDING_COLOR)]
    )
    groups = ""
    for stage, options in itertools.groupby(result.options, key=lambda option: option.stage):
        rows = "".join(_row(option, result, top) for option in options)
        groups += f'<div class="group"><strong>stage {stage}</strong><div>{rows}</div></div>'
    step = _nice_step(top)
    ticks = "".join(
        f'<span style="left:{100 * i * step / top:.2f}%">{_tick(i * step)}</span>' for i in range(int(top / step) + 1)
    )
    if room is not None and room < top:
        ticks += f'<span class="l" style="left:{100 * room / top:.2f}%">{size(room)}</span>'
    return (
        f'<div class="card"><h2>ZeRO stage x offload x recomputation</h2><div class="legend">{legend}</div>'
        f'<div id="detail"></div>{groups}<div class="axis"><b></b><div><b></b><b></b><div class="t" style="padding:0">{ticks}</div></div></div></div>'
    )


def _tick(nbytes: float) -> str:
    return "0" if not nbytes else f"{nbytes / GIB:g} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:g} MiB"


def _row(option: Option, result: Survey, top: float) -> str:
    found, room = option.estimate, result.limits.device_nbytes
    parts = [(kind, COLORS[kind], found.by_kind[kind]) for kind in KINDS if found.by_kind.get(kind)]
    parts.append((ROUNDING, ROUNDING_COLOR, found.allowance_nbytes))
    bar = "".join(f'<i style="width:{100 * n / top:.3f}%;background:{color}"></i>' for _, color, n in parts)
    figures = [(kind, color, size(n)) for kind, color, n in parts]
    for tier in Tier:
        if tier is not Tier.DEVICE and found.on(tier):
            figures.append((f"on {tier.value}", "var(--soft)", size(found.on(tier))))
    data = html.escape(json.dumps([f"{option.label}: {size(found.peak_nbytes)}, peak in {found.phase}", figures]))
    is_limited = room is not None or result.limits.host_nbytes is not None
    classes = ["row", *(["fits" if result.limits.allow(found) else "over"] if is_limited else [])]
    if option.is_current:
        classes.append("now")
    elif result.advice is not None and result.advice.option is option and result.advice.changes:
        classes.append("best")
    host = (
        f'<div class="host" style="width:{min(100.0, 100 * found.on(Tier.CPU) / top):.2f}%"></div>'
        if found.on(Tier.CPU)
        else ""
    )
    line = f'<b class="limit" style="left:{100 * room / top:.2f}%"></b>' if room is not None and room < top else ""
    return (
        f'<div class="{" ".join(classes)}" tabindex="0" data-d="{data}"><span class="o">{html.escape(option.offload)}</span>'
        f'<span class="r">{option.recompute}</span><div><div class="track"><div class="bar">{bar}</div>{line}</div>{host}</div>'
        f'<span class="v">{size(found.peak_nbytes)}</span></div>'
    )
