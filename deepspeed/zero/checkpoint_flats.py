"""The flat pieces of memory in which this rank holds weights and optimizer states, with what lies where in them.

Used by `checkpoint`, which reads and writes them by chunks and knows nothing of buckets, runs or tiers. This is the one
place outside the optimizer that touches optimizer-side bytes for saving and loading.

    Flat("param")          a bucket's master [S], a frozen bucket's shard [S], or one unsharded frozen parameter
    Flat("optim.exp_avg")  one run's moment

Each says which parameter's elements lie at which position, and over how many ranks it is repeated, so that a save can
have every element written by exactly one of them.

Invariant: over all ranks, the spans of a kind's flats cover each parameter that has it `num_replicas` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.mesh.shape import Role
from deepspeed.optim.first_states import first_state
from deepspeed.optim.traits import AveragesItself, Needs, needs_of
from deepspeed.tiers import InMemory, Rest
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.layout import RunSpan
from deepspeed.zero.master import read
from deepspeed.zero.param import slot_of
from deepspeed.zero.plan import shared_over

if TYPE_CHECKING:
    from deepspeed.zero.build import Built
    from deepspeed.zero.optimizer import Master, ZeroOptimizer
    from deepspeed.zero.stream import Segment

PARAM = "param"
OPTIM = "optim."
"""Prefix of the kinds of optimizer states."""


@dataclass(frozen=True, slots=True)
class Span:
    """`numel` elements of the parameter `name` from `in_param` on lie at `at` in a flat."""

    name: str
    in_param: int
    at: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """One flat piece of memory. Repeated on `num_replicas` ranks, of which this is number `replica`."""

    kind: str
    dtype: torch.dtype
    spans: tuple[Span, ...]
    num_replicas: int
    replica: int
    read: Callable[[int, int], Tensor]
    """(position, numel) -> a 1-D CPU tensor; may be a view of the memory itself."""
    write: Callable[[int, Tensor], None]
    """(position, 1-D CPU tensor of any dtype): store it, rounded to `dtype`."""


@dataclass(frozen=True)
class RunValues:
    """What an optimizer keeps for a run besides tensors of its length: the same for all parameters with a piece in it."""

    names: tuple[str, ...]
    values: dict[str, Any]
    kinds: tuple[str, ...]
    """Kinds of the states that have the run's length."""


def _flat_of_rest(kind: str, rest: Rest, first: int, spans: Sequence[Span], replicas: tuple[int, int]) -> Flat:
    """The elements of a rest from `first` on, whatever tier it is on."""

    def write(at: int, values: Tensor) -> None:
        rest.start_store(first + at, values.to(rest.dtype).contiguous()).wait()

    def read_at(at: int, numel: int) -> Tensor:
        return read(rest, first + at, first + at + numel).cpu()

    return Flat(kind, rest.dtype, tuple(spans), *replicas, read_at, write)


def _flat_of_tensor(kind: str, tensor: Tensor, spans: Sequence[Span], replicas: tuple[int, int]) -> Flat:
    return _flat_of_rest(kind, InMemory(tensor.detach().view(-1)), 0, spans, replicas)


def weights(built: Built, module: nn.Module, mesh: Mesh) -> Iterator[Flat]:
    """Every parameter of the model: masters where it trains, the parameters themselves where not."""
    for master in built.masters:
        replicas = _replicas(mesh, master.is_sharded, master.bucket.over)
        yield _flat_of_rest(PARAM, master.weights, 0, _spans(master), replicas)
    trained = {id(master.bucket) for master in built.masters}
    for bucket in built.buckets:
        if id(bucket) not in trained:
            pieces = bucket.layout.pieces(bucket.exchange.rank) if bucket.is_sharded else ()
            spans = [
                Span(bucket.names[p.param], p.in_param, p.in_shard, p.numel)
                for p in pieces
                if p.param not in bucket.gone
            ]
            if not bucket.is_sharded:
                names, starts, numels = bucket.names, bucket.layout.starts, bucket.layout.numels
                spans = [Span(names[i], 0, starts[i], numels[i]) for i, _ in bucket.members()]
            rest = bucket.rest if bucket.is_sharded else InMemory(bucket.full)
            yield _flat_of_rest(PARAM, rest, 0, spans, _replicas(mesh, bucket.is_sharded, bucket.over))
    for name, param in module.named_parameters():
        if slot_of(param) is None:
            yield _placed(param, name, mesh)


def _placed(param: nn.Parameter, name: str, mesh: Mesh) -> Flat:
    values = param.detach()
    values = torch.view_as_real(values) if values.is_complex() else values
    replicas = _replicas(mesh, False, shared_over(param))
    if values.is_contiguous():
        return _flat_of_tensor(PARAM, values, [Span(name, 0, 0, values.numel())], replicas)

    def write(at: int, chunk: Tensor) -> None:
        whole = values.contiguous().view(-1)
        whole.narrow(0, at, chunk.numel()).copy_(chunk)
        values.copy_(whole.view_as(values))

    def read(at: int, numel: int) -> Tensor:
        return values.reshape(-1).narrow(0, at, numel).cpu()

    return Flat(PARAM, values.dtype, (Span(name, 0, 0, values.numel()),), *replicas, read, write)


