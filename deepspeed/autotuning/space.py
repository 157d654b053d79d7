"""What may be changed about a user's configuration, and every candidate that comes of it. Pure.

Called by the autotuner before anything runs. A key that the user wrote as a number, a word or a boolean stays. A list of values,
where the key takes one, is the user's own space. "auto", and some keys that are not given, get the values of `KNOBS`.

    stage      1 2 3  x  micro-batch 1 2 4 ...  x  the other knobs      ->  z1_gas1_tmbspg4, z3_gas1_tmbspg8_rcfull, ...

With `train_batch_size` fixed, the accumulation follows from the micro-batch, so that training is the same; else it is the
user's own (1 when not given). What changes numbers (quantised communication, parallel dims) is tried only where the user
lists it.

Invariant: every candidate satisfies micro x accumulation x data-parallel ranks = train batch, within the section's bounds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed.config import load_config
from deepspeed.config.batch import ACCUMULATION, MICRO, TRAIN
from deepspeed.config.dotted import get_at, leaves, with_values
from deepspeed.config.root import Config
from deepspeed.config.schema import all_paths
from deepspeed.config.tuning import AutotuningConfig
from deepspeed.mesh.shape import DEGREES
from deepspeed.optim.arguments import did_you_mean
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

STAGE = "zero_optimization.stage"
RECOMPUTE = "activation_checkpointing.recompute"
OFFLOAD = "zero_optimization.offload_optimizer.device"
BUCKET = "zero_optimization.reduce_bucket_size"
PREFETCH = "zero_optimization.stage3_prefetch_bucket_size"
REUSE = "zero_optimization.stage3_max_reuse_distance"
TENSOR, SEQUENCE, EXPERTS = "tensor_parallel.autotp_size", "sequence_parallel_size", "expert_parallel.autoep_size"
STAGES = "pipeline.stages"
PARALLEL = (TENSOR, SEQUENCE, STAGES)
"""Keys whose ranks share one batch."""
DIVIDING = dict(zip((STAGES, SEQUENCE, TENSOR, EXPERTS), (DEGREES[0], *DEGREES[2:]), strict=True))
"""By key, the dim whose ranks it says."""

ABBREVIATIONS = {
    RECOMPUTE: "rc",
    OFFLOAD: "off",
    BUCKET: "rb",
    PREFETCH: "pf",
    REUSE: "rd",
    **DIVIDING,
    "zero_optimization.allgather_bucket_size": "ab",
    "zero_optimization.overlap_comm": "oc",
    "zero_optimization.zero_quantized_weights": "qw",
    "zero_optimization.zero_quantized_gradients": "qg",
    "zero_optimization.sub_group_size": "sg",
}


@dataclass(frozen=True)
class Knob:
    """A key that the autotuner may set by itself."""

    key: str
    values: Sequence[Any]
    """The default first."""
    applies: Callable[[int, bool], bool] = lambda stage, is_host: True
    """At a ZeRO stage, with ranks on CPUs or not."""


KNOBS = (
    Knob(RECOMPUTE, ("none", "selective", "full")),
    Knob(OFFLOAD, ("none", "cpu"), lambda stage, is_host: stage >= 1 and not is_host),
    Knob(BUCKET, (8 << 20, 1 << 20), lambda stage, is_host: stage in (0, 1, 2)),
    Knob(PREFETCH, (50_000_000, 0), lambda stage, is_host: stage == 3),
    Knob(REUSE, (1_000_000_000, 0), lambda stage, is_host: stage == 3),
)
"""Searched where the key is "auto", or not given and `fast` is false."""


MOST_MICRO = "max_train_micro_batch_size_per_gpu"
"""Its default bounds what is searched, not what a user lists."""
MOST_COMBINATIONS = 256
"""That are looked at to find one that a value goes with."""


@dataclass(frozen=True)
class Candidate:
    """One configuration: what differs from the user's."""

    name: str
    stage: int
    micro: int
    accumulation: int
    data_parallel: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of the other keys that are searched, dotted."""
    degrees: Mapping[str, int] = field(default_factory=dict)
    """Ranks of dims beside the data-parallel one, where more than one; searched or the user's."""

    @property
    def num_ranks(self) -> int:
        """All that share the model's states or its layers; not those of a script's own parallelism (`mp_size`)."""
        shared = (size for dim, size in self.degrees.items() if dim != DIVIDING[EXPERTS])
        return self.data_parallel * math.prod(shared)

    @property
    def train_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.micro * self.accumulation * self.data_parallel

    @property
    def rest(self) -> str:
        """All but the micro-batch, as text."""
        return f"{self.stage} {sorted((key, str(value)) for key, value in self.values.items())}"

    def overrides(self) -> dict[str, Any]:
        """Dotted keys and their values, batch sizes included."""
        batch = {MICRO: self.micro, ACCUMULATION: self.accumulation, TRAIN: self.train_batch}
        return {STAGE: self.stage, **batch, **self.values}

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The user's configuration with this candidate's values, without the section `autotuning`."""
        bare = {key: value for key, value in config.items() if key != "autotuning"}
        if isinstance(bare.get("zero_optimization"), bool):
            bare["zero_optimization"] = {}
        made = with_values(bare, self.overrides())
        if get_at(made, OFFLOAD) == "none":
            made = with_values(made, {"zero_optimization.offload_optimizer": None})
        return made


def abbreviated(value: Any) -> str:
    """A value in a name: 8388608 -> 8Mi, true -> 1."""
    if isinstance(value, bool):
        return str(int(value))
    for unit, suffix in ((1 << 20, "Mi"), (10**9, "e9"), (10**6, "e6"), (1 << 10, "Ki")):
        if isinstance(value, (int, float)) and value and value % unit == 0:
            return f"{int(value // unit)}{suffix}"
    return str(value).replace("/", "-")


def name_of(stage: int, accumulation: int, micro: int, values: Mapping[str, Any]) -> str:
    """As results are filed: z<stage>_gas<g>_tmbspg<m>, then what else was searched."""
    more = "".join(
        f"_{ABBREVIATIONS.get(key, key.rpartition('.')[2])}{abbreviated(value)}" for key, value in values.items()
    )
    return f"z{stage}_gas{accumulation}_tmbspg{micro}{more}"


def listed(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The keys at which a user lists values although the key takes one: the user's own space."""
    lists = {
        path: value
        for path, value in leaves({k: v for k, v in config.items() if k != "autotuning"})
        if isinstance(value, list) and value
    }
    settled = with_values(config, {path: _first(path, values) for path, values in lists.items()})
    settled.pop("autotuning", None)
    found = {}
    for path, values in lists.items():
        try:
            load_config(with_values(settled, {path: values}))
        except DeepSpeedConfigError:
            found[path] = values
    return found


