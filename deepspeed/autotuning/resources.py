"""`ResourceManager`: runs experiments, one at a time, on all slots of the job, and keeps what came of them.

Called by the autotuner, and by scripts that know the original's class. Two trials at once would share caches, links and
processors, and measure each other; so there is one at a time. A trial is the user's own command, started by this
package's launcher with the flags that the user gave it, its configuration replaced by the trial's.

Invariant: an experiment's folder has everything to run it again by hand: `ds_config.json` and `cmd.txt`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.autotuning import experiment
from deepspeed.autotuning.experiment import Ended, Limits
from deepspeed.autotuning.files import read_json, tail, write_json, write_text
from deepspeed.autotuning.lessons import Outcome, outcome_of
from deepspeed.autotuning.script import find_script
from deepspeed.config.dotted import get_at
from deepspeed.config.tuning import AutotuningConfig
from deepspeed.launcher.arguments import make_parser

NOT_PASSED_ON = {"autotuning", "user_script", "user_args", "help", "save_pid"}
_CHOOSE_SLOTS = {"num_gpus": -1, "include": "", "exclude": ""}
"""The launcher's arguments that do, with their defaults."""
FIRST_STEP_FACTOR = 20.0
"""Times the predicted step that one may take before it counts as hung."""
LEAST_S = 60.0


def launcher_flags(args: argparse.Namespace) -> list[str]:
    """The launcher's flags as they were given, but for --autotuning: those whose value is not the default."""
    flags: list[str] = []
    for action in make_parser()._actions:
        if action.dest in NOT_PASSED_ON or not action.option_strings or not hasattr(args, action.dest):
            continue
        value, flag = getattr(args, action.dest), max(action.option_strings, key=len)
        if value == action.default or value is None:
            continue
        flags += [flag] if action.nargs == 0 else [f"{flag}={value}"]
    return flags


