"""In which order candidates are tried, and when to stop: grid, random, model-based.

Called by the autotuner: `next` names a candidate until it says None. All three see the same candidates, those that are
predicted to fit, and none repeats one or goes where a lesson says that it is of no use.

    grid           as they are listed
    random         shuffled, the same for the same search
    model_based    in turns where the most is to be gained over the best so far, by prediction and doubt, and where the prediction is least
                   certain, which makes all others surer; stops where neither is left

Invariant: a tuner ends: each call uses up a candidate.
"""

from __future__ import annotations

import abc
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from deepspeed.autotuning.lessons import Outcome
from deepspeed.autotuning.resources import value_of
from deepspeed.autotuning.space import Candidate
from deepspeed.autotuning.surrogate import Measurement, Prediction, Surrogate, expected_gain

MIN_GAIN = 0.001
"""Of the best so far: where nothing is expected to gain more, the model-based search ends."""
SURE_STD = 0.05
"""Of the logarithm of seconds: what is predicted so surely needs no trial to be sure of the others."""
MIN_TRIALS = 3
MOST = 0.2
"""Of the candidates that the model-based search tries, where there are many."""
FEW = 6
"""So many may always be tried."""
SLOWER, DOUBTS = 0.2, 2.0
"""A logarithm, and standard deviations, of a trial's seconds beyond its prediction, from which on something else may have had the machine."""
MANY_FAILURES = 3
"""So many failures of a ZeRO stage, and no success, and the stage is left."""


class Tuner(abc.ABC):
    """Base: knows the candidates, their prior, and what came of those that were tried."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        prior: Mapping[str, Mapping[str, float]],
        metric: str,
        *,
        most_micros: int,
    ) -> None:
        self.candidates = list(candidates)
        self.metric = metric
        self.outcomes: dict[str, Outcome] = {}
        self.skipped: dict[str, str] = {}
        """Candidates that are not tried, and why."""
        self._most_micros = most_micros
        self._surrogate = Surrogate(self.candidates, prior)
        self.predictions = self._surrogate.predict({})

    def next(self) -> Candidate | None:
        """The next to try; None: enough."""
        open_ones = self.open_candidates()
        return self._choose(open_ones) if open_ones else None

    @abc.abstractmethod
    def _choose(self, open_ones: list[Candidate]) -> Candidate | None:
        """One of those that may still be tried; None: enough."""

    def tell(self, candidate: Candidate, outcome: Outcome) -> None:
        """What came of a trial."""
        self.outcomes[candidate.name] = outcome
        self._learn(candidate, outcome)
        self.predictions = self._surrogate.predict(
            {name: measurement(done) for name, done in self.outcomes.items() if done.is_measured}
        )

    def is_slower_than_foreseen(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Whether a trial that is to be told took longer than some others and the model explain."""
        if not outcome.is_measured or self.num_measured < MIN_TRIALS:
            return False
        foreseen = self.predictions[candidate.name]
        return math.log(measurement(outcome).step_s / foreseen.step_s) > max(SLOWER, DOUBTS * foreseen.std)

    @property
    def num_measured(self) -> int:
        """Trials with a result."""
        return sum(done.is_measured for done in self.outcomes.values())

    def _learn(self, candidate: Candidate, outcome: Outcome) -> None:
        """Leave out what a lesson says is of no use."""
        if outcome.state == "memory":
            for other in self.candidates:
                if other.rest == candidate.rest and other.micro > candidate.micro:
                    self.skipped.setdefault(other.name, f"{candidate.name} ran out of memory with less")
        if outcome.state in ("failed", "ignored", "short"):
            same = [
                self.outcomes[c.name] for c in self.candidates if c.stage == candidate.stage and c.name in self.outcomes
            ]
            failures = Counter(done.state for done in same)
            if failures["measured"] == 0 and len(same) >= MANY_FAILURES and self._has_other_stages(candidate.stage):
                for other in self.candidates:
                    if other.stage == candidate.stage and other.name not in self.outcomes:
                        self.skipped.setdefault(other.name, f"ZeRO stage {other.stage} failed {len(same)} times")

    def _has_other_stages(self, stage: int) -> bool:
        return any(candidate.stage != stage for candidate in self.candidates)

    def open_candidates(self) -> list[Candidate]:
        """What may still be tried."""
        tried = Counter(
            c.rest for c in self.candidates if c.name in self.outcomes and self.outcomes[c.name].is_measured
        )
        return [
            candidate
            for candidate in self.candidates
            if candidate.name not in self.outcomes
            and candidate.name not in self.skipped
            and tried[candidate.rest] < self._most_micros
        ]

    def why_ended(self) -> str:
        """Why it names no other candidate."""
        return "nothing is left to try"

    def value(self, candidate: Candidate, prediction: Prediction) -> float:
        """The logarithm of a predicted metric, of which more is better."""
        if self.metric == "latency":
            return -math.log(prediction.step_s)
        return math.log(candidate.train_batch / prediction.step_s)

    def best_value(self) -> float | None:
        """The same of the best measured."""
        found = [value_of(self.metric, done.metrics) for done in self.outcomes.values() if done.is_measured]
        values = [value for value in found if value]
        if not values:
            return None
        if self.metric == "latency":
            return -math.log(min(values))
        by_name = {candidate.name: candidate for candidate in self.candidates}
        measured = [
            (by_name[name], done) for name, done in self.outcomes.items() if done.is_measured and name in by_name
        ]
        return max(
            (math.log(c.train_batch / done.metrics["latency"]) for c, done in measured if done.metrics), default=None
        )