def check_values(config: Mapping[str, Any]) -> None:
    """Each value that would be tried is one that its key takes, and all other keys are right: told before anything runs, not by a trial.

    A value is right that is right beside some values of the other lists. Batch sizes are looked at one by one, since they need not go
    together. Raises DeepSpeedConfigError with `load_config`'s words, and DeepSpeedError for a list of nothing.
    """
    _check_empty(config)
    bare = {key: value for key, value in config.items() if key not in (MICRO, ACCUMULATION, TRAIN, "autotuning")}
    if get_at(bare, STAGE) == "all":
        bare = with_values(bare, {STAGE: "auto"})
    own = listed(bare)
    own = {path: ["auto" if value == "all" else value for value in values] for path, values in own.items()}
    _check_some(bare, own)
    for path, values in own.items():
        for value in values:
            _check_some(bare, {**own, path: [value]})
    for key in (MICRO, ACCUMULATION, TRAIN):
        given = config.get(key)
        for size in given if isinstance(given, list) else [given]:
            if given is not None:
                load_config({key: size})


def check_mappings(mappings: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Each of `arg_mappings` leads from a key that there is, dotted, to a flag. Raises DeepSpeedError."""
    known = all_paths(Config)
    for key, flag in mappings.items():
        place = f"autotuning.arg_mappings[{json.dumps(key)}]"
        if key.strip() not in known and get_at(config, key.strip()) is None:
            raise DeepSpeedError(
                f"{place} = {json.dumps(flag)}: there is no such key of the configuration.\n"
                f'  {did_you_mean(key, known)}Keys below a section are written with dots: "zero_optimization.stage".'
            )
        if not flag.strip().startswith("-"):
            raise DeepSpeedError(
                f'{place} = {json.dumps(flag)} is no flag of a script.\n  Write one, such as "--batch".'
            )


def _check_some(config: Mapping[str, Any], lists: Mapping[str, Sequence[Any]]) -> None:
    """Some combination is right, of the first that there are; else what is wrong with the first of them."""
    error: DeepSpeedConfigError | None = None
    for chosen in itertools.islice(itertools.product(*lists.values()), MOST_COMBINATIONS):
        try:
            load_config(with_values(config, dict(zip(lists, chosen, strict=True))))
        except DeepSpeedConfigError as wrong:
            error = error or wrong
        else:
            return
    if error is not None:
        raise error


def _check_empty(config: Mapping[str, Any]) -> None:
    for path, value in leaves({key: value for key, value in config.items() if key != "autotuning"}):
        if value == [] and not _takes_lists(path):
            raise DeepSpeedError(
                f"autotuning: {path} = [] lists no value to try.\n  List some, or leave the key out to have them chosen."
            )


def _takes_lists(path: str) -> bool:
    try:
        load_config(with_values({}, {path: []}))
    except DeepSpeedConfigError:
        return False
    return True


def _first(path: str, values: list[Any]) -> Any:
    return 0 if path == STAGE and values[0] in ("all", "auto") else values[0]


@dataclass(frozen=True)
class Question:
    """What is asked: a configuration, its section, on how many ranks."""

    config: Mapping[str, Any]
    section: AutotuningConfig
    num_ranks: int
    is_host: bool = False
    accumulation: int | None = None
    """That the script's own arguments fix, where the configuration does not."""


def candidates(question: Question) -> list[Candidate]:
    """Every candidate, by stage, then from small micro-batches to large. Raises DeepSpeedError where there is none."""
    own = listed(question.config)
    made: dict[str, Candidate] = {}
    for stage in _stages(question.config, own):
        for values in _other_values(question, own, stage):
            degrees = _degrees(question, values)
            shared = question.section.mp_size * math.prod(degrees.get(DIVIDING[key], 1) for key in PARALLEL)
            if question.num_ranks % shared:
                continue
            data = question.num_ranks // shared
            for micro, accumulation in _batches(question, own, data):
                name = name_of(stage, accumulation, micro, values)
                made[name] = Candidate(name, stage, micro, accumulation, data, values, degrees)
    if not made:
        raise DeepSpeedError(
            "autotuning: no configuration satisfies the batch sizes: train_batch_size, the bounds of the section "
            f"autotuning, and {question.num_ranks} ranks (mp_size {question.section.mp_size}).\n"
            '  Set train_batch_size and train_micro_batch_size_per_gpu to "auto", or widen the bounds.'
        )
    return list(made.values())


def _degrees(question: Question, values: Mapping[str, Any]) -> dict[str, int]:
    """By dim, how many ranks a combination divides it over, where more than one."""
    found = {}
    for key, dim in DIVIDING.items():
        given = str(values.get(key) or get_at(question.config, key) or "")
        if given.isdecimal() and int(given) > 1:
            found[dim] = int(given)
    return found


def _stages(config: Mapping[str, Any], own: Mapping[str, list[Any]]) -> list[int]:
    given = own.get(STAGE, get_at(config, STAGE, "auto"))
    if isinstance(config.get("zero_optimization"), bool):
        given = int(config["zero_optimization"])
    if given in ("auto", "all") or (isinstance(given, list) and ("all" in given or "auto" in given)):
        return [0, 1, 2, 3]
    return [int(stage) for stage in given] if isinstance(given, list) else [int(given)]


def _other_values(question: Question, own: Mapping[str, list[Any]], stage: int) -> Iterator[dict[str, Any]]:
    """Combinations of everything but stage and batch sizes."""
    config, spaces = question.config, {}
    for knob in KNOBS:
        given = get_at(config, knob.key)
        is_free = given == "auto" or (given is None and not question.section.fast and knob.key not in own)
        if is_free and knob.applies(stage, question.is_host):
            spaces[knob.key] = list(knob.values)
    for key in (*PARALLEL, EXPERTS):
        if get_at(config, key) == "auto":
            spaces[key] = [n for n in range(1, question.num_ranks + 1) if question.num_ranks % n == 0]
    spaces |= {key: values for key, values in own.items() if key not in (STAGE, MICRO, ACCUMULATION, TRAIN)}
    for chosen in itertools.product(*spaces.values()):
        yield dict(zip(spaces, chosen, strict=True))


def _batches(question: Question, own: Mapping[str, list[Any]], data: int) -> Iterator[tuple[int, int]]:
    """(micro, accumulation) pairs."""
    section = question.section
    train = _numbers(question.config, own, TRAIN)
    low, high = section.min_train_micro_batch_size_per_gpu, section.max_train_micro_batch_size_per_gpu
    most = section.max_train_batch_size
    micros = _numbers(question.config, own, MICRO)
    accumulations = _numbers(question.config, own, ACCUMULATION) or [question.accumulation or 0]
    if train:
        micros = micros or [
            n for n in range(low, min(high, max(train) // data) + 1) if any(t % (n * data) == 0 for t in train)
        ]
        pairs = [(micro, t // (micro * data)) for t in train for micro in micros if t % (micro * data) == 0]
        pairs = [pair for pair in pairs if accumulations == [0] or pair[1] in accumulations]
    else:
        micros = micros or [size for size in (1 << power for power in range(21)) if low <= size <= high]
        pairs = [(micro, accumulation or 1) for micro in micros for accumulation in accumulations]
    for micro, accumulation in dict.fromkeys(pairs):
        batch = micro * accumulation * data
        fits = batch >= section.min_train_batch_size and (most is None or batch <= most)
        if fits and low <= micro and (micro <= high or MOST_MICRO not in section.model_fields_set):
            yield micro, accumulation


def _numbers(config: Mapping[str, Any], own: Mapping[str, list[Any]], key: str) -> list[int]:
    """The values that the user gives for a batch key; none for "auto"."""
    given = own.get(key, config.get(key))
    values = given if isinstance(given, list) else [given]
    return [int(value) for value in values if value not in (None, "auto")]