class ResourceManager:
    """A queue of experiments and their outcomes, by name."""

    def __init__(
        self,
        args: argparse.Namespace,
        hosts: Sequence[str],
        num_gpus_per_node: int,
        results_dir: str | Path,
        exps_dir: str | Path,
        arg_mappings: Mapping[str, str] | None = None,
        *,
        section: AutotuningConfig | None = None,
    ) -> None:
        self.args, self.hosts, self.num_gpus_per_node = args, list(hosts), num_gpus_per_node
        self.results_dir, self.exps_dir = Path(results_dir).absolute(), Path(exps_dir).absolute()
        self.section = section or AutotuningConfig()
        self.script = find_script(args.user_script, args.user_args, arg_mappings)
        self.experiment_queue: list[dict[str, Any]] = []
        self.finished_experiments: dict[str, tuple[dict[str, Any], Outcome]] = {}
        self.started_s: list[float] = []
        """Seconds from start to engine, of trials that got so far."""
        self.before_start: Callable[[], None] = lambda: None
        """Asked before each trial; may raise."""

    def schedule_experiments(self, exp_paths: Sequence[str | Path]) -> None:
        """Queue experiments: JSON files with a "name" and a "ds_config". One that has its result is taken as done."""
        for path in exp_paths:
            exp = read_json(Path(path))
            if not isinstance(exp, dict) or "name" not in exp or "ds_config" not in exp:
                raise ValueError(f'{path} is no experiment.\n  It is a JSON object with "name" and "ds_config".')
            done = read_json(self.results_dir / exp["name"] / "metrics.json")
            if isinstance(done, dict) and read_json(self.results_dir / exp["name"] / "exp.json") == exp:
                self.finished_experiments[exp["name"]] = exp, Outcome("measured", metrics=done)
            else:
                self.experiment_queue.append(exp)

    def run(self) -> None:
        """Run what is queued, in order."""
        while self.experiment_queue:
            exp = self.experiment_queue.pop(0)
            self.finished_experiments[exp["name"]] = exp, self.run_one(exp)

    def run_one(self, exp: dict[str, Any], predicted_s: float | None = None) -> Outcome:
        """Run one experiment to its end. predicted_s: of a step, from which it is known when one hangs."""
        folder = self.results_dir / exp["name"]
        result = folder / "metrics.json"
        own = {"enabled": True, "metric_path": str(result), **_profile_steps(self.section)}
        ended = self.start(exp, {**exp["ds_config"], "autotuning": own}, result, self.limits(predicted_s))
        outcome = outcome_of(ended, read_json(result), self.log_of(folder), last_step=self.section.end_profile_step)
        if outcome.is_measured:
            self.started_s.append(ended.start_s or ended.seconds)
        write_json(folder / "outcome.json", outcome.to_json())
        return outcome

    def start(self, exp: Mapping[str, Any], config: Mapping[str, Any], result: Path, limits: Limits) -> Ended:
        """Start the user's script with a configuration, and see it end."""
        self.before_start()
        folder = self.results_dir / exp["name"]
        write_json(folder / "exp.json", exp)
        write_json(folder / "ds_config.json", config)
        command = self.command(folder / "ds_config.json", exp["ds_config"])
        write_text(folder / "cmd.txt", shlex.join(command) + "\n")
        return experiment.run(command, folder, result, limits, experiment.as_environment(os.environ))

    def command(self, config: Path, values: Mapping[str, Any] | None) -> list[str]:
        """The user's command with another configuration. values: the configuration that mapped arguments follow."""
        mapped = {key: get_at(values, key) for key in self.script.mappings or {}} if values is not None else None
        if mapped is not None:
            mapped = {key: value for key, value in mapped.items() if value not in (None, "auto")}
        return [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            *launcher_flags(self.args),
            *self._slots(),
            self.args.user_script,
            *self.script.with_config(str(config), mapped),
        ]

    def _slots(self) -> list[str]:
        """The flag for the host's slots, where the launcher's own flags do not say which."""
        says = any(getattr(self.args, name, default) != default for name, default in _CHOOSE_SLOTS.items())
        return [f"--num_gpus={self.num_gpus_per_node}"] if len(self.hosts) == 1 and not says else []

    def limits(self, predicted_s: float | None) -> Limits:
        """How long a trial may show no progress: from what earlier ones took, never more than `trial_timeout`."""
        most = float(self.section.trial_timeout)
        start_s = min(most, max(LEAST_S, 5 * max(self.started_s))) if self.started_s else most
        step_s = min(most, max(LEAST_S, FIRST_STEP_FACTOR * predicted_s)) if predicted_s and self.started_s else most
        return Limits(start_s, step_s)

    def log_of(self, folder: Path) -> str:
        """The end of what a trial wrote: its errors, else its output."""
        return tail(folder / "stderr.log") or tail(folder / "stdout.log")

    def parse_results(self, metric: str) -> tuple[dict[str, Any] | None, float | None]:
        """(experiment, value) of the best by "throughput", "flops" (most) or "latency" (least); (None, None) of nothing."""
        best: tuple[dict[str, Any] | None, float | None] = None, None
        for exp, outcome in self.finished_experiments.values():
            value = value_of(metric, outcome.metrics)
            if value is not None and (best[1] is None or is_better(metric, value, best[1])):
                best = exp, value
        return best

    def clear(self) -> None:
        """Forget what is queued and done. Files stay."""
        self.experiment_queue.clear()
        self.finished_experiments.clear()


METRICS = {"throughput": "throughput", "latency": "latency", "flops": "FLOPS_per_gpu"}
"""The section's word, and the name in `metrics.json`."""


def value_of(metric: str, metrics: Mapping[str, Any] | None) -> float | None:
    """A metric of a result; None where it has none."""
    value = (metrics or {}).get(METRICS[metric])
    return float(value) if value is not None else None


def is_better(metric: str, value: float, than: float) -> bool:
    """Less is better for latency, more for the others."""
    return value < than if metric == "latency" else value > than


def _profile_steps(section: AutotuningConfig) -> dict[str, int]:
    return {"start_profile_step": section.start_profile_step, "end_profile_step": section.end_profile_step}
