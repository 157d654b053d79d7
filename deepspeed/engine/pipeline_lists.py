"""Which list of actions a pipeline's batch is: a named one, one from a file, or one made for what its stages were seen to take.

Asked by the pipeline engine; over `parallel.pipeline`'s schedules and generator. A "generated" list begins as the module's usual
one with every backward in two. Its first batch tells what a micro-batch keeps alive, its second what forwards, input and weight
gradients take, and a hop is timed; then every rank makes the same list of the same numbers.

Invariant: all ranks have the same list for a number of micro-batches, or the same error.
"""

from __future__ import annotations

from pathlib import Path

from deepspeed.config.parallelism import PipelineConfig
from deepspeed.mesh import Mesh
from deepspeed.parallel.pipeline.actions import Actions, Op, in_halves, read_csv
from deepspeed.parallel.pipeline.check import Costs, peak_alive, require_training, require_valid, simulate
from deepspeed.parallel.pipeline.executor import Executor
from deepspeed.parallel.pipeline.generate import generate
from deepspeed.parallel.pipeline.mail import Mail
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.schedules import NAMED
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.logging import log_dist

GENERATED = "generated"
Seen = dict[int, tuple[float, float, float, float]]
"""By stage: seconds of a forward, an input and a weight gradient, and bytes that a micro-batch keeps alive."""


class Lists:
    """Of one engine, by number of micro-batches."""

    def __init__(self, section: PipelineConfig, module: PipelineModule) -> None:
        self._section, self._module = section, module
        self._made: dict[int, Actions] = {}
        self._alive: dict[int, float] = {}
        self.costs: Costs | None = None
        """What stages were seen to take, once a "generated" list was asked for and has been measured."""

    def of(self, num_micro: int) -> Actions:
        """The list. Raises DeepSpeedConfigError where there is none for this number of micro-batches."""
        if num_micro not in self._made:
            if self._section.schedule != GENERATED:
                self._made[num_micro] = make_actions(self._section.schedule, self._module, num_micro)
            elif self.costs is not None:
                self._made[num_micro] = self._generate(num_micro, self.costs)
            else:
                return in_halves(make_actions("auto", self._module, num_micro))
        return self._made[num_micro]

    def agree(self, num_micro: int, mesh: Mesh) -> None:
        """Have the list, or one error on all ranks, where one has none, or another than the first: files of several nodes may differ.
        Collective over the job."""
        failure, told = None, ""
        try:
            told = self.of(num_micro).to_csv()
        except (DeepSpeedError, OSError) as error:
            failure = error
        everyone = mesh.gather_objects("job", (told, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (theirs, words) in enumerate(everyone):
            if words is not None:
                raise DeepSpeedConfigError(f"rank {rank}: {words}")
            if theirs != everyone[0][0]:
                raise DeepSpeedConfigError(
                    f'pipeline.schedule = "{self._section.schedule}": rank {rank} has another list of actions than rank 0.\n'
                    "  Give all ranks the same schedule; a file has to be the same on all nodes."
                )

    @property
    def measures(self) -> bool:
        """Whether the next batch is looked at."""
        return self._section.schedule == GENERATED and self.costs is None

    def learn(self, executor: Executor, mail: Mail, mesh: Mesh) -> None:
        """After a batch that `measures`. Collective over the job."""
        if not self._alive:
            self._alive = dict(executor.saved_bytes)
            return
        seen: Seen = {}
        for stage in self._module.own_stages:
            forward, input, weight = (_seconds(executor, stage, op) for op in (Op.FORWARD, Op.INPUT, Op.WEIGHT))
            seen[stage] = (forward, input, weight, self._alive.get(stage, 1.0))
        everyone = mesh.gather_objects("job", (seen, mail.time_hop()))
        hop = max(theirs for _, theirs in everyone)
        num_stages = len(self._module.rank_of)
        of_stage = [[found[stage] for found, _ in everyone if stage in found] for stage in range(num_stages)]
        means = [[sum(row[kind] for row in rows) / len(rows) for rows in of_stage] for kind in range(4)]
        self.costs = Costs(means[0], means[1], means[2], hop, [max(1.0, nbytes) for nbytes in means[3]])

    def _generate(self, num_micro: int, costs: Costs) -> Actions:
        usual = in_halves(make_actions("auto", self._module, num_micro))
        limit = self._section.max_activation_memory
        limits = [float(limit)] * usual.num_ranks if limit else peak_alive(usual, costs)
        made = generate(self._module.rank_of, num_micro, costs, limits)
        usual = make_actions("auto", self._module, num_micro)
        log_dist(
            f"pipeline.schedule: {made.name}, {simulate(made, costs).makespan * 1e3:.1f} ms a batch by what stages took, "
            f"{usual.name} {simulate(usual, costs).makespan * 1e3:.1f} ms",
            ranks=[0],
        )
        return made


def _seconds(executor: Executor, stage: int, op: Op) -> float:
    """The median, so that one slow micro-batch does not count."""
    found = sorted(
        d.end_s - d.start_s - d.waited_s for d in executor.done if d.action.stage == stage and d.action.op is op
    )
    return found[len(found) // 2] if found else 0.0


def _read(path: Path, name: str) -> Actions:
    try:
        actions = read_csv(path.read_text("utf-8-sig"), name)
        require_valid(actions)
        require_training(actions)
    except (DeepSpeedError, UnicodeDecodeError) as error:
        raise DeepSpeedConfigError(f'pipeline.schedule = "{name}": {error}') from None
    return actions


def make_actions(schedule: str, module: PipelineModule, num_micro: int) -> Actions:
    """The list of a name or a CSV file, for a module's ranks and stages. Raises DeepSpeedConfigError where it does not fit."""
    ranks, chunks = module.num_stages, module.num_chunks
    if schedule == "auto":
        schedule = "dualpipe-v" if module.placement == "v" else "1f1b" if chunks == 1 else "interleaved"
    if schedule in NAMED:
        takes_chunks = schedule in ("interleaved", "zb-h1") and module.placement == "loop" and chunks > 1
        actions = NAMED[schedule](ranks, num_micro, **({"num_chunks": chunks} if takes_chunks else {}))
    elif Path(schedule).is_file():
        actions = _read(Path(schedule), schedule)
    else:
        raise DeepSpeedConfigError(
            f'pipeline.schedule = "{schedule}" is neither a file nor one of {", ".join(["auto", GENERATED, *NAMED])}.'
        )
    if actions.rank_of != module.rank_of or actions.num_micro != num_micro:
        raise DeepSpeedConfigError(
            f'pipeline.schedule = "{schedule}" has stages on ranks {list(actions.rank_of)} and {actions.num_micro} micro-batches; the '
            f"module has them on {list(module.rank_of)}, a step {num_micro}.\n"
            '  Give PipelineModule num_chunks and placement="loop" or "v" as the schedule needs them.'
        )
    return actions
