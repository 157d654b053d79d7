"""`deepspeed report RUN_DIR...`: the records of runs as one HTML page that needs nothing else, runs overlaid.

Reads `run.jsonl` (see `run_record.py`), thins every series to what a screen can show, and puts the numbers into the page
`report.html`, which draws them. Pure but for reading and writing files: no torch.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from deepspeed.monitor.run_record import RunRecord, RunRecordError, read_records

MAX_POINTS = 600
"""Points of one line; more cannot be told apart."""
MAX_STACKED = 120
"""Of areas on top of each other, which only show anything where they are calm."""

_SERIES = ("loss", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "tflops")
_OF_EXPERTS = ("max_over_mean", "mean_max_over_mean", "dropped", "auxiliary")
_TIERS = {"device": "device", "device_peak": "device, peak", "cpu": "cpu", "nvme": "nvme"}


def thin(points: Sequence[tuple[int, float]], max_points: int = MAX_POINTS) -> dict[str, list[Any]]:
    """{"x": steps, "y": values} of a series; where there are too many, means of equal stretches, with low and high.

    Values that are not finite (the norm of a step that overflowed) count for nothing; a stretch of them alone is None.
    """
    size = -(-len(points) // max_points)
    chunks = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    found: dict[str, list[Any]] = {
        "x": [chunk[-1][0] for chunk in chunks],
    }
    finite = [[value for _, value in chunk if math.isfinite(value)] for chunk in chunks]
    found["y"] = [_json(statistics.fmean(values)) if values else None for values in finite]
    if size > 1:
        found["low"] = [_json(min(values)) if values else None for values in finite]
        found["high"] = [_json(max(values)) if values else None for values in finite]
    return found


def _json(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _shares(record: RunRecord, key: str) -> list[tuple[int, float]]:
    return [(s["step"], s[key] / s["step_s"]) for s in record.steps if s.get("step_s") and s.get(key) is not None]


def _step_times(record: RunRecord) -> list[dict[str, Any]]:
    """Forward, backward, update, and the rest of the wall clock, on the same steps."""
    names = {"forward_s": "forward", "backward_s": "backward", "update_s": "update"}
    steps = [step for step in record.steps if step.get("step_s") and step.get("forward_s") is not None]
    found = [(name, [(step["step"], step.get(key) or 0.0) for step in steps]) for key, name in names.items()]
    rest = [(s["step"], max(0.0, s["step_s"] - sum(s.get(key) or 0.0 for key in names))) for s in steps]
    return [{"name": name, **thin(points, MAX_STACKED)} for name, points in [*found, ("data and the script", rest)]]


def page_data(record: RunRecord) -> dict[str, Any]:
    """What the page needs of one run."""
    series = {key: thin(points) for key in _SERIES if (points := record.series(key))}
    series |= {f"expert_{key}": thin(record.series(f"experts.{key}")) for key in _OF_EXPERTS}
    series["lr"] = thin([(step["step"], step["lr"][0]) for step in record.steps if step.get("lr")])
    series["wait_comm"] = thin(_shares(record, "wait_comm_s"))
    series["wait_offload"] = thin(_shares(record, "wait_offload_s"))
    tiers = [(name, record.series(f"memory.{tier}")) for tier, name in _TIERS.items()]
    ops = sorted({op for step in record.steps for op in step.get("comm_nbytes", {})})
    sent = [
        (op.removeprefix("zero."), [(s["step"], s.get("comm_nbytes", {}).get(op, 0)) for s in record.steps])
        for op in ops
    ]
    lines = [
        {"op": op, **line} for op, sizes in ((record.comm or {}).get("ops") or {}).items() for line in sizes.values()
    ]
    return {
        "name": record.name,
        "start": record.start,
        "summary": summarize(record),
        "series": {key: value for key, value in series.items() if value["x"]},
        "stacks": {
            "time": _step_times(record),
            "memory": [{"name": name, **thin(points)} for name, points in tiers if points],
            "comm": [{"name": op, **thin(points)} for op, points in sent],
        },
        "comm": lines,
        "hidden": (record.comm or {}).get("hidden"),
        "experts": record.experts,
        "pipeline": record.pipeline,
    }


def summarize(record: RunRecord) -> dict[str, Any]:
    """The run in a few numbers. Rates are medians without the first tenth of the steps, which warms up."""
    later = RunRecord(record.name, steps=record.steps[min(len(record.steps) - 1, max(1, len(record.steps) // 10)) :])

    def median(points: Sequence[tuple[int, float]]) -> float | None:
        return _json(statistics.median(value for _, value in points)) if points else None

    losses = [value for _, value in record.series("loss")]
    peaks = [value for _, value in record.series("memory.device_peak")]
    return {
        "steps": record.steps[-1]["step"] if record.steps else 0,
        "loss": _json(statistics.fmean(losses[-10:])) if losses else None,
        "is_lost": bool(losses) and not math.isfinite(losses[-1]),
        **{key: median(later.series(key)) for key in ("tokens_per_s", "samples_per_s", "tflops", "mfu", "step_s")},
        "peak_nbytes": max(peaks) if peaks else None,
        "wait_comm": median(_shares(later, "wait_comm_s")),
        "wait_offload": median(_shares(later, "wait_offload_s")),
    }


def page(records: Sequence[RunRecord]) -> str:
    """The HTML page."""
    template = resources.files("deepspeed.monitor").joinpath("report.html").read_text(encoding="utf-8")
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    data = json.dumps(_unique_names([page_data(record) for record in records]), separators=(",", ":"))
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", data.replace("<", "\\u003c"))


def _unique_names(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    for run in runs:
        seen[run["name"]] = seen.get(run["name"], 0) + 1
        if seen[run["name"]] > 1:
            run["name"] += f" ({seen[run['name']]})"
    return runs


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of all runs in some folders; returns its path. Raises RunRecordError, and OSError."""
    records = [record for folder in folders for record in read_records(folder)]
    if not any(record.steps for record in records):
        raise RunRecordError(
            f"{', '.join(map(str, folders))}: no step is recorded yet.\n  Try again after the first one."
        )
    path = output or folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page([record for record in records if record.steps]), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="deepspeed report", description="Make one HTML page of the records of runs.")
    parser.add_argument(
        "run_dir", type=Path, nargs="+", help="a run directory, or a folder of them; several are overlaid"
    )
    parser.add_argument("-o", "--output", type=Path, help="the page; default: report.html in the first RUN_DIR")
    args = parser.parse_args(arguments)
    try:
        print(write_report(args.run_dir, args.output))
    except (RunRecordError, OSError) as error:
        print(f"deepspeed report: {error}", file=sys.stderr)
        return 2
    return 0
