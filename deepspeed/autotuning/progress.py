"""The search in the terminal: a bar, and a line per trial."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from tqdm import tqdm

from deepspeed.autotuning.lessons import Outcome
from deepspeed.autotuning.resources import value_of
from deepspeed.autotuning.space import Candidate

UNITS = {"throughput": "samples/s", "latency": "s per step", "flops": "TFLOP/s per rank"}


def shown(metric: str, value: float | None) -> str:
    """A metric for people."""
    if value is None:
        return "-"
    return f"{value / 1e12 if metric == 'flops' else value:.4g} {UNITS[metric]}"


def say(text: str) -> None:
    """Print, above a bar that is there. Where nobody reads any more (a pipe's end, a full disk) the search goes on all the same,
    and what the terminal cannot show is escaped."""
    try:
        code = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(code, "backslashreplace").decode(code), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's end would try once more


class Progress:
    """A bar over trials, of which there are at most so many."""

    def __init__(self, num_at_most: int) -> None:
        self._bar = tqdm(total=num_at_most, desc="autotuning", unit="trial", disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def tell(self, candidate: Candidate, outcome: Outcome, metric: str, best: str | None) -> None:
        """A trial is over."""
        found = shown(metric, value_of(metric, outcome.metrics)) if outcome.is_measured else outcome.why
        mark = "  <- best so far" if best == candidate.name else ""
        say(f"autotuning: {candidate.name:28} {found} ({outcome.seconds:.0f} s){mark}")
        self._bar.set_postfix_str(f"best {best}", refresh=False)
        self._bar.update()
