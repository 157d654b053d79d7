"""What a search knows so far, for those who write it down: the summary and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspeed.autotuning.lessons import Outcome
from deepspeed.autotuning.resources import is_better, value_of
from deepspeed.autotuning.space import Candidate
from deepspeed.autotuning.surrogate import Prediction
from deepspeed.config.tuning import AutotuningConfig


@dataclass(frozen=True, kw_only=True)
class Found:
    """A search at one moment."""

    script: str
    num_ranks: int
    section: AutotuningConfig
    results: Path
    candidates: Sequence[Candidate]
    info: Mapping[str, Any]
    """What the first run said (`model_info.json`)."""
    outcomes: Mapping[str, Outcome]
    predictions: Mapping[str, Prediction]
    skipped: Mapping[str, str]
    """Candidates that lessons rule out, and why."""
    seconds: float
    why_ended: str
    command: Sequence[str] = ()
    """That starts the best; empty while there is none."""

    @cached_property
    def by_name(self) -> dict[str, Candidate]:
        """The candidates."""
        return {candidate.name: candidate for candidate in self.candidates}

    @property
    def num_unfit(self) -> int:
        """Candidates that are predicted not to fit."""
        return sum(memory.get("fits") is False for memory in self.info.get("memory", {}).values())

    @property
    def num_refused(self) -> int:
        """Candidates that the engine refuses."""
        return sum(bool(memory.get("refused")) for memory in self.info.get("memory", {}).values())

    def best(self, stage: int | None = None) -> tuple[str | None, float | None]:
        """(name, metric) of the best measured, of all or of a ZeRO stage."""
        return best_of(
            self.section.metric,
            {name: done for name, done in self.outcomes.items() if stage in (None, self.by_name[name].stage)},
        )


def best_of(metric: str, outcomes: Mapping[str, Outcome]) -> tuple[str | None, float | None]:
    """(name, metric) of the best; (None, None) of nothing."""
    found: tuple[str | None, float | None] = None, None
    for name, outcome in outcomes.items():
        value = value_of(metric, outcome.metrics)
        if value is not None and (found[1] is None or is_better(metric, value, found[1])):
            found = name, value
    return found
