"""A profile as a flame chart: one HTML file that needs nothing else, with a bar per module below its parent's. Pure.

Width is the module's share of the operations (or of the time, where it was taken); a click on a bar makes it the whole.
"""

from __future__ import annotations

import html
import json

from deepspeed.profiling.text import number, seconds
from deepspeed.profiling.tree import Profile

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>__TITLE__</title>
<style>
:root { --ink: #1d2430; --soft: #67728a; --line: #dfe4ee; --paper: #fbfcfe; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf4; --soft: #93a0b8; --line: #2d3648; --paper: #131823; } }
body { margin: 0; padding: 28px 32px; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { margin: 0 0 4px; font-size: 22px; font-weight: 650; }
p { margin: 0 0 18px; color: var(--soft); }
button { font: inherit; padding: 4px 12px; border: 1px solid var(--line); background: none; color: inherit; border-radius: 6px; }
button[aria-pressed=true] { background: #3157d6; border-color: #3157d6; color: #fff; }
#chart { position: relative; margin-top: 14px; border-top: 1px solid var(--line); }
.bar { position: absolute; height: 25px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; box-sizing: border-box;
  border: 1px solid var(--paper); border-radius: 4px; padding: 2px 6px; font-size: 12px; color: #10131a; cursor: pointer; }
.bar:hover { filter: brightness(1.1); outline: 2px solid var(--ink); z-index: 1; }
#tell { position: sticky; bottom: 0; padding: 12px 0; min-height: 22px; background: var(--paper); font-variant-numeric: tabular-nums; }
</style></head><body>
<h1>__TITLE__</h1><p>__SUMMARY__</p>
<div role="group" aria-label="Width">__BUTTONS__</div>
<div id="chart"></div><div id="tell">Point at a bar; click it to make it the whole; click the top bar to go back.</div>
<script>
const root = __DATA__;
const measures = {
  flops: m => m.flops.forward + m.flops.backward + m.flops.recompute,
  time: m => m.forward_s + m.backward_s,
  params: m => m.params };
let measure = "flops", top = root;
const parents = new Map();
(function link(m) { m.children.forEach(c => { parents.set(c, m); link(c); }); })(root);
const hues = {}; let used = 0;
const hue = kind => { const k = kind.split("(")[0]; if (!(k in hues)) hues[k] = (used++ * 137.5 + 205) % 360; return hues[k]; };
const short = (v, u) => { for (const p of ["", "K", "M", "G", "T", "P"]) { if (v < 1000) return +v.toPrecision(4) + " " + p + u; v /= 1000; } };
const time = s => s >= 1 ? s.toPrecision(3) + " s" : s >= 1e-3 ? (s * 1e3).toPrecision(3) + " ms" : (s * 1e6).toPrecision(3) + " us";
function draw() {
  const chart = document.getElementById("chart"); chart.replaceChildren();
  const value = measures[measure]; let depth = 0;
  const bar = (m, left, width, row) => {
    if (width < 0.0008) return;
    const b = document.createElement("div"); b.className = "bar"; b.textContent = m.name + "  " + m.kind.split("(")[0];
    b.style.cssText = `left:${left * 100}%;width:${width * 100}%;top:${row * 26 + 10}px;background:hsl(${hue(m.kind)} 62% ${74 - row * 1.5}%)`;
    b.title = m.kind;
    b.onmouseenter = () => document.getElementById("tell").textContent =
      `${m.name}: ${m.kind} | ${short(m.params, "params")} | forward ${short(m.flops.forward, "FLOPs")}, backward ${short(m.flops.backward, "FLOPs")}` +
      (m.flops.recompute ? `, repeated ${short(m.flops.recompute, "FLOPs")}` : "") +
      (m.forward_s ? ` | ${time(m.forward_s)} forward, ${time(m.backward_s)} backward` : "") + ` | ${m.calls} calls`;
    b.onclick = () => { top = m === top ? (parents.get(m) || root) : m; draw(); };
    chart.append(b); depth = Math.max(depth, row + 1);
    const sum = m.children.reduce((s, c) => s + value(c), 0), scale = width / Math.max(value(m), sum, 1e-30);
    let at = left; for (const c of m.children) { const w = value(c) * scale; bar(c, at, w, row + 1); at += w; }
  };
  bar(top, 0, 1, 0); chart.style.height = depth * 26 + 20 + "px";
  document.querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", b.dataset.by === measure));
}
document.querySelectorAll("button").forEach(b => b.onclick = () => { measure = b.dataset.by; draw(); });
draw();
</script></body></html>
"""


def flame_chart(profile: Profile) -> str:
    """The page."""
    root = profile.root
    parts = [f"{number(root.all_params)} parameters", f"{number(profile.step_flops, 'FLOPs')} per step"]
    parts += [f"forward {seconds(root.forward_s)}"] if root.forward_s else []
    parts += [f"utilisation {profile.utilisation:.0%}"] if profile.utilisation is not None else []
    names = {"flops": "Operations", "params": "Parameters"} | ({"time": "Time"} if root.forward_s else {})
    buttons = " ".join(f'<button data-by="{key}">{name}</button>' for key, name in names.items())
    data = json.dumps(root.as_dict()).replace("<", "\\u003c")
    title = html.escape(profile.title or f"Flops profile of {root.name}")
    page = _PAGE.replace("__TITLE__", title).replace("__SUMMARY__", html.escape(" · ".join(parts)))
    return page.replace("__BUTTONS__", buttons).replace("__DATA__", data)