class GridTuner(Tuner):
    """As they are listed."""

    def _choose(self, open_ones: list[Candidate]) -> Candidate | None:
        return open_ones[0]


class RandomTuner(Tuner):
    """Shuffled by a fixed seed."""

    def _choose(self, open_ones: list[Candidate]) -> Candidate | None:
        order = [candidate.name for candidate in self.candidates]
        random.Random(0).shuffle(order)
        place = {name: i for i, name in enumerate(order)}
        return min(open_ones, key=lambda candidate: place[candidate.name])


class ModelBasedTuner(Tuner):
    """The largest expected gain and the largest doubt, in turns."""

    def gains(self) -> dict[str, float]:
        """What each open candidate is expected to gain over the best so far, as a share of it."""
        best = self.best_value()
        found = {}
        for candidate in self.open_candidates():
            prediction = self.predictions[candidate.name]
            value = self.value(candidate, prediction)
            # Before anything is measured, the constant that is wrong everywhere does not matter.
            found[candidate.name] = value if best is None else expected_gain(value, prediction.std, best)
        return found

    def _choose(self, open_ones: list[Candidate]) -> Candidate | None:
        num_measured = self.num_measured
        if num_measured >= self.num_at_most:
            return None
        gains = self.gains()
        likeliest = max(open_ones, key=lambda candidate: gains[candidate.name])
        doubtful = max(open_ones, key=self._doubt)
        if num_measured >= MIN_TRIALS and gains[likeliest.name] < MIN_GAIN:
            return doubtful if self._doubt(doubtful) > SURE_STD else None
        return doubtful if num_measured % 2 and self._doubt(doubtful) > SURE_STD else likeliest

    @property
    def num_at_most(self) -> int:
        """How many are measured at most."""
        return max(FEW, int(MOST * len(self.candidates)))

    def why_ended(self) -> str:
        """Why it names no other candidate."""
        if not self.open_candidates():
            return super().why_ended()
        if self.num_measured >= self.num_at_most:
            return f"{self.num_at_most} of {len(self.candidates)} were measured, which is enough to predict the others"
        return "little more is to be gained, and little is in doubt, by prediction"

    def _doubt(self, candidate: Candidate) -> float:
        return self.predictions[candidate.name].std


TUNERS: dict[str, type[Tuner]] = {"gridsearch": GridTuner, "random": RandomTuner, "model_based": ModelBasedTuner}
"""By the section's `tuner_type`."""


def measurement(outcome: Outcome) -> Measurement:
    """A trial's seconds per step and how sure they are, from the spread of its steps."""
    assert outcome.metrics is not None, "only of trials that were measured"
    latency = float(outcome.metrics["latency"])
    steps = [float(step) for step in outcome.metrics.get("step_s", ())]
    if len(steps) < 2:
        return Measurement(latency)
    spread = math.sqrt(sum((step - latency) ** 2 for step in steps) / (len(steps) - 1) / len(steps))
    return Measurement(latency, min(0.5, max(0.01, spread / latency)))
