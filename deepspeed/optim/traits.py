"""What an optimizer must see of a parameter, and how it asks when it is given pieces.

Asked by ZeRO before it hands an optimizer its shard; implemented by the optimizers of this package.

ZeRO steps optimizers on *runs*: contiguous 1-D pieces of a rank's flat shard, each holding pieces of several parameters.

    run      |--- end of p3 ---|------- p4 -------|-- start of p5 --|     one tensor in the optimizer's param_groups
    pieces   index 3             index 4            index 5

Adam does not care: its update is element-wise. LAMB needs norms of whole parameters, Muon needs whole matrices. Those
declare it (`needs`) and ask `sharding`, which ZeRO installs; where it is None every tensor is a whole parameter.

1-bit optimizers average between ranks by themselves, whole parameters at a time, and keep what compression leaves out:
OWN_REDUCTION. ZeRO then gives them each rank's own gradients where they ask for those (`AveragesItself`), and a way to whole
parameters and to other ranks (`OwnReduction`).

Where optimizer state rests in main memory or on disk, ZeRO hands the same runs over with their gradients as they were
reduced and takes the low-precision parameters in the same pass: `StepsFused`.

Invariant: an optimizer that declares PARAMETER_NORMS or WHOLE_MATRICES calls the collectives of `Sharding` in the same
order on every rank, also where a rank holds no run; and it is stepped with all its runs at once.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from deepspeed.optim.ranges import check_ranges
from deepspeed.utils.compiler import hidden_if_loaded
from deepspeed.utils.errors import NotAvailableError


class Needs(enum.Enum):
    """What an optimizer must see of a parameter to update a part of it."""

    ELEMENTWISE = "each element on its own"
    PARAMETER_NORMS = "the norms of the whole parameter and of its update"
    WHOLE_MATRICES = "the whole parameter in its shape"
    OWN_REDUCTION = "each rank's own gradient of the whole parameter, which it averages by itself"


@dataclass(frozen=True, slots=True)
class RunPiece:
    """The interval [run_start, run_stop) of a run, which holds elements from `param_start` on of a flattened parameter.

    `index` names the parameter, the same on every rank, unique over the model; `shape` is the whole parameter's.
    """

    index: int
    shape: torch.Size
    run_start: int
    run_stop: int
    param_start: int

    def of_run(self, tensor: Tensor) -> Tensor:
        """This piece as a view of `tensor`, which has the run's elements; the tensor itself where it is one piece."""
        return tensor if self.run_stop - self.run_start == tensor.numel() else tensor[self.run_start : self.run_stop]

    def of_param(self, full: Tensor) -> Tensor:
        """The same elements taken from the whole parameter, 1-D."""
        return full.flatten()[self.param_start : self.param_start + self.run_stop - self.run_start]


class Sharding(Protocol):
    """Where the pieces of parameters lie in an optimizer's runs, and what other ranks hold of them."""

    num_params: int
    """Parameters of the model; every `RunPiece.index` is below it."""

    def pieces(self, run: Tensor) -> Sequence[RunPiece]:
        """The pieces in a run, in order."""

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share parameters of `values` [num_params, ...]. Collective.

        A rank without runs passes zeros on the CPU.
        """

    def gather(self, runs: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Whole values, shaped, of every parameter that has a piece in `runs` here; `values[i]` is like `runs[i]`.

        Collective, in the same order on every rank, also with no runs.
        """


class RunSpan(NamedTuple):
    """run[start:stop] of an optimizer's run are the elements from `first` on of a flattened parameter."""

    run: Tensor
    start: int
    stop: int
    first: int

    def of_run(self, tensor: Tensor) -> Tensor:
        """This part as a 1-D view of `tensor`, which has the run's elements."""
        return tensor.view(-1)[self.start : self.stop]

    def of_param(self, flat: Tensor) -> Tensor:
        """The same elements of the whole parameter, flattened."""
        return flat[self.first : self.first + self.stop - self.start]


