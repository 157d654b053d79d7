"""Seconds of untried configurations: the cost model, corrected by what trials measured. Pure.

Called by the model-based tuner. The cost model (`planner.cost`) has a step's seconds as a sum of parts: samples, calls, messages, the
update. Each part may be wrong by a factor of its own, the same in every configuration, which few trials tell, since configurations
differ in what their steps are made of. What no factor explains is a Gaussian process over the logarithm: a smooth error along each
feature, and a smaller one of all together. Near what was measured the prediction is the measurement; far from it, it is the model
with its parts corrected, with the doubt that belongs to it.

The logarithm of a sum is not linear in the factors' logarithms: it is taken for linear where the factors are likeliest so far, some times over.

Invariant: without trials the prediction is the cost model's, and a trial's own prediction is within its noise of what it measured.
Sources: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 2.7 (a prior mean, explicit basis functions)
and algorithm 2.1; Bell and Cathey, The Iterated Kalman Filter Update as a Gauss-Newton Method (IEEE TAC 38, 1993).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deepspeed.autotuning.space import Candidate
from deepspeed.config import load_config
from deepspeed.config.dotted import leaves

CONSTANT_STD = 1.5
"""Of the logarithm: the cost model may be wrong by a factor of four everywhere."""
PART_STD = 0.6
"""And in each part by a factor of two beside the others."""


class Smooth(NamedTuple):
    """How wrong the model may be besides its parts, as standard deviations of the logarithm."""

    own: float
    """Along each feature by itself, whatever the parts."""
    trend: float
    """Per unit of a feature, so that an error that grows goes on growing."""


EXPLAINED, OTHER = Smooth(0.05, 0.0), Smooth(0.2, 0.05)
"""A machine that the parts explain, and one that they do not."""
CERTAINTY = 3.0
"""The first holds where what was measured is twenty times (a logarithm of 3) as likely under it: who takes it too early looks too little around."""
JOINT_STD = 0.05
"""And by so much for what features do together."""
NOISE_STD = 0.02
NUM_ROUNDS = 6
"""Of taking the logarithm for linear; the factors do not move any more after three or four."""


class Prediction(NamedTuple):
    """Seconds of a step, and how far off the logarithm may be (one standard deviation)."""

    step_s: float
    std: float


@dataclass(frozen=True)
class Measurement:
    """What a trial found: seconds, and their relative noise."""

    step_s: float
    noise: float = NOISE_STD


def features(candidate: Candidate, keys: Sequence[str] = ()) -> list[float]:
    """Columns of a candidate: at a distance of 1 two values are related, from 2 on hardly. `keys`: the other keys, in order."""
    columns = [math.log2(candidate.micro) / 1.5, math.log2(candidate.accumulation) / 1.5, 1.5 * candidate.stage]
    defaults = _defaults()
    return columns + [_column(candidate.values.get(key, defaults.get(key))) for key in keys]


@functools.cache
def _defaults() -> dict[str, Any]:
    """What holds where a candidate does not say: one that says so is no other configuration."""
    return dict(leaves(load_config({}).model_dump()))


_WORDS = {"selective": 0.7, "full": 2.0, "cpu": 2.0, "nvme": 4.0}


def _column(value: Any) -> float:
    if isinstance(value, bool):
        return 2.0 * value
    if isinstance(value, (int, float)):
        return math.log2(1 + value) / 4 if value > 4096 else 1.5 * math.log2(1 + value)
    return _WORDS.get(str(value), 0.0)


class _Fit(NamedTuple):
    """Logarithms [candidates], their variance, and the log-likelihood of what was measured, less a constant."""

    mean: np.ndarray
    variance: np.ndarray
    evidence: float


class Surrogate:
    """Predictions for some candidates from a prior, seconds by part of a step, and measurements so far."""

    def __init__(self, candidates: Sequence[Candidate], prior: Mapping[str, Mapping[str, float]]) -> None:
        self._names = [candidate.name for candidate in candidates]
        keys = sorted({key for candidate in candidates for key in candidate.values})
        self._x = np.array([features(candidate, keys) for candidate in candidates])
        self._x = self._x[:, np.ptp(self._x, axis=0) > 0] if len(self._x) else self._x
        parts = sorted({part for name in self._names for part in prior[name]})
        self._parts = np.array([[prior[name].get(part, 0.0) for part in parts] for name in self._names])
        """[candidates, parts], in seconds."""
        self._index = {name: i for i, name in enumerate(self._names)}

    def predict(self, measured: Mapping[str, Measurement]) -> dict[str, Prediction]:
        """For every candidate."""
        known = [self._index[name] for name in measured if name in self._index]
        found = [measured[self._names[i]] for i in known]
        errors = np.log([m.step_s for m in found])
        noise = np.diag([max(m.noise, NOISE_STD / 2) ** 2 for m in found])
        explained, other = (self._fit(known, errors, noise, kind) for kind in (EXPLAINED, OTHER))
        best = explained if explained.evidence > other.evidence + CERTAINTY else other
        return self._as_predictions(best.mean, best.variance)

    def _fit(self, known: list[int], errors: np.ndarray, noise: np.ndarray, kind: Smooth) -> _Fit:
        """To logarithms of seconds, of the candidates with these numbers; `noise` [known, known] is their variance."""
        smooth = _kernel(self._x, self._x[known], kind)
        factors = np.zeros(self._parts.shape[1])  # their logarithms
        for _ in range(NUM_ROUNDS):
            costs = self._parts * np.exp(factors)
            total = costs.sum(1)
            shares = costs / total[:, None]
            mean = np.log(total) - shares @ factors
            across = smooth + PART_STD**2 * shares @ shares[known].T
            within = np.linalg.cholesky(across[known] + noise)
            weights = np.linalg.solve(within.T, np.linalg.solve(within, errors - mean[known]))
            factors = PART_STD**2 * shares[known].T @ weights
        spread = np.linalg.solve(within, across.T)
        variance = np.maximum(self._doubt(shares, kind) - (spread**2).sum(0), 1e-8)
        evidence = -0.5 * (errors - mean[known]) @ weights - np.log(np.diag(within)).sum()
        return _Fit(mean + across @ weights, variance, float(evidence))

    def _doubt(self, shares: np.ndarray, kind: Smooth) -> np.ndarray:
        """The variance of each before anything is measured."""
        own = CONSTANT_STD**2 + JOINT_STD**2 + self._x.shape[1] * kind.own**2
        return own + kind.trend**2 * (self._x**2).sum(1) + PART_STD**2 * (shares**2).sum(1)

    def _as_predictions(self, mean: np.ndarray, variance: np.ndarray) -> dict[str, Prediction]:
        rows = zip(self._names, np.exp(mean), np.sqrt(variance), strict=True)
        return {name: Prediction(float(step_s), float(std)) for name, step_s, std in rows}


def _kernel(a: np.ndarray, b: np.ndarray, kind: Smooth) -> np.ndarray:
    squares = (a[:, None, :] - b[None, :, :]) ** 2
    alone = kind.own**2 * np.exp(-0.5 * squares).sum(-1) + kind.trend**2 * (a @ b.T)
    return CONSTANT_STD**2 + alone + JOINT_STD**2 * np.exp(-0.5 * squares.sum(-1))


def expected_gain(log_value: float, std: float, log_best: float) -> float:
    """The expected improvement of a logarithm over the best so far; for values of which more is better."""
    if std <= 0:
        return max(0.0, log_value - log_best)
    z = (log_value - log_best) / std
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return (log_value - log_best) * below + std * density
