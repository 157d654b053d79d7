"""What the wrapped optimizer steps: *runs*, contiguous pieces of this rank's masters, and the states that go with them.

Owned by `zero.optimizer`; stepped by `zero.update`; read by checkpoints and by whoever asks for whole values. A run has
parameters of one group only. Where masters are in memory a run is a view of them; where they rest on a tier, `zero.stream` has
them in segments. An optimizer that looks at shapes is given whole parameters at stage 0.

    master    |-- group 0 ------------------|-- group 1 ------|
    runs      |-- run ------|p|--- run -----|-- run ----------|      p had no gradient in a step: a run of its own from then on

Invariant: every group of the wrapped optimizer lists its runs and no other tensors, and its state is kept by run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import Needs, needs_of
from deepspeed.utils.errors import DeepSpeedConfigError, TrainingStateError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.layout import RunSpan
from deepspeed.zero.master import Master, read
from deepspeed.zero.param import slot_of
from deepspeed.zero.placing import Placing
from deepspeed.zero.run_states import RunStates
from deepspeed.zero.stream import TileStream
from deepspeed.zero.untested import check_untested
from deepspeed.zero.whole_parameters import RunSharding


class Members(list[Tensor]):
    """The runs of one parameter group, which also answers for the model's parameters that lie in them."""

    def __init__(self, runs: Iterable[Tensor], owner: Runs, group: int) -> None:
        super().__init__(runs)
        self._owner, self._group = owner, group

    def __contains__(self, tensor: object) -> bool:
        if any(run is tensor for run in self):
            return True
        slot = slot_of(tensor) if isinstance(tensor, nn.Parameter) else None
        return (
            slot is not None and self._owner.has(slot.bucket) and slot.bucket.layout.groups[slot.index] == self._group
        )

    def __reduce__(self) -> Any:
        """A copy is a plain list."""
        return list, (list(self),)


