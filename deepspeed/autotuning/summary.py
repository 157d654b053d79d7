"""`summary.txt`: a row per ZeRO stage and one for all, how long it took, and what to start now. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from deepspeed.autotuning.found import Found
from deepspeed.autotuning.progress import shown

COLUMNS = ("tuning_space", "num_experiments", "best_metric_val", "best_exp_name")


def text(search: Found) -> str:
    """The table, and what came of trials that gave nothing."""
    stages = sorted({search.by_name[name].stage for name in search.outcomes})
    rows = [*(_row(search, f"z{stage}", stage) for stage in stages), _row(search, "global", None)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [*(_line(cells, widths) for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)), ""]
    failed = [(name, done) for name, done in search.outcomes.items() if not done.is_measured]
    if failed:
        lines += ["Trials without a result:", *(f"  {name}: {done.why}" for name, done in failed), ""]
    if search.info.get("unknown"):
        lines.append(f"Memory could not be predicted ({search.info['unknown']}); larger micro-batches were tried.")
    best, value = search.best()
    return "\n".join(
        [
            *lines,
            f"{len(search.candidates)} configurations, {search.num_unfit} predicted not to fit and not tried, "
            + (f"{search.num_refused} refused by the engine, " if search.num_refused else "")
            + f"{len(search.outcomes)} tried; {search.why_ended}.",
            f"Tuning took {search.seconds:.0f} seconds.",
            f"The best is {best}, {shown(search.section.metric, value)}. Start it with:",
            f"  {shell(search.command)}",
            f"What was tried and why: {search.results / 'report.html'}",
            "",
        ]
    )


def _row(search: Found, label: str, stage: int | None) -> list[str]:
    best, value = search.best(stage)
    count = sum(stage in (None, search.by_name[name].stage) for name in search.outcomes)
    return [label, str(count), "-" if value is None else f"{value:.6g}", best or "-"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"


def shell(command: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(command)
