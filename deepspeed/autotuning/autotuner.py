"""`Autotuner`: from a user's command to its fastest configuration.

    read      the configuration, the section, the space of candidates                     space, script
    profile   one short run of the script: the model, the machine, what each needs        engine.probe
    predict   which fit, and about how fast they are                                      planner.cost, surrogate
    try       a few, each in processes of its own, the most promising first               tuners, resources
    write     summary.txt, report.html, ds_config_optimal.json, cmd_optimal.txt           summary, page

Called by `deepspeed --autotuning tune|run`; scripts that know the original's class may call it themselves.

Invariant: after every trial all that is known is on disk, so that the same command, started again, goes on where it stopped.
Nothing is tried that is predicted not to fit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.accelerator.platforms import known_without_torch
from deepspeed.autotuning import lessons, page, summary
from deepspeed.autotuning.experiment import Limits, become
from deepspeed.autotuning.files import (
    NEEDED_NBYTES,
    OURS,
    ResultsError,
    check_room,
    clear,
    held,
    read_json,
    write_json,
    write_text,
)
from deepspeed.autotuning.found import Found, best_of
from deepspeed.autotuning.lessons import Outcome
from deepspeed.autotuning.prior import prior_parts
from deepspeed.autotuning.progress import Progress, say, shown
from deepspeed.autotuning.resources import ResourceManager, is_better, launcher_flags, value_of
from deepspeed.autotuning.script import TRAINER, find_script
from deepspeed.autotuning.space import (
    ACCUMULATION,
    DIVIDING,
    EXPERTS,
    MICRO,
    STAGE,
    TENSOR,
    TRAIN,
    Candidate,
    Question,
    candidates,
    check_mappings,
    check_values,
    listed,
)
from deepspeed.autotuning.stopped import Stopped
from deepspeed.autotuning.tuners import TUNERS, Tuner
from deepspeed.config import check_available, load_config, read_config
from deepspeed.config.dotted import get_at, with_values
from deepspeed.config.tuning import AutotuningConfig
from deepspeed.engine.probe import CANDIDATES
from deepspeed.utils.errors import DeepSpeedError

PROFILE = "profile_model_info"
"""The first run's folder."""
FORMAT = 2
"""Of what the first run and trials leave: what another version left is not gone on with."""
MEASURING_S = 1800.0
"""In which it has to be done once it has an engine: what it does then is the autotuner's, whatever `trial_timeout` the script's steps have."""