def _replicas(mesh: Mesh, is_sharded: bool, over: Role) -> tuple[int, int]:
    if over == "expert_shard":
        return (1, 0) if is_sharded else (mesh.size(over), mesh.rank(over))
    if not is_sharded:
        return mesh.size("average"), mesh.rank("average")
    return mesh.size("replicate"), mesh.rank("replicate")


def _spans(master: Master) -> list[Span]:
    names, gone = master.bucket.names, master.bucket.gone
    pieces = (piece for piece in master.layout.pieces(master.rank) if piece.param not in gone)
    return [Span(names[p.param], p.in_param, p.in_shard, p.numel) for p in pieces]


class _Run(NamedTuple):
    """What the optimizer knows by one tensor: a run, a whole parameter, or a segment of a shard on a tier."""

    master: int
    """Its master's index."""
    group: int
    tensor: nn.Parameter
    start: int
    """First element in the master."""
    numel: int
    spans: list[Span]
    """Positions relative to the run."""
    segment: Segment | None

    def state_kinds(self, optimizer: ZeroOptimizer) -> list[str]:
        """Names of the states that have an element for each of the run's."""
        if self.segment is not None:
            return sorted(self.segment.states)
        state, private = optimizer.state.get(self.tensor, {}), private_states(optimizer)
        return [
            key
            for key, v in state.items()
            if isinstance(v, Tensor) and v.dim() > 0 and v.shape == self.tensor.shape and key not in private
        ]


def _runs(optimizer: ZeroOptimizer) -> Iterator[_Run]:
    for index, master in enumerate(optimizer.masters):
        segments = optimizer.runs.stream.segments(index) if optimizer.runs.stream is not None else ()
        for segment in segments:
            spans = _spans_within(master, segment.start, segment.stop)
            numel = segment.stop - segment.start
            yield _Run(index, segment.group, segment.param, segment.start, numel, spans, segment)
        for position, (group, tensor) in enumerate(optimizer.runs.steppable[index]):
            if optimizer.runs.gives_whole:
                start, numel = master.layout.starts[position], master.layout.numels[position]
                is_gone = position in master.bucket.gone
                spans = [] if is_gone else [Span(master.bucket.names[position], 0, 0, numel)]
            else:
                run = master.spans[position]
                start, numel, spans = run.start, run.stop - run.start, _spans_within(master, run.start, run.stop)
            yield _Run(index, group, tensor, start, numel, spans, None)  # type: ignore[arg-type]


def _spans_within(master: Master, start: int, stop: int) -> list[Span]:
    """What lies in the elements [start, stop) of a master, positions relative to `start`."""
    found = []
    for span in _spans(master):
        low, high = max(span.at, start), min(span.at + span.numel, stop)
        if low < high:
            found.append(Span(span.name, span.in_param + low - span.at, low - start, high - low))
    return found


def states(optimizer: ZeroOptimizer, mesh: Mesh) -> Iterator[Flat]:
    """Every optimizer state that has an element for each of the weights'."""
    for run in _runs(optimizer):
        owner = optimizer.masters[run.master]
        replicas = _replicas(mesh, owner.is_sharded, owner.bucket.over)
        for key in run.state_kinds(optimizer):
            if run.segment is not None:
                yield _flat_of_rest(
                    OPTIM + key, optimizer.runs.tiles.states[run.master][key], run.start, run.spans, replicas
                )
            else:
                # States keep the optimizer's memory format; a run or a bucket's view is always contiguous.
                yield _flat_of_tensor(OPTIM + key, optimizer.state[run.tensor][key], run.spans, replicas)


def run_values(optimizer: ZeroOptimizer) -> list[RunValues]:
    """What runs keep besides (`step`, factored moments, ...); runs that were never stepped are left out."""
    found = []
    for run in _runs(optimizer):
        state = optimizer.state.get(run.tensor, {})
        if state and run.spans:
            names = dict.fromkeys(span.name for span in run.spans)
            keys = run.state_kinds(optimizer)
            left_out = {*keys, *private_states(optimizer)}
            rest = {str(key): value for key, value in state.items() if key not in left_out}
            _check_values(optimizer, rest)
            found.append(RunValues(tuple(names), rest, tuple(OPTIM + key for key in keys)))
    return found


def private_states(optimizer: ZeroOptimizer) -> tuple[str, ...]:
    """States that are each rank's own, and so no part of what ranks save together."""
    inner = optimizer.optimizer
    return inner.private_states if isinstance(inner, AveragesItself) else ()


def _check_values(optimizer: ZeroOptimizer, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Tensor) and value.dim() > 0 and not optimizer.runs.gives_whole:
            raise CheckpointError(
                f"{type(optimizer.optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for a run of several parameters: "
                "neither one number nor one per element, so nobody can say which parameter it belongs to.\n"
                "  Save with ZeRO stage 0, where this optimizer steps whole parameters."
            )