class Whole(NamedTuple):
    """A whole parameter as a rank sees it that holds it in part, or not at all."""

    shape: torch.Size
    group: dict[str, Any]
    state: dict[str, Any]
    """What is known of it on every rank alike (`step`), and errors, which are each rank's own."""
    read: Callable[[], Tensor]
    """This step's gradient on this rank, flat, unscaled, in at least fp32; may be written over."""
    spans: Sequence[RunSpan]
    """What of it lies in the runs of this rank."""


class OwnReduction(Protocol):
    """How an optimizer that averages by itself reaches whole parameters and other ranks."""

    num_ranks: int

    @property
    def num_steps(self) -> int:
        """Steps of the parameter that has had most of them, the same on every rank."""

    def parameters(self) -> Sequence[Whole]:
        """The parameters with a gradient on any rank in this step, in one order on every rank."""

    def momentum(self, whole: Whole) -> Tensor:
        """Its `exp_avg`, flat, whole on every rank; what is written there is taken by `end_step`. Collective at the first call
        after a load or a step that was not ended."""

    def end_step(self, wholes: Sequence[Whole]) -> None:
        """Count a step of each of these, and take what was written into their `momentum` into the runs' states."""

    def total(self, values: Tensor) -> Tensor:
        """[...] on the CPU, summed over the ranks that share parameters. Collective where there are some."""

    def largest(self, values: Tensor) -> Tensor:
        """The same with the largest."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over ranks, in place, in full precision. Collective."""

    def average_signs(self, tensors: Sequence[Tensor], owners: Sequence[dict[str, Any]]) -> None:
        """The mean over ranks, in place, by signs and scales; `owners[i]` keeps tensor i's `worker_error` and `server_error`,
        which begin as zeros. Collective."""


class AveragesItself(abc.ABC):
    """Optimizers with Needs.OWN_REDUCTION. Whoever steps them installs `reduction`."""

    reduction: OwnReduction | None = None
    private_states: ClassVar[tuple[str, ...]] = ("worker_error", "server_error")
    """States that are each rank's own, whatever their length."""
    run_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    """States that have an element for each of a run's."""
    needs_whole_states: ClassVar[bool] = False
    """Whether it steps whole parameters on every rank, so that masters and states cannot be sharded."""
    common: dict[str, Any]
    """What is kept of all parameters together and is each rank's own: errors of one large buffer."""

    def nbytes_beside(self, num_ranks: int, is_sharded: bool) -> float:
        """Bytes that each of several ranks keeps per element of a whole parameter beside `run_states`, once it averages by itself:
        errors of both hops, and all of the momentum where the run's is a shard."""
        return 4 + 4 / num_ranks + (4 if is_sharded else 0) if num_ranks > 1 else 0

    @property
    def has_diverged(self) -> bool:
        """Whether weights and momenta are each rank's own at the moment, between two averages."""
        return False

    @property
    @abc.abstractmethod
    def takes_local(self) -> bool:
        """Whether the next step wants each rank's own gradients rather than their mean. The same on every rank."""

    @property
    @abc.abstractmethod
    def agreed_settings(self) -> dict[str, Any]:
        """What has to be the same on every rank."""


class WholeParameters:
    """The sharding of an optimizer that holds whole parameters: one piece each, nothing to ask other ranks."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._index = {id(tensor): i for i, tensor in enumerate(tensors)}
        self.num_params = len(self._index)

    def pieces(self, run: Tensor) -> Sequence[RunPiece]:
        """The parameter itself."""
        return (RunPiece(self._index[id(run)], run.shape, 0, run.numel(), 0),)

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """`values`: there is one shard."""
        return values

    def gather(self, runs: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Tensor]:
        """The values by their parameter's index."""
        return {self._index[id(run)]: value for run, value in zip(runs, values, strict=True)}