class Autotuner:
    """One search. `args` are the launcher's; `active_resources` says which slots of which hosts there are."""

    def __init__(self, args: argparse.Namespace, active_resources: Mapping[str, Sequence[int]]) -> None:
        self.args, self.hosts = args, dict(active_resources)
        self.num_ranks = sum(map(len, self.hosts.values()))
        script = find_script(args.user_script, args.user_args)
        self.config = read_config(script.config)
        self.section = _section(self.config, script.config)
        check_values(self.config)
        check_mappings(self.section.arg_mappings or {}, self.config)
        mappings = self.section.arg_mappings or (TRAINER if script.uses_trainer else {})
        self.rm = ResourceManager(
            args,
            list(self.hosts),
            min(map(len, self.hosts.values())),
            self.section.results_dir,
            self.section.exps_dir,
            mappings,
            section=self.section,
        )
        self.results, self.exps = self.rm.results_dir, self.rm.exps_dir
        fixed = self.rm.script.value_of(ACCUMULATION)
        self.question = Question(
            self.config,
            self.section,
            self.num_ranks,
            _is_host(),
            int(fixed) if fixed and fixed.isdecimal() else None,
        )
        self.candidates = candidates(self.question)
        self.by_name = {candidate.name: candidate for candidate in self.candidates}
        self.info: dict[str, Any] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.tuner: Tuner | None = None
        self.began_s = time.monotonic()
        self.spent_s = 0.0
        """Of earlier starts of this search."""
        self.why_ended = ""

    # The search. ---------------------------------------------------------------------------------------------------

    def tune(self) -> None:
        """Search, and write what was found. Raises DeepSpeedError where nothing could be measured; ResultsError, with what is kept,
        where no more can be written."""
        check_room(self.results, NEEDED_NBYTES)
        check_room(self.exps, NEEDED_NBYTES)
        with held(self.results, self.exps):
            try:
                self._tune()
            except KeyboardInterrupt:
                self._leave("it was stopped")
                raise
            except ResultsError as error:
                self._leave("no more results could be written")
                raise ResultsError(f"{error}\n{self._kept()}") from None

    def _tune(self) -> None:
        if self._resume():
            return
        self.profile()
        self.tuner = self._make_tuner()
        with Progress(self._num_at_most()) as progress:
            for name, outcome in self.outcomes.items():
                if name in self.by_name:
                    self.tuner.tell(self.by_name[name], outcome)
            self._search(self.tuner, progress)
        self._finish()

    def profile(self) -> None:
        """Run the script once to its first forward; `info` is what that says."""
        if self.info:
            return
        given = self.section.model_info
        if given is not None and (given.num_params or given.hidden_size or given.num_layers):
            say("autotuning: model_info is not taken over: the first run sees the model, its memory and this machine")
        say(f"autotuning: profiling {self.args.user_script} on {self.num_ranks} rank(s)")
        bare = self._base()
        tries = [bare, with_values(bare, self._plain_batch())] if self._leaves_auto() else [bare]
        for config in tries:
            outcome = self._profile_with(config)
            if outcome.is_measured:
                break
            if not (lessons.is_about_auto(outcome.log) and config is tries[0] and len(tries) > 1):
                raise DeepSpeedError(
                    f"autotuning: the first run of {self.args.user_script} gave nothing: {outcome.text()}"
                )
        self.info = outcome.metrics or {}
        if self.info.get("filled_by_transformers") and not self.rm.script.mappings:
            self.rm.script = find_script(self.args.user_script, self.args.user_args, TRAINER)
        self._save()

    def _base(self) -> dict[str, Any]:
        """The user's configuration with one value at every key, at the stage that shards most."""
        own = listed(self.config)
        base = {key: value for key, value in self.config.items() if key != "autotuning"}
        least = max(candidate.stage for candidate in self.candidates)
        first = min((c for c in self.candidates if c.stage == least), key=lambda c: c.micro)
        values = {path: found[0] for path, found in own.items()} | {STAGE: least}
        if isinstance(base.get("zero_optimization"), bool):
            base["zero_optimization"] = {}
        if not self._leaves_auto():
            values |= first.overrides()
        return with_values(base, values | self._undivided(first))

    def _undivided(self, first: Candidate) -> dict[str, Any]:
        """Layers and what else is searched in one piece, so that the model is seen as the script made it."""
        values: dict[str, Any] = {key: 1 for key in DIVIDING if key in first.values}
        if first.degrees.get(DIVIDING[TENSOR]):
            values[TENSOR] = 1
        if values and not self._leaves_auto():
            kept = (
                size for dim, size in first.degrees.items() if dim not in {DIVIDING[key] for key in (*values, EXPERTS)}
            )
            data = self.num_ranks // self.section.mp_size // math.prod(kept)
            values[TRAIN] = first.micro * first.accumulation * data
        return values

    def _leaves_auto(self) -> bool:
        """Whether "auto" batch sizes are left to a Trainer in the first run."""
        return self.rm.script.uses_trainer and any(
            self.config.get(key) == "auto" for key in (MICRO, ACCUMULATION, TRAIN)
        )

    def _plain_batch(self) -> dict[str, Any]:
        least = min(self.candidates, key=lambda candidate: candidate.micro)
        return {MICRO: least.micro, ACCUMULATION: least.accumulation, TRAIN: least.train_batch}

    def _profile_with(self, config: dict[str, Any]) -> Outcome:
        folder = self.results / PROFILE
        result = folder / "model_info.json"
        asked = [
            {
                "name": c.name,
                "micro": c.micro,
                "rest": c.rest,
                "num_ranks": c.num_ranks,
                "degrees": c.degrees,
                "overrides": c.overrides(),
            }
            for c in self.candidates
        ]
        write_json(folder / CANDIDATES, asked)
        own = {"enabled": True, "model_info": {"profile": True}, "model_info_path": str(result)}
        if self.section.device_memory_gb:
            own["device_memory_gb"] = self.section.device_memory_gb
        exp = {"name": PROFILE, "ds_config": config}
        limits = self.rm.limits(None)
        limits = Limits(limits.start_s, max(limits.step_s, MEASURING_S))
        ended = self.rm.start(exp, {**config, "autotuning": own}, result, limits)
        found = read_json(result)
        if ended.start_s is not None and found is not None:
            self.rm.started_s.append(ended.start_s)
        outcome = lessons.outcome_of(ended, found, self.rm.log_of(folder), last_step=1)
        if outcome.state == "short":
            return Outcome(
                "short", "it built an engine and never called it: there was no forward in training", "Train in it."
            )
        return outcome

    def _make_tuner(self) -> Tuner:
        memory = self.info.get("memory", {})
        fitting = [c for c in self.candidates if self._may_try(memory.get(c.name))]
        refused = [m["why"] for m in memory.values() if m.get("refused")]
        if not fitting and len(refused) == len(self.candidates):
            raise DeepSpeedError(
                f"autotuning: the engine refuses all of {len(refused)} configurations; the first of them: {refused[0]}"
            )
        if not fitting:
            least = min((m["nbytes"] for m in memory.values() if m.get("nbytes")), default=0)
            raise DeepSpeedError(
                f"autotuning: none of {len(self.candidates)} configurations fits {self.info['device_nbytes'] / 2**30:.2f} GiB per rank; "
                f"the least needs {least / 2**30:.2f} GiB.\n"
                "  Use more ranks, allow smaller micro-batches and ZeRO stage 3, or set autotuning.fast to false so that "
                "recomputation and offload are searched too."
            )
        kind = self.section.tuner_type if "tuner_type" in self.section.model_fields_set else "model_based"
        few = self.section.num_tuning_micro_batch_sizes
        is_listed = MICRO in listed(self.config)
        prior = prior_parts(self.info, fitting, str(get_at(self.config, "pipeline.schedule") or "1f1b"))
        return TUNERS[kind](fitting, prior, self.section.metric, most_micros=10**9 if is_listed else few)

    def _may_try(self, memory: Mapping[str, Any] | None) -> bool:
        if memory is not None and memory.get("refused"):
            return False
        known = self.info.get("memory", {}).values()
        if all(each.get("fits") is None for each in known):  # nobody knows: every one may be tried, and failures teach
            return True
        return memory is not None and memory.get("fits") is True

    def _num_at_most(self) -> int:
        assert self.tuner is not None
        return min(self.section.tuner_num_trials, len(self.tuner.candidates))

    def _search(self, tuner: Tuner, progress: Progress) -> None:
        """Try until the tuner, its limits, or the candidates end it."""
        without_gain = 0
        while True:
            self.why_ended = self._reason_to_end(len(self.outcomes), without_gain)
            candidate = None if self.why_ended else tuner.next()
            if candidate is None:
                self.why_ended = self.why_ended or tuner.why_ended()
                return
            best = self.best()[1]
            outcome = self._try(candidate, tuner)
            tuner.tell(candidate, outcome)
            self.outcomes[candidate.name] = outcome
            value = value_of(self.section.metric, outcome.metrics)
            gained = value is not None and (best is None or is_better(self.section.metric, value, best))
            without_gain = 0 if gained else without_gain + outcome.is_measured
            self._save()
            progress.tell(candidate, outcome, self.section.metric, self.best()[0])

    def _reason_to_end(self, num_trials: int, without_gain: int) -> str:
        if num_trials >= self.section.tuner_num_trials:
            return f"tuner_num_trials = {self.section.tuner_num_trials} trials were made"
        if without_gain >= self.section.tuner_early_stopping:
            return f"{without_gain} trials in a row were no better (tuner_early_stopping)"
        return ""

    def _try(self, candidate: Candidate, tuner: Tuner) -> Outcome:
        """One trial; one more where something outside killed it, or seems to have slowed it: then the faster one counts."""
        exp = {"name": candidate.name, "ds_config": candidate.apply(self.config)}
        write_json(self.exps / f"{candidate.name}.json", exp)
        predicted = tuner.predictions[candidate.name]
        outcome = self.rm.run_one(exp, predicted.step_s if self.outcomes else None)
        if outcome.state == "killed":
            outcome = self.rm.run_one(exp, None)
        elif tuner.is_slower_than_foreseen(candidate, outcome):
            outcome = lessons.faster_of(outcome, self.rm.run_one(exp, None))
        if outcome.why == lessons.NEVER_STEPPED:  # nor would it with another configuration
            raise DeepSpeedError(f"autotuning: a trial of {self.args.user_script} gave nothing: {outcome.text()}")
        self._check_batches(candidate, outcome)
        return outcome

    def _check_batches(self, candidate: Candidate, outcome: Outcome) -> None:
        """A script whose batches stay as they are would be said to be faster the more samples it is asked for."""
        numels = (outcome.metrics or {}).get("input_numels", [])
        seen = int(self.info.get("micro_batch", candidate.micro)), self.info.get("input_numels", [])
        if not candidate.degrees and lessons.ignores_size(seen, (candidate.micro, numels)):
            raise DeepSpeedError(
                f"autotuning: the batches of {self.args.user_script} are as large with {MICRO} = {candidate.micro} as with {seen[0]} "
                f"({numels[0]} elements in the first input), so the micro-batch cannot be tuned: the script ignores it.\n"
                f'  Name its own argument, as in "arg_mappings": {{"{MICRO}": "--batch_size"}}; or let deepspeed.initialize(training_data=...) '
                f"make the loader; or give {MICRO} the script's number."
            )

    def best(self) -> tuple[str | None, float | None]:
        """(name, metric) of the best so far."""
        return best_of(self.section.metric, self.outcomes)

    def found(self) -> Found:
        """What is known now."""
        return Found(
            script=str(self.args.user_script),
            num_ranks=self.num_ranks,
            section=self.section,
            results=self.results,
            candidates=self.candidates,
            info=self.info,
            outcomes={name: done for name, done in self.outcomes.items() if name in self.by_name},
            predictions=self.tuner.predictions if self.tuner is not None else {},
            skipped=self.tuner.skipped if self.tuner is not None else {},
            seconds=self.seconds,
            why_ended=self.why_ended,
            command=self.optimal()[1] if self.best()[0] is not None else (),
        )

    # What is kept and written. -------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        asked = [
            os.path.abspath(self.args.user_script),
            list(self.args.user_args),
            self.config,
            launcher_flags(self.args),
            self.num_ranks,
            FORMAT,
        ]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def _resume(self) -> bool:
        """Take over what an earlier start of this search left; whether it was finished and is to be kept."""
        state = read_json(self.results / OURS)
        if state is None and (self.results / OURS).exists():
            say(f"autotuning: {self.results / OURS} is damaged, so the search begins anew")
        is_same = isinstance(state, dict) and state.get("question") == self._fingerprint()
        if is_same and not (state["is_finished"] and self.section.overwrite):
            self.outcomes = {name: Outcome(**done) for name, done in state["outcomes"].items()}
            self.spent_s, self.why_ended = state["seconds"], state["why_ended"]
            self.rm.started_s, self.info = state["started_s"], state["info"]
            if state["is_finished"]:
                say(f"autotuning: {self.results} has the result of this search; autotuning.overwrite = false keeps it")
                return True
            say(f"autotuning: going on after {len(self.outcomes)} trials that {self.results} has")
            return False
        if isinstance(state, dict):
            self._tell_replaced(is_same)
            clear(self.results, self.exps, [PROFILE, *state.get("outcomes", {})])
        return False

    def _tell_replaced(self, is_same: bool) -> None:
        """Say that an earlier search's results go; raise where they are to stay."""
        if not is_same and not self.section.overwrite:
            raise DeepSpeedError(
                f"autotuning: {self.results} has the results of another search, and autotuning.overwrite = false keeps them.\n"
                "  Set autotuning.results_dir and autotuning.exps_dir to other folders, or overwrite to true."
            )
        say(
            f"autotuning: the results of {'an earlier' if is_same else 'another'} search in {self.results} are replaced"
        )

    def _save(self, is_finished: bool = False) -> None:
        state = {
            "question": self._fingerprint(),
            "is_finished": is_finished,
            "why_ended": self.why_ended,
            "seconds": self.seconds,
            "started_s": self.rm.started_s,
            "info": self.info,
            "outcomes": {name: outcome.to_json() for name, outcome in self.outcomes.items()},
        }
        write_json(self.results / OURS, state)
        if self.tuner is not None:
            write_text(
                self.results / "report.html", page.page(self.found(), is_finished=is_finished or bool(self.why_ended))
            )

    @property
    def seconds(self) -> float:
        """Of the search, with all starts."""
        return self.spent_s + time.monotonic() - self.began_s

    def _leave(self, why: str) -> None:
        """Say on the page that the search no longer goes on, where that can be written."""
        if self.info:
            self.why_ended = why
            with contextlib.suppress(ResultsError):
                self._save()

    def _kept(self) -> str:
        """What of this search is on disk, and the best of what it has seen."""
        state = read_json(self.results / OURS)
        is_ours = isinstance(state, dict) and state.get("question") == self._fingerprint()
        number = len(state["outcomes"]) if is_ours else 0
        what = f"{self.results / OURS} keeps the first run and {number} trial{'s' * (number != 1)}"
        what = what if is_ours else "Nothing of this search is kept"
        name, value = self.best()
        best = f"; the best so far is {name}, {shown(self.section.metric, value)}" if name else ""
        return f"  {what}{best}."

    def _finish(self) -> None:
        if self.best()[0] is None:
            self._save()
            last = next(reversed(self.outcomes.values()), None)
            raise DeepSpeedError(
                f"autotuning: none of {len(self.outcomes)} trials gave a result; the last one: "
                f"{last.text() if last else 'none was made'}\n  Everything that they wrote is below {self.results}."
            )
        self.write_optimal_config()
        write_text(self.results / "summary.txt", summary.text(self.found()))
        self._save(is_finished=True)

    def optimal(self) -> tuple[dict[str, Any], list[str]]:
        """The best configuration, without the section, and the command for it."""
        name, _ = self.best()
        assert name is not None, "something was measured"
        config = self.by_name[name].apply(self.config)
        path = self.results / "ds_config_optimal.json"
        return config, ["deepspeed", *self.rm.command(path, config)[3:]]

    def write_optimal_config(self) -> None:
        """Write `ds_config_optimal.json` and `cmd_optimal.txt`."""
        config, command = self.optimal()
        write_json(self.results / "ds_config_optimal.json", config)
        write_text(self.results / "cmd_optimal.txt", summary.shell(command) + "\n")

    def print_tuning_results(self) -> None:
        """Say what was found."""
        say(summary.text(self.found()))

    def run_after_tuning(self) -> int:
        """Start the script with the best configuration, through the launcher; its exit code."""
        config, _ = self.optimal()
        say("autotuning: starting the script with the best configuration")
        command = self.rm.command(self.results / "ds_config_optimal.json", config)
        return become(command)


