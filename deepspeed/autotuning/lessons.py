"""What a trial's end teaches: its state, why, and what to do about it. Pure.

Read by the search (what not to try again), the summary and the page. States:

    measured        it wrote its result
    memory          it ran out of memory: larger micro-batches of the same kind are not tried
    failed          it ended with an error
    hung            no progress: it was ended
    killed          a signal from outside ended it: tried once more
    ignored         it ended well, and no engine was ever built from its configuration
    short           it ended well, before the steps that are measured
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepspeed.autotuning.experiment import Ended

_MEMORY = re.compile(r"out of memory|OutOfMemoryError|DefaultCPUAllocator|MemoryError|CUBLAS_STATUS_ALLOC_FAILED")
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments?: ?(.*)|No such option:? ?(.*)")
_MISMATCH = "mismatch TrainingArguments"
_NEVER_REPLACED = '"auto" was never replaced'
NEVER_STEPPED = "it built an engine, ended without an error, and never made a step of the optimizer"
_UNWRITTEN = "the result of this run cannot be written"
"""What `engine.trial.write_result` says."""
_FULL = re.compile(r"No space left on device")
FAILED_FIRST = re.compile(r"^---- (?P<who>.+?) failed first \(.*?\): (?P<ending>.*) ----$", re.MULTILINE)
"""The launcher's summary of a job that failed (`launcher.failure`)."""
_RAISED = re.compile(
    r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Warning)\b.*)$", re.MULTILINE
)


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    state: str
    why: str = ""
    cure: str = ""
    metrics: dict[str, Any] | None = None
    seconds: float = 0.0
    log: str = ""
    """Last lines of its output."""

    @property
    def is_measured(self) -> bool:
        """Whether there is a result."""
        return self.state == "measured"

    def to_json(self) -> dict[str, Any]:
        """For `state.json`."""
        return asdict(self)

    def text(self) -> str:
        """Why, how it ended, and what to do, as an error says it."""
        log = "\n".join(f"    {line}" for line in self.log.splitlines())
        return "\n".join(part for part in (self.why, log, f"  {self.cure}" if self.cure else "") if part)


def outcome_of(ended: Ended, metrics: dict[str, Any] | None, log: str, *, last_step: int) -> Outcome:
    """The state of a trial that is over. `log`: the end of what it wrote; `last_step`: the last one that is measured."""
    if metrics is not None:
        return Outcome("measured", ended.was_ended, "", metrics, ended.seconds)
    state, why, cure = _state(ended, log, last_step)
    return Outcome(state, why, cure, None, ended.seconds, log)


def _state(ended: Ended, log: str, last_step: int) -> tuple[str, str, str]:
    if ended.was_ended:
        return "hung", f"hung: {ended.was_ended}, so it was ended", _cure_of_hanging(ended)
    if _MEMORY.search(log):
        return "memory", "it ran out of memory", "Set autotuning.device_memory_gb to what a rank may really use."
    if _UNWRITTEN in log:  # and there is room again, else the search would have ended
        return "killed", _UNWRITTEN, "Something outside took the space."
    if ended.code and _killed_by(ended.code):
        name = _killed_by(ended.code)
        return (
            "killed",
            f"it was killed ({name}{_first(log)})",
            "Something outside ended it: the system's out-of-memory killer, or a person.",
        )
    if ended.code:
        why = f"it ended with exit code {ended.code}{_place(ended)}{_first(log)}"
        return "failed", why, _cure_of_failure(log)
    if not ended.saw_engine:
        return (
            "ignored",
            "it ended without an error, and never built an engine from the configuration that it was given",
            "Have the script pass its --deepspeed_config (args=args, or config=args.deepspeed_config) to deepspeed.initialize; "
            "a configuration that is written into the script cannot be tuned.",
        )
    if ended.last_step <= 0:
        return (
            "short",
            NEVER_STEPPED,
            "Have it train with the engine that deepspeed.initialize returned: engine.backward(loss) and engine.step().",
        )
    return (
        "short",
        f"it ended after step {ended.last_step}, and step {last_step} is the last one measured",
        "Let the script train longer, or lower autotuning.end_profile_step and start_profile_step.",
    )


def _killed_by(code: int) -> str:
    """The name of the signal behind an exit code of the launcher: -s, or 256 - s for one of its ranks."""
    number = -code if code < 0 else 256 - code
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return signal.Signals(number).name
    return ""


def _place(ended: Ended) -> str:
    if not ended.saw_engine:
        return " before there was an engine"
    return " in the first step" if ended.last_step <= 0 else f" after step {ended.last_step}"


def _first(log: str) -> str:
    """Which rank failed first, and what it raised."""
    found = FAILED_FIRST.search(log)
    if found is None:
        return ""
    raised = _RAISED.findall(log, found.end())
    return f"; {found['who']} was the first" + (f": {raised[-1]}" if raised else "")


def _cure_of_hanging(ended: Ended) -> str:
    if ended.saw_engine:
        return "If steps really take so long, raise autotuning.trial_timeout."
    return (
        "If the script takes so long to load, raise autotuning.trial_timeout. If it passes no configuration to "
        "deepspeed.initialize, the autotuner cannot see it train: have it use its --deepspeed_config."
    )


def _cure_of_failure(log: str) -> str:
    flag = _UNKNOWN_FLAG.search(log)
    if flag:
        return (
            f"The script does not know the argument {flag[1] or flag[2]}: name the script's own with autotuning.arg_mappings, "
            "or give the key a number in the configuration."
        )
    if _MISMATCH in log:
        return (
            'The Trainer\'s arguments and the configuration disagree: set the key to "auto", or name the argument in '
            'autotuning.arg_mappings, as {"train_micro_batch_size_per_gpu": "--per_device_train_batch_size"}.'
        )
    if _NEVER_REPLACED in log:
        return 'Nobody replaces "auto" in this script: give the key a number.'
    if _FULL.search(log):
        return "The script's own output found no space; free some."
    return "Run the script once without --autotuning, and mend what it says."


def faster_of(first: Outcome, second: Outcome) -> Outcome:
    """Of two runs of one trial, the first of them measured, the one with the shorter steps, and the seconds of both."""
    one, other = (float((done.metrics or {}).get("latency", math.inf)) for done in (first, second))
    why = f"run twice: {one:.3g} s per step were not foreseen" + (f", then {other:.3g} s" if second.is_measured else "")
    return replace(first if one <= other else second, why=why, seconds=first.seconds + second.seconds)


def ignores_size(seen: tuple[int, Sequence[int]], now: tuple[int, Sequence[int]]) -> bool:
    """Whether no input of the model followed the micro-batch, from (micro-batch, elements of each input) of two runs.

    Lengths that vary from batch to batch change elements too, but no micro-batch: an input follows that changes more like it than not.
    """
    (old, before), (new, after) = seen, now
    if old == new or len(before) != len(after) or not all((*before, *after)):
        return False
    return bool(before) and all(
        abs(math.log(b / a)) < abs(math.log(new / old)) / 2 for a, b in zip(before, after, strict=True)
    )


def is_about_auto(log: str) -> bool:
    """Whether a run failed because nobody replaced "auto"."""
    return _NEVER_REPLACED in log
