"""The search as one page: every configuration, what was predicted of it, what was measured, and why it was or was not tried.

Written after every trial, so that it can be watched. One file without references to others and without scripts.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from deepspeed.autotuning.found import Found
from deepspeed.autotuning.progress import UNITS, shown
from deepspeed.autotuning.resources import is_better, value_of
from deepspeed.autotuning.space import Candidate
from deepspeed.memory.html import size
from deepspeed.utils.figures import count

_STYLE = """
:root{--paper:#fbfbfd;--card:#fff;--ink:#1d2333;--soft:#667085;--line:#e4e7ee;--track:#f1f3f8;--good:#2b8a3e;--goodbg:#ebfbee;
--bad:#c92a2a;--bar:#4dabf7;--best:#37b24d;--guess:#868e96}
@media(prefers-color-scheme:dark){:root{--paper:#12151d;--card:#1a1f2b;--ink:#e7eaf2;--soft:#98a2b8;--line:#2b3242;--track:#232a39;
--good:#69db7c;--goodbg:#16261b;--bad:#ff8787;--bar:#339af0;--best:#2f9e44;--guess:#adb5bd}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 28px 60px}h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin:0 0 10px;font-weight:600}
.lead{color:var(--soft);margin:0 0 24px}.card{background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:20px 22px;margin-bottom:18px;overflow-x:auto}.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-bottom:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}
.tile b{display:block;font-size:22px;letter-spacing:-.02em;font-weight:650;overflow-wrap:anywhere}.tile span{color:var(--soft);font-size:12.5px}
.advice{border-left:4px solid var(--good);background:var(--goodbg)}pre{margin:10px 0 0;font:12.5px/1.55 ui-monospace,"SF Mono",Menlo,
"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}table{border-collapse:collapse;width:100%;font-size:12.5px}
td,th{padding:4px 8px;border-top:1px solid var(--line);text-align:left;vertical-align:middle}th{color:var(--soft);font-weight:600;border:0}
td.n,th.n{text-align:right;white-space:nowrap}table.few{width:auto}.track{position:relative;height:16px;min-width:180px;background:var(--track);border-radius:4px}
.track i{position:absolute;left:0;top:0;bottom:0;border-radius:4px;background:var(--bar)}.track i.best{background:var(--best)}
.track u{position:absolute;top:6px;height:4px;background:var(--guess);border-radius:2px;opacity:.75}
.track s{position:absolute;top:2px;bottom:2px;width:2px;background:var(--ink)}.bad{color:var(--bad)}.soft{color:var(--soft)}
.best td{font-weight:650}.key{color:var(--soft);font-size:12.5px;margin:0 0 10px}footer{color:var(--soft);font-size:12px;margin-top:22px}
details summary{cursor:pointer}details pre{color:var(--ink)}
@media(max-width:760px){main{padding:24px 14px 40px}.card{padding:16px}.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile{padding:12px 14px}.tile b{font-size:17px}
table.all,table.all tbody{display:block}table.all tr{display:flex;flex-wrap:wrap;gap:0 14px;padding:9px 0;
border-top:1px solid var(--line)}table.all tr.head,table.all td:empty{display:none}table.all td{border:0;padding:2px 0;text-align:left}
table.all td.wide{flex:1 0 100%;order:1;overflow-wrap:anywhere}table.all td:first-child{order:-1}table.all td.n:before{content:attr(data-of) " ";color:var(--soft);font-weight:400}}
"""


class Row(NamedTuple):
    """One configuration."""

    candidate: Candidate
    rank: int
    """Tried ones first, then those that may be, then those that do not fit."""
    order: float
    """Within these: the best first."""
    measured: float | None
    predicted: tuple[float, float, float] | None
    """Low, middle, high."""
    nbytes: int | None
    text: str
    is_bad: bool = False
    log: str = ""
    """The end of what it wrote, of a trial that gave nothing."""


def rows(search: Found) -> list[Row]:
    """Every configuration, the best measured first."""
    memory, made = search.info.get("memory", {}), []
    for candidate in search.candidates:
        made.append(_row(search, candidate, memory.get(candidate.name, {})))
    return sorted(made, key=lambda row: (row.rank, row.order))


def _row(search: Found, candidate: Candidate, memory: dict[str, object]) -> Row:
    metric, outcome = search.section.metric, search.outcomes.get(candidate.name)
    predicted = _predicted(search, candidate)
    nbytes = memory.get("nbytes")
    nbytes = int(nbytes) if isinstance(nbytes, (int, float)) else None
    sign = 1 if metric == "latency" else -1
    if outcome is not None:
        value = value_of(metric, outcome.metrics)
        text = outcome.why
        if value is not None:
            text = f"measured in {outcome.seconds:.0f} s" + (f"; {outcome.why}" if outcome.why else "")
        order = sign * value if value is not None else math.inf
        return Row(candidate, 0, order, value, predicted, nbytes, text, value is None, outcome.log)
    if predicted is None:
        why = str(memory.get("why") or "does not fit" if memory else "its memory could not be predicted")
        because = "the engine refuses it: " if memory.get("refused") else ""
        return Row(candidate, 2, candidate.micro, None, None, nbytes, f"not tried: {because}{why}", True)
    skipped = search.skipped.get(candidate.name)
    text = f"not tried: {skipped}" if skipped else _why_not_tried(search, candidate, predicted)
    return Row(candidate, 1, sign * predicted[1], None, predicted, nbytes, text)


def _why_not_tried(search: Found, candidate: Candidate, predicted: tuple[float, float, float]) -> str:
    _, best = search.best()
    high = predicted[0] if search.section.metric == "latency" else predicted[2]
    if best is not None and not is_better(search.section.metric, high, best):
        return "not tried: predicted to be slower"
    return f"not tried: {search.why_ended}" if search.why_ended else "not tried yet"


def _predicted(search: Found, candidate: Candidate) -> tuple[float, float, float] | None:
    """The metric as it is predicted now, with one standard deviation to each side."""
    prediction = search.predictions.get(candidate.name)
    if prediction is None:
        return None
    spread = math.exp(min(prediction.std, 1.5))
    seconds = (prediction.step_s / spread, prediction.step_s, prediction.step_s * spread)
    metric = search.section.metric
    if metric == "latency":
        return seconds
    per_step = float(candidate.train_batch)
    if metric == "flops":
        per_step = float(search.info.get("flops") or 0.0) * candidate.micro * candidate.accumulation
    return per_step / seconds[2], per_step / seconds[1], per_step / seconds[0]


def page(search: Found, *, is_finished: bool) -> str:
    """The page."""
    name, value = search.best()
    metric = search.section.metric
    listed = rows(search)
    script = html.escape(search.script.rpartition("/")[2])
    state = html.escape(search.why_ended) if is_finished else "under way"
    none = "none" if is_finished else "none yet"
    tiles = [
        (html.escape(name or none), "the best so far" if not is_finished else "the best"),
        (html.escape(shown(metric, value)), f"its {metric}"),
        (
            f"{len(search.outcomes)} of {len(search.candidates)}",
            f"tried; {search.num_unfit or 'none'} predicted not to fit"
            + (f", {search.num_refused} refused by the engine" if search.num_refused else ""),
        ),
        (f"{search.seconds:.0f} s", state),
    ]
    top = "".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Autotuning {script}</title><style>{_STYLE}</style><main><h1>Autotuning {script}</h1>"
        f'<p class="lead">{_lead(search)}</p><div class="tiles">{top}</div>{_advice(search, name)}'
        f'<div class="card"><h2>Configurations</h2><p class="key">Bar: measured. Line and tick: predicted from all trials, with its doubt, in '
        f"{UNITS[metric]}. Memory: the predicted peak of a rank.</p>{_table(search, listed, name)}</div>{_machine(search)}"
        "<footer>Predictions are those after the last trial. Every trial's configuration, command and output is in a folder of "
        "its name beside this page.</footer></main></html>"
    )


def _lead(search: Found) -> str:
    info = search.info
    room = f", {size(info['device_nbytes'])} for each" if info.get("device_nbytes") else ""
    return html.escape(
        f"{search.script}: {info.get('model', 'a model')} with {count(info.get('num_params', 0))} parameters in {info.get('dtype')} on "
        f"{search.num_ranks} {info.get('device')} rank{'s' if search.num_ranks > 1 else ''}{room}."
    )


def _advice(search: Found, name: str | None) -> str:
    if name is None:
        return ""
    changes = "\n".join(f'"{key}": {json.dumps(value)}' for key, value in search.by_name[name].overrides().items())
    return f'<div class="card advice"><h2>What the best one sets</h2><pre>{html.escape(changes)}</pre></div>'


def _table(search: Found, listed: Sequence[Row], best: str | None) -> str:
    # A prediction that was never corrected may be wrong by a factor; it must not squeeze what was measured.
    most = max((row.measured for row in listed if row.measured is not None), default=math.inf)
    guessed = max((row.predicted[1] for row in listed if row.predicted), default=1.0)
    top = 1.15 * (max(most, min(guessed, 1.5 * most)) if most < math.inf else guessed)
    head = "<tr class=head><th>configuration<th class=n>predicted<th class=n>measured<th><th class=n>memory<th>what came of it</tr>"
    return f"<table class=all>{head}{''.join(_cells(search, row, top, best) for row in listed)}</table>"


def _cells(search: Found, row: Row, top: float, best: str | None) -> str:
    def left(value: float) -> float:
        return min(100.0, max(0.0, 100 * value / top))

    scale = 1e12 if search.section.metric == "flops" else 1
    bar = ""
    is_best = row.candidate.name == best
    if row.measured is not None:
        bar += f'<i class="{"best" if is_best else ""}" style="width:{left(row.measured):.2f}%"></i>'
    if row.predicted:
        low, middle, high = map(left, row.predicted)
        bar += f'<u style="left:{low:.2f}%;width:{max(0.5, high - low):.2f}%"></u><s style="left:{middle:.2f}%"></s>'
    figures = {"predicted": row.predicted[1] if row.predicted else None, "measured": row.measured}
    shown_figures = "".join(
        f'<td class="n" data-of="{of}">{"" if value is None else f"{value / scale:.4g}"}</td>'
        for of, value in figures.items()
    )
    kind = "bad" if row.is_bad else "soft" if row.measured is None else ""
    return (
        f'<tr class="{"best" if is_best else ""}"><td class="wide">{html.escape(row.candidate.name)}</td>{shown_figures}'
        f'<td class="wide"><div class="track">{bar}</div></td><td class="n" data-of="memory">{size(row.nbytes) if row.nbytes else ""}</td>'
        f'<td class="wide {kind}">{html.escape(row.text)}{_log(row.log)}</td></tr>'
    )


def _log(log: str) -> str:
    return f"<details><summary>its last words</summary><pre>{html.escape(log)}</pre></details>" if log else ""


def _machine(search: Found) -> str:
    rates = search.info.get("rates", {})
    words = {
        "matmul_flops": ("matrix products", 1e9, "GFLOP/s"),
        "copy_nbytes_s": ("copies", 1e9, "GB/s"),
        "wire_nbytes_s": ("wire, received", 1e9, "GB/s"),
        "wire_latency_s": ("a collective of nothing", 1e-6, "us"),
        "message_s": ("one more message of a step", 1e-6, "us"),
        "unshard_s": ("a gather where a module needs it", 1e-6, "us"),
        "shared_message_s": ("a sum that layers wait for", 1e-6, "us"),
        "update_s": ("an update, whatever its bytes", 1e-6, "us"),
        "host_nbytes_s": ("device to host", 1e9, "GB/s"),
        "disk_read_nbytes_s": ("disk, read", 1e9, "GB/s"),
        "disk_write_nbytes_s": ("disk, written", 1e9, "GB/s"),
    }
    cells = "".join(
        f"<tr><td>{what}</td><td class=n>{rates[key] / unit:,.1f} {name}</td></tr>"
        for key, (what, unit, name) in words.items()
        if rates.get(key)
    )
    unknown = search.info.get("unknown")
    note = f'<p class="bad">Memory could not be predicted: {html.escape(unknown)}</p>' if unknown else ""
    return f'<div class="card"><h2>What this machine did, all ranks at once</h2>{note}<table class="few">{cells}</table></div>'