class ShardableOptimizer(torch.optim.Optimizer):
    """Base of this package's optimizers: they say what they need, and work on runs as on whole parameters."""

    needs: ClassVar[Needs]
    sharding: Sharding | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may come from another optimizer; keys unknown here stay in it without effect.

        Raises NotAvailableError (a RuntimeError) for a switch that would change the update and that we do not have,
        DeepSpeedError for a setting outside its range.
        """
        check_ranges({**self.defaults, **param_group}, f"{type(self).__name__}: ")
        for switch in ("amsgrad", "maximize"):
            if param_group.get(switch, self.defaults.get(switch)):
                name = type(self).__name__
                raise NotAvailableError(
                    f"{name} does not support {switch}=True.\n"
                    f"  Leave {switch} out, or use an optimizer of torch.optim that has it."
                )
        hidden_if_loaded(torch.optim.Optimizer.add_param_group)(self, param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but keep the dtype of the state: torch would cast fp32 moments down to bf16 parameters."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(ids, self._tensors(), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device)

    def _tensors(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _sharding(self) -> Sharding:
        return self.sharding if self.sharding is not None else WholeParameters(self._tensors())


@dataclass(frozen=True, slots=True)
class FusedRun:
    """A run to step in one pass over memory. 1-D CPU tensors of one numel, without gaps.

    `master` (fp32, or the parameters themselves in bf16 or fp16) is the key in `optimizer.state`; `grad` may be fp32,
    bf16 or fp16, whatever the master is; `low`, bf16 or fp16, receives the new parameters rounded to nearest even.
    """

    master: Tensor
    grad: Tensor
    low: Tensor | None = None


class StepsFused(abc.ABC):
    """Optimizers that update runs in main memory from gradients of any precision.

    State is in `optimizer.state[run.master]`, ordinary tensors that are looked up anew at every call: a caller may
    replace them between calls by others with the same values, such as views of a buffer that streams from disk. What is
    missing of them starts at zero. Each run counts its own steps, so that a call may cover any part of the runs (all of
    them, where `needs` is not ELEMENTWISE).
    """

    @property
    @abc.abstractmethod
    def state_names(self) -> dict[str, torch.dtype]:
        """The state tensors of a run that have its numel, and their dtypes where this optimizer makes them."""

    @abc.abstractmethod
    def step_fused(self, runs: Sequence[tuple[dict[str, Any], FusedRun]], grad_factor: float) -> None:
        """One step of each (parameter group, run), from `grad * grad_factor`. Gradients stay as they are.

        Raises DeepSpeedError for tensors elsewhere than in main memory or that do not fit their master.
        """


def needs_of(optimizer: torch.optim.Optimizer) -> Needs | None:
    """What an optimizer must see of a parameter; None where nobody has said (LBFGS, Adafactor, other packages').

    A class says it with a `needs` attribute. The classes of torch.optim are known here, by exact type: a subclass may
    do anything in its `step`.
    """
    declared = getattr(type(optimizer), "needs", None)
    if isinstance(declared, Needs):
        return declared
    return Needs.ELEMENTWISE if type(optimizer) in _ELEMENTWISE else None


def steps_rows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes sparse gradients alone, and leaves rows alone that they do not list."""
    return isinstance(optimizer, torch.optim.SparseAdam)


_ELEMENTWISE = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)


def with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """A group's tensors that have a gradient, and those gradients, each in its tensor's memory order.

    The fused kernels walk memory and never look at strides, so a gradient laid out otherwise would be applied to the
    wrong elements without a word.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise NotAvailableError(
                f"the gradient of a parameter of shape {tuple(param.shape)} is sparse, this optimizer updates dense "
                "tensors only.\n  Make the embedding with sparse=False, or use torch.optim.SparseAdam."
            )
        params.append(param)
        grads.append(grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad))
    return params, grads


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The loss that torch's optional `closure` computes, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