@final
class Runs:
    """The runs of one wrapped optimizer over `masters`, which grows. `gradients[i]` are those of `masters[i]`.

    is_sharded: each rank has a shard of every master, rather than all of it. Raises DeepSpeedConfigError where the optimizer
    is not known to step pieces rightly, unless `allow_untested`, and for tiers that it cannot be streamed from.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: list[Master],
        gradients: Sequence[Gradients],
        mesh: Mesh,
        *,
        is_sharded: bool,
        sub_group_numel: int,
        placing: Placing | None,
        allow_untested: bool,
        zero_stage: int,
    ) -> None:
        self.optimizer, self.masters, self.gradients, self.mesh = optimizer, masters, gradients, mesh
        self.is_sharded, self.sub_group_numel = is_sharded, sub_group_numel
        self.is_away = False
        """Whether `engine.offload_states` has put masters or states away."""
        self.stream: TileStream | None = None
        """The step of masters that rest on a tier, if there are any."""
        needs = needs_of(optimizer)
        if needs is None and is_sharded:
            check_untested(optimizer, zero_stage, allow_untested)
        self.gives_whole = not is_sharded and needs is not Needs.ELEMENTWISE
        """Whether runs are whole parameters in their shapes."""
        self.refuse_tiers()
        self._given = [list(group["params"]) for group in optimizer.param_groups]
        self._placing = placing if needs is Needs.ELEMENTWISE or (needs is None and allow_untested) else None
        self.steppable: list[list[tuple[int, Tensor]]] = []
        """Per master in the device's memory, (group, tensor) that the wrapped optimizer steps; else none."""
        self._numbers: dict[Bucket, int] = {}
        """Where in that list a bucket's are."""
        self.refresh()
        if optimizer.state:
            warn_once(
                f"{type(optimizer).__name__} was given with state from earlier steps; it starts anew, since its parameters "
                "are laid out differently now."
            )
        optimizer.state.clear()
        self.show_states()

    def show_states(self) -> None:
        """Have states be found by the model's parameters, too, in the dictionary that the optimizer has now."""
        state = self.optimizer.state
        if isinstance(state, RunStates):
            state.dropped.clear()
        else:  # a script may have set another
            self.optimizer.state = RunStates(state, self)

    def has(self, bucket: Bucket) -> bool:
        """Whether a bucket's masters are stepped."""
        return bucket in self._numbers

    def place_of(self, tensor: object) -> tuple[int, int] | None:
        """(number of its master, index there) of a parameter of the model that is stepped; None for anything else."""
        slot = slot_of(tensor) if isinstance(tensor, nn.Parameter) else None
        number = None if slot is None else self._numbers.get(slot.bucket)
        return None if slot is None or number is None else (number, slot.index)

    def has_whole(self, index: int) -> bool:
        """Whether this rank has all of a master's states, in memory."""
        master = self.masters[index]
        return master.layout.world_size == 1 and not self.is_streamed(master)

    def _positions(self, index: int, param: int) -> list[tuple[int, int]]:
        """[start, stop) of this rank's pieces of one parameter in a master's shard."""
        pieces = self.masters[index].layout.pieces(self.masters[index].rank)
        return [(piece.in_shard, piece.in_shard + piece.numel) for piece in pieces if piece.param == param]

    def has_any_state(self, index: int, param: int) -> bool:
        """Whether a parameter has states; where this rank has no element of it, whether others of its bucket have."""
        starts = [start for start, _ in self._positions(index, param)]
        if not starts:
            return bool(self.state_kinds(index))
        if self.is_streamed(self.masters[index]):
            mine = [s for s in self.tiles.segments(index) if any(s.start <= start < s.stop for start in starts)]
            return any(self.optimizer.state.get(segment.param) for segment in mine)
        return any(self.has_state(index, kind, start) for kind in self.state_kinds(index) for start in starts)

    def runs_of(self, index: int, param: int) -> list[Tensor]:
        """This rank's runs of one parameter, which are nothing else's from now on."""
        if self.gives_whole:
            return [self.steppable[index][param][1]]
        positions = self._positions(index, param)
        if self.is_streamed(self.masters[index]):
            return [segment.param for start, stop in positions for segment in self.tiles.isolate(index, start, stop)]
        return [self.steppable[index][self.isolate(index, start, stop)][1] for start, stop in positions]

    def refresh(self) -> None:
        """Make the runs of masters that have none yet, and have every group list its own: those and no other tensors."""
        if self.stream is not None:
            self.stream.add()
        elif self._placing is not None and any(master.is_streamed for master in self.masters):
            self.stream = TileStream(self.optimizer, self.masters, self.gradients, self._placing, self.sub_group_numel)
        for master in self.masters[len(self.steppable) :]:
            mine = self._cut(master)
            self._numbers[master.bucket] = len(self.steppable)
            self.steppable.append([(group, nn.Parameter(tensor, requires_grad=True)) for group, tensor in mine])
        tensors = self.by_group()
        for i, (param_group, members) in enumerate(zip(self.optimizer.param_groups, tensors, strict=True)):
            param_group["params"] = Members(members, self, i)
        if needs_of(self.optimizer) in (Needs.PARAMETER_NORMS, Needs.WHOLE_MATRICES) and not self.gives_whole:
            self.optimizer.sharding = RunSharding(self.masters, self.steppable, self.mesh, is_sharded=self.is_sharded)  # type: ignore[attr-defined]

    def give_back(self) -> None:
        """Have the optimizer list parameters again, as it was given: another engine may take it. Its state is of runs, and ends."""
        for group, params in zip(self.optimizer.param_groups, self._given, strict=False):
            group["params"] = list(params)
        self.optimizer.state = defaultdict(dict)

    def _cut(self, master: Master) -> list[tuple[int, Tensor]]:
        """(group, piece of the masters) as the wrapped optimizer steps them, where they are in memory."""
        if self.gives_whole:
            return master.whole_params()
        if self.is_streamed(master):
            return []
        return [(s.group, master.tensor.narrow(0, s.start, s.stop - s.start)) for s in master.spans]

    def follow_memory(self, bucket: Bucket) -> None:
        """A bucket has other memory: masters that are its parameters, and their runs, are there now."""
        for i, master in enumerate(self.masters):
            if master.bucket is bucket and master.is_alias:
                master.follow_memory()
                for (_, run), (_, piece) in zip(self.steppable[i], self._cut(master), strict=True):
                    run.data = piece
                if self.stream is not None:
                    self.stream.show(i)

    def by_group(self) -> list[list[Tensor]]:
        """Per group, the tensors that its `params` has to list."""
        tensors: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        for i in range(len(self.masters)):
            streamed = self.stream.segments(i) if self.stream else ()
            for group, tensor in [*self.steppable[i], *((segment.group, segment.param) for segment in streamed)]:
                tensors[group].append(tensor)
        return tensors

    def refuse_tiers(self) -> None:
        """Optimizers that ask for more than elements cannot stream tile by tile from a disk."""
        needs = needs_of(self.optimizer)
        if needs in (Needs.PARAMETER_NORMS, Needs.WHOLE_MATRICES) and any(m.tier.is_on_disk for m in self.masters):
            raise DeepSpeedConfigError(
                f"{type(self.optimizer).__name__} needs {needs.value}, but on the nvme tier a step sees one tile at a time.\n"
                '  Use "offload_optimizer": {"device": "cpu"}, or an element-wise optimizer such as Adam.'
            )

    def is_streamed(self, master: Master) -> bool:
        """Whether a master's runs are stepped tile by tile."""
        return self.stream is not None and master.is_streamed

    @property
    def tiles(self) -> TileStream:
        """The stream of a master that `is_streamed`."""
        assert self.stream is not None, "masters that rest on a tier are stepped by a stream"
        return self.stream

    def isolate(self, index: int, start: int, stop: int) -> int:
        """Have the elements [start, stop) of a shard be a run of their own; returns its position."""
        master, steppable = self.masters[index], self.steppable[index]
        position = next(i for i, span in enumerate(master.spans) if span.start <= start and stop <= span.stop)
        span, (group, old) = master.spans[position], steppable[position]
        cuts = [(a, b) for a, b in ((span.start, start), (start, stop), (stop, span.stop)) if a < b]
        if len(cuts) == 1:
            return position
        state = self.optimizer.state.pop(old, {})
        made = []
        for a, b in cuts:
            run = nn.Parameter(master.tensor.narrow(0, a, b - a), requires_grad=True)
            run.grad = None if old.grad is None else old.grad.narrow(0, a - span.start, b - a)
            if state:
                self.optimizer.state[run] = {key: _cut_value(v, old, a - span.start, b - a) for key, v in state.items()}
            made.append((group, run))
        master.spans = (
            *master.spans[:position],
            *(RunSpan(group, a, b) for a, b in cuts),
            *master.spans[position + 1 :],
        )
        steppable[position : position + 1] = made
        params = self.optimizer.param_groups[group]["params"]
        at = next(i for i, tensor in enumerate(params) if tensor is old)
        params[at : at + 1] = [run for _, run in made]
        return position + cuts.index((start, stop))

    @property
    def nbytes(self) -> int:
        """Bytes of masters (but for those that are the parameters) and states, on whatever tier."""
        on_tier = [rest for states in self.stream.states for rest in states.values()] if self.stream else []
        rests = [*on_tier, *(master.weights for master in self.masters if not master.is_alias)]
        tensors = [tensor for members in self.steppable for _, tensor in members]
        resident = [value for tensor in tensors for value in self.optimizer.state.get(tensor, {}).values()]
        return sum(rest.numel * rest.dtype.itemsize for rest in rests) + sum(
            value.nbytes for value in resident if isinstance(value, Tensor) and value.dim() > 0
        )

    # States. -------------------------------------------------------------------------------------------------------

    def state_kinds(self, index: int) -> list[str]:
        """Names of the states that are as long as the masters of one bucket: "exp_avg", ...; none before the first step."""
        if self.is_streamed(self.masters[index]):
            return list(self.tiles.states[index])
        found: dict[str, None] = {}
        for _, tensor in self.steppable[index]:
            state = self.optimizer.state.get(tensor, {})
            found.update((k, None) for k, v in state.items() if isinstance(v, Tensor) and v.shape == tensor.shape)
        return list(found)

    def require_here(self) -> None:
        """Raise TrainingStateError, on every rank alike, while masters or states are put away."""
        if self.is_away:
            raise TrainingStateError(
                "masters or states were put away by engine.offload_states.\n  Call engine.reload_states() first."
            )

    def has_state(self, index: int, kind: str, position: int) -> bool:
        """Whether element `position` of a master's shard has a state of this kind."""
        if self.is_streamed(self.masters[index]):
            return any(s.start <= position < s.stop and kind in s.states for s in self.tiles.segments(index))
        try:
            self._state_around(index, kind, position)
        except KeyError:
            return False
        return True

    def read_state(self, index: int, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a master's shard, of `kind` "master" or one of `state_kinds`: a view where they are in
        memory. They lie in one run. Raises KeyError for a state that does not exist."""
        master = self.masters[index]
        self.require_here()
        if kind == "master":
            return read(master.weights, start, stop)
        if self.is_streamed(master):
            return read(self.tiles.states[index][kind], start, stop)
        span_start, value = self._state_around(index, kind, start)
        return value.view(-1)[start - span_start : stop - span_start]

    def write_state(self, index: int, kind: str, start: int, values: Tensor) -> None:
        """Replace the elements from `start` on; see `read_state`. The caller has asked `require_here`."""
        master = self.masters[index]
        rest = master.weights if kind == "master" else None
        if rest is None and self.is_streamed(master):
            rest = self.tiles.states[index][kind]
        if rest is not None:
            rest.start_store(start, values.to(rest.dtype).contiguous()).wait()
        else:
            self.read_state(index, kind, start, start + values.numel()).copy_(values)

    def _state_around(self, index: int, kind: str, position: int) -> tuple[int, Tensor]:
        """The state tensor that holds element `position` of the shard, and its first element's position."""
        master = self.masters[index]
        layout = master.layout
        starts = layout.starts if self.gives_whole else [span.start for span in master.spans]
        for start, (_, tensor) in zip(starts, self.steppable[index], strict=True):
            if start <= position < start + tensor.numel():
                return start, self.optimizer.state[tensor][kind]
        raise KeyError(kind)


def _cut_value(value: Any, old: Tensor, start: int, numel: int) -> Any:
    """A piece of an optimizer state: of tensors as long as the run a view, of everything else a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.narrow(0, start, numel) if value.shape == old.shape else value.clone()
