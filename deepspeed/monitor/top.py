"""`deepspeed top RUN_DIR`: a run's progress in a terminal, live, from its record.

Reads what was appended to `run.jsonl` since the last look, so that it costs the run nothing. No torch.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deepspeed.monitor.line import GB, short
from deepspeed.monitor.run_record import RunRecord, RunRecordError, find_records

BLOCKS = " ▁▂▃▄▅▆▇█"
RECENT = 20
"""Steps over which rates and shares are averaged."""


class Tail:
    """The record in a growing file, its lines taken in once complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_anew()

    def _start_anew(self) -> None:
        self.record = RunRecord(self.path.parent.resolve().name)
        self._offset = 0
        self._rest = b""

    def read(self) -> RunRecord:
        """The record so far. A file that became shorter is read anew."""
        if self.path.stat().st_size < self._offset:
            self._start_anew()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *complete, self._rest = (self._rest + data).split(b"\n")
        self.record.add(line.decode("utf-8", "replace") for line in complete)
        return self.record


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks, at most `width` of them: means of stretches where there are more. Blank where not finite."""
    size = max(1, -(-len(values) // width))
    means = [sum(chunk) / len(chunk) for i in range(0, len(values), size) if (chunk := values[i : i + size])]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[1 + round((value - low) * scale)] if math.isfinite(value) else " " for value in means)


def share_bar(share: float, width: int = 24) -> Text:
    """A bar of `width` cells, filled to `share`."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return Text("█" * filled, style="cyan") + Text("░" * (width - filled), style="dim")


def screen(record: RunRecord, width: int, now: float) -> RenderableType:
    """What is shown of a record."""
    start, steps = record.start, record.steps
    if not steps:
        return Panel(Text("no step yet"), title=record.name)
    last, recent = steps[-1], steps[-RECENT:]
    wall_s = sum(step.get("step_s", 0.0) for step in recent) or 1.0
    head = (
        f"{start.get('model', '?')}, {short(start.get('params', 0))} parameters, ZeRO-{start.get('zero_stage', '?')} over "
        f"{start.get('ranks', '?')} ranks, {start.get('dtype', '')}"
        + (f", {start['divided']}" if start.get("divided") else "")
    )
    facts = Table.grid(padding=(0, 3))
    facts.add_row("step", f"{last['step']}", "last step ended", f"{_age(now - last.get('time', now))} ago")
    facts.add_row("loss", _text(last.get("loss"), "{:.4f}"), "gradient norm", _text(last.get("grad_norm"), "{:.4g}"))
    facts.add_row(
        "learning rate", _text((last.get("lr") or [None])[0], "{:.3g}"), "skipped", str(last.get("skipped", 0))
    )
    tokens, samples, flops = (sum(s.get(key) or 0 for s in recent) for key in ("step_tokens", "step_samples", "flops"))
    rate = ("tokens/s", short(tokens / wall_s)) if tokens else ("samples/s", short(samples / wall_s))
    peak = last.get("peak_flops")
    mfu = f", MFU {flops / wall_s / peak:.1%}" if peak else ""
    facts.add_row(*rate, "TFLOP/s per rank", f"{flops / wall_s / 1e12:.3g}{mfu}" if flops else "-")
    memory = ", ".join(f"{tier} {n / GB:.3g} GB" for tier, n in last.get("memory", {}).items())
    bars = Table.grid(padding=(0, 2))
    for name, key in (("forward", "forward_s"), ("backward", "backward_s"), ("update", "update_s")):
        _add_share(bars, name, recent, key, wall_s)
    _add_share(bars, "waits: communication", recent, "wait_comm_s", wall_s)
    _add_share(bars, "waits: offload", recent, "wait_offload_s", wall_s)
    losses = [value for _, value in record.series("loss")]
    curve = Text(sparkline(losses, max(10, width - 16)), style="green")
    body = Table.grid()
    for part in (Text(head, style="dim"), "", facts, "", bars, "", f"memory: {memory}", "loss", curve):
        body.add_row(part)
    return Panel(body, title=f"deepspeed top: {record.name}", border_style="dim", width=width)


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _text(value: Any, form: str) -> str:
    return form.format(float(value)) if value is not None else "-"


def _add_share(bars: Table, name: str, steps: Sequence[dict[str, Any]], key: str, wall_s: float) -> None:
    seconds = sum(step.get(key) or 0.0 for step in steps)
    bars.add_row(name, share_bar(seconds / wall_s), f"{seconds / wall_s:.0%}", f"{1e3 * seconds / len(steps):.1f} ms")


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="deepspeed top", description="Show a run's progress, live. Ctrl-C ends it.")
    parser.add_argument("run_dir", type=Path, help="a run directory, or a folder of them, of which the latest is shown")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (%(default)s)")
    parser.add_argument(
        "--once", action="store_true", help="print once and end, as it does where the output is no terminal"
    )
    args = parser.parse_args(arguments)
    try:
        tail = Tail(max(find_records(args.run_dir), key=lambda path: path.stat().st_mtime))
        return _show(tail, args.interval, args.once)
    except (RunRecordError, OSError) as error:
        print(f"deepspeed top: {error}", file=sys.stderr)
        return 2


def _show(tail: Tail, interval_s: float, once: bool) -> int:
    console = Console()

    def look() -> RenderableType:
        return screen(tail.read(), min(console.width, 110), time.time())

    if once or not console.is_terminal:
        console.print(look())
        return 0
    try:
        with Live(look(), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return 0