def group_names(optimizer: ZeroOptimizer) -> list[list[str]]:
    """The names of each parameter group's parameters, also of those with no piece on this rank."""
    names: list[list[str]] = [[] for _ in optimizer.param_groups]
    for master in optimizer.masters:
        for i, _ in master.bucket.members():
            names[master.bucket.layout.groups[i]].append(master.bucket.names[i])
    return names


@dataclass(frozen=True)
class StateSpec:
    """The optimizer state to be loaded for one parameter: kinds with their stored dtypes, and the values besides."""

    dtypes: Mapping[str, torch.dtype]
    values: Any
    signature: str
    """Equal for parameters that may share a run."""


def renew_states(
    optimizer: ZeroOptimizer, mesh: Mesh, spec_of: Mapping[str, StateSpec], master_dtype_of: Mapping[str, torch.dtype]
) -> list[Flat]:
    """Replace the optimizer's state by tensors of the specified kinds, to be filled by the caller.

    Parameters that are not in `spec_of` have the state of a new optimizer, as if they had never been stepped. Where one run would have
    parameters of different specifications it is cut. `master_dtype_of` gives the dtype in which the weights were stored:
    states follow the weights' dtype where that changed, and keep their own otherwise.
    """
    had = dict(optimizer.state)
    optimizer.state.clear()
    _cut_runs(optimizer, spec_of)
    flats = []
    for run in _runs(optimizer):
        specs = [(span.name, spec_of[span.name]) for span in run.spans if span.name in spec_of]
        if run.segment is not None:
            run.segment.states.clear()
        if not specs:
            _make_first_state(optimizer, run)
            continue
        name, spec = specs[0]
        master = optimizer.masters[run.master]
        state: dict[str, Any] = {}
        group = optimizer.param_groups[run.group]
        on_device = bool(group.get("fused") or group.get("capturable"))
        for key, value in spec.values.items():
            if isinstance(value, Tensor):
                state[key] = value.to(run.tensor.device, copy=True) if on_device or value.dim() else value.clone()
            else:
                state[key] = value
        before = had.pop(run.tensor, {})
        optimizer.state[run.tensor] = state
        held = [span for span in run.spans if span.name in spec_of]
        replicas = _replicas(mesh, master.is_sharded, master.bucket.over)
        for kind, stored in spec.dtypes.items():
            keeps = master.weights.dtype == master_dtype_of[name] or not stored.is_floating_point
            key, dtype = kind.removeprefix(OPTIM), stored if keeps else master.weights.dtype
            if run.segment is not None:
                rest = optimizer.runs.tiles.adopt_state(run.master, run.segment, key, dtype)
                flats.append(_flat_of_rest(kind, rest, run.start, held, replicas))
            else:
                like = run.tensor.detach()
                state[key] = tensor = _reusable(before.get(key), like, dtype)
                if sum(span.numel for span in held) < tensor.numel():
                    tensor.zero_()
                flats.append(_flat_of_tensor(kind, tensor, held, replicas))
    return flats


def _make_first_state(optimizer: ZeroOptimizer, run: _Run) -> None:
    """Give a run what its optimizer's class gives a parameter when it is constructed; nothing, for most."""
    inner, tensor = optimizer.optimizer, run.tensor
    if run.segment is not None:  # whose own memory is a tile's, and comes with it
        tensor = nn.Parameter(torch.empty(run.numel, dtype=optimizer.masters[run.master].weights.dtype))
    for key, value in first_state(inner, tensor, run.group).items():
        if run.segment is None or not isinstance(value, Tensor) or value.shape != tensor.shape:
            optimizer.state[run.tensor][key] = value
            continue
        rest = optimizer.runs.tiles.adopt_state(run.master, run.segment, key, value.dtype)
        rest.start_store(run.start, value).wait()


def _reusable(before: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state that was there, whose memory need not be got from the system again, if it has the right form."""
    is_same = isinstance(before, Tensor) and (before.shape, before.stride()) == (like.shape, like.stride())
    if is_same and before.dtype == dtype and before.device == like.device:
        return before
    return torch.empty_like(like, dtype=dtype)


def _cut_runs(optimizer: ZeroOptimizer, spec_of: Mapping[str, StateSpec]) -> None:
    """Cut runs where neighbours have different specifications; only element-wise optimizers can work on parts."""
    if optimizer.runs.gives_whole or needs_of(optimizer.optimizer) not in (Needs.ELEMENTWISE, None):
        return
    for index, master in enumerate(optimizer.masters):
        wanted: list[RunSpan] = []
        for run in master.spans:
            previous: str | None = None
            for span in _spans(master):
                if not run.start <= span.at < run.stop:
                    continue
                spec = spec_of.get(span.name)
                signature = spec.signature if spec else ""
                if wanted and signature == previous:
                    wanted[-1] = RunSpan(run.group, wanted[-1].start, span.at + span.numel)
                else:
                    wanted.append(RunSpan(run.group, span.at, span.at + span.numel))
                previous = signature
        for span_ in wanted:
            if optimizer.runs.is_streamed(master):
                optimizer.runs.tiles.isolate(index, span_.start, span_.stop)
            else:
                optimizer.runs.isolate(index, span_.start, span_.stop)
