"""What the doctor found as one page: where a step's time goes, now and after each change, and what to write into the configuration.

Called by `deepspeed doctor --html`. One file without references to others and without scripts.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

from deepspeed.planner.diagnosis import Diagnosis, Finding
from deepspeed.planner.page import STYLE, bar
from deepspeed.utils.figures import many, nbytes, seconds

NAMES = {
    "compute": "forward and backward of the samples",
    "again": "recomputation",
    "calls": "calls, however few samples",
    "gather": "parameters gathered",
    "reduce": "gradients reduced",
    "update": "update",
    "inside": "between ranks that share layers",
    "bubble": "bubble",
}
"""Parts of a step, in words."""


def page(found: Diagnosis, model: str, config: str, ranks: int) -> str:
    """The page."""
    costs = {NAMES[name]: cost for name, cost in found.parts.costs().items() if cost > 0}
    best = found.findings[0] if found.findings else None
    room = (
        f"of {nbytes(found.room_nbytes)}{'' if found.fits else ': too much'}"
        if found.room_nbytes
        else "on a rank's device"
    )
    tiles = [
        (seconds(found.parts.total), "a step, predicted"),
        (f"{found.samples_s:.3g}", "samples a second"),
        (nbytes(found.nbytes), room),
        (f"+{100 * best.gain:.0f}%", "by one change") if best else ("nothing", "gains more than a tenth"),
    ]
    top = "".join(f"<div class=tile><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in tiles)
    how = (
        "The model's forward and backward were clocked here"
        if found.is_clocked
        else "Forward and backward are operations over rates"
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in found.notes)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>What slows {html.escape(Path(config).name)}</title><style>{STYLE}</style><main><h1>What slows {html.escape(Path(config).name)}</h1>"
        f'<p class="lead">{html.escape(model)} on {many(ranks, "rank")}. {how}.</p><div class="tiles">{top}</div>'
        f'<div class="card"><h2>Where a step goes</h2>{bar(costs, found.parts.total, seconds)}</div>'
        f"{_best(best)}{_table(found)}"
        f"{f'<div class=card><h2>Without effect</h2><ul>{notes}</ul></div>' if notes else ''}</main></html>"
    )


def _best(best: Finding | None) -> str:
    if best is None:
        return (
            '<div class="card"><h2>What to change</h2><p>No single change that fits is predicted to gain more than a tenth; less is not '
            "foreseen with certainty.</p></div>"
        )
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in best.values.items())
    return f'<div class="card"><h2>The one change that helps most: {html.escape(best.what)}</h2><pre>{html.escape(lines)}</pre></div>'


def _table(found: Diagnosis) -> str:
    """Every change: samples a second as a bar, beside those of now."""
    if not found.findings:
        return ""
    most = found.samples_s * (1 + found.findings[0].gain)
    rows = _row("as it is", found.samples_s, most, "", found.nbytes, "var(--soft)")
    for finding in found.findings:
        speed = found.samples_s * (1 + finding.gain)
        rows += _row(finding.what, speed, most, f"+{100 * finding.gain:.0f}%", finding.nbytes, "#3b5bdb")
    head = "<tr><th>change, each by itself<th class=drawn><th class=n>samples/s<th class=n>gain<th class=n>memory</tr>"
    return f'<div class="card"><h2>Changes that gain more than a tenth</h2><table>{head}{rows}</table></div>'


def _row(what: str, speed: float, most: float, gain: str, needed: float, color: str) -> str:
    drawn = f'<div class="bar" style="min-width:110px;margin:0"><i style="width:{100 * speed / most:.1f}%;background:{color}"></i></div>'
    cells = "".join(f"<td class=n>{cell}</td>" for cell in (f"{speed:.3g}", gain, nbytes(needed)))
    return f"<tr><td>{html.escape(what)}</td><td class=drawn>{drawn}</td>{cells}</tr>"