def _section(config: Mapping[str, Any], source: str) -> AutotuningConfig:
    given = config.get("autotuning")
    if given is None:
        print(f"autotuning: {source[:100]} has no section autotuning; its defaults hold", file=sys.stderr)
    config_of_section = load_config({"autotuning": given if given is not None else {}})
    check_available(config_of_section)  # says which keys have no effect
    section = config_of_section.autotuning
    if "enabled" in section.model_fields_set and not section.enabled:
        raise DeepSpeedError(
            "autotuning.enabled = false, and --autotuning was asked for.\n  Set it to true, or leave the flag out."
        )
    return section


def _is_host() -> bool:
    known = known_without_torch(os.environ)
    if known is not None:
        return known.name == "cpu"
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def main(args: argparse.Namespace, active_resources: Mapping[str, Sequence[int]]) -> int:
    """`deepspeed --autotuning tune|run`; the exit code."""
    stopped = Stopped()
    try:
        with stopped:
            tuner = Autotuner(args, active_resources)
            tuner.rm.before_start = stopped.check
            tuner.tune()
    except KeyboardInterrupt:
        print(
            f"\nautotuning: stopped by {stopped.name}. What was tried is kept: start the same command again to go on.",
            file=sys.stderr,
        )
        return stopped.exit_code
    tuner.print_tuning_results()
    return tuner.run_after_tuning() if args.autotuning == "run" else 0
