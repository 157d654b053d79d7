"""What a parameter is beyond data parallelism: cut over some mesh dims, repeated over others, an expert's.

Written by whoever makes such a parameter (tensor parallel layers, expert layers, pipeline stages with tied weights);
read by the plan of buckets, the gradient norm and checkpoints, which need to know nothing else about those features.

    a column of a Linear, tp 2        cuts=(Cut("tp", 0, ((0, 512),)),)            (0, 512): the rows this rank holds
    fused q, k, v, rank 1 of tp 2     cuts=(Cut("tp", 0, ((64, 128), (192, 256), (320, 384))),)
    a norm's weight inside of tp      nothing: the same value and gradient on every tp rank
    ... on part of the sequence       summed_over=("tp",): the same value, but each rank's gradient is a part of the sum
    expert 5 of 8, ep 4               expert=Expert(5, 8)
    a tied head on the last stage     counts=False, and True on the first stage that has it

Contract for readers. A parameter without a mark is the same on all ranks of the "model" role that have it, and its
gradient is too. Over a dim that a cut names, every rank has a piece of its own: squares of gradients are summed over
it. Over every other "model" dim the parameter is repeated: its squares count once, on the first rank (`counts_here`).
`pp` is the exception: a stage's parameters are its own unless `repeated_over` says that other stages hold them too.
An expert's gradient is averaged over "expert_shard" instead of "average", and its norm is summed over "experts".

Invariant: a mark is set once, before `deepspeed.initialize`, and does not change. It lives on the parameter object and
goes with it through ZeRO, which changes a parameter's class and memory but never the object.
Attributes of Megatron-LM (`tensor_model_parallel`, `model_parallel`) are read as a cut over tp of unknown position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.mesh.shape import Dim, MeshShape
from deepspeed.utils.errors import DeepSpeedError

_ATTRIBUTE = "_mesh_mark"
EXPERT_DIM: Dim = "ep"
"""The dim over which tensors of all experts of a layer are cut, for those who make such marks."""
_MEGATRON = ("tensor_model_parallel", "model_parallel")


@dataclass(frozen=True, slots=True)
class Cut:
    """This rank holds, over mesh dim `over`, the index ranges `ranges` of the whole tensor's dimension `dim`, in order.

    `whole` is that dimension's size in the whole tensor. Empty `ranges`: the position is not known (Megatron's flag);
    such a parameter trains, but cannot be put into a checkpoint for another number of ranks.
    """

    over: Dim
    dim: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Expert:
    """The global number of the expert that a parameter belongs to, of how many in its layer, in the layer's group."""

    index: int
    count: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """One parameter's own dims; see the module's text for what readers take from it."""

    cuts: tuple[Cut, ...] = ()
    summed_over: tuple[Dim, ...] = ()
    repeated_over: tuple[Dim, ...] = ()
    expert: Expert | None = None
    counts: bool | None = None
    """Of a parameter that some stages of a pipeline share: whether this one's squares count. None: by `repeated_over`."""

    @property
    def cut_over(self) -> tuple[Dim, ...]:
        """The dims over which ranks hold different pieces, each once."""
        return tuple(dict.fromkeys(cut.over for cut in self.cuts))

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to an expert that other ranks of the "experts" role do not hold."""
        return self.expert is not None

    def counts_here(self, shape: MeshShape, rank: int) -> bool:
        """Whether this rank's squares go into a norm that is summed over the "model" role: on one rank per piece."""
        repeated: tuple[Dim, ...] = (*(() if "tp" in self.cut_over else ("tp",)), *self.repeated_over)
        return self.counts is not False and all(shape.ranks((dim,), rank)[0] == rank for dim in dict.fromkeys(repeated))


PLAIN = Mark()
"""Of a parameter that nobody marked."""


def mark(param: nn.Parameter, made: Mark) -> None:
    """Mark a parameter, once. Raises DeepSpeedError for another mark than it has, and for ranges that do not fit it."""
    before = param.__dict__.get(_ATTRIBUTE)
    if before is not None and before != made:
        raise DeepSpeedError(f"a parameter of shape {tuple(param.shape)} is marked {before} already, and now {made}.")
    for cut in made.cuts:
        held = sum(end - start for start, end in cut.ranges)
        if cut.ranges and (not 0 <= cut.dim < param.dim() or held != param.shape[cut.dim]):
            raise DeepSpeedError(
                f"a parameter of shape {tuple(param.shape)} cannot hold the indices {list(cut.ranges)} of dimension {cut.dim}: "
                f"they are {held}."
            )
    param.__dict__[_ATTRIBUTE] = made


def cut_further(param: nn.Parameter, cut: Cut) -> None:
    """Mark a parameter as cut, beside what it is already: a matrix of experts of which each rank has some columns."""
    before = of(param)
    param.__dict__.pop(_ATTRIBUTE, None)
    mark(param, replace(before, cuts=(*before.cuts, cut)))


def carry_over(source: Any, target: Any) -> None:
    """Have `target`, made of what `source` was, bear its mark."""
    if _ATTRIBUTE in getattr(source, "__dict__", {}):
        target.__dict__[_ATTRIBUTE] = source.__dict__[_ATTRIBUTE]


def own_part(values: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """Of a whole tensor what this rank holds; one of another size as it is."""
    for cut in cuts:
        if cut.ranges and cut.dim < values.dim() and values.shape[cut.dim] == cut.whole:
            values = torch.cat([values.narrow(cut.dim, a, b - a) for a, b in cut.ranges], dim=cut.dim)
    return values


def load_own_parts(module: nn.Module) -> None:
    """Have `load_state_dict` take whole tensors where the module's own parameters are cut: each rank its part."""
    module._register_load_state_dict_pre_hook(take_own_parts, with_module=True)


def take_own_parts(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Of whole tensors in a state dict, leave this rank's parts for the module's own parameters."""
    for name, param in module._parameters.items():
        if isinstance(state.get(prefix + name), Tensor) and (cuts := of(param).cuts):
            state[prefix + name] = own_part(state[prefix + name], cuts)


def load_own_experts(experts: nn.ModuleList, first: int, num_experts: int) -> None:
    """Have `load_state_dict` take all `num_experts` experts for a list that has those from `first` on: each rank its own."""
    experts._register_load_state_dict_pre_hook(partial(_take_own_experts, first, len(experts), num_experts))


def _take_own_experts(
    first: int, num_here: int, num_experts: int, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    own = [key for key in state if key.startswith(prefix)]
    number_of = {key: int(head) for key in own if (head := key[len(prefix) :].partition(".")[0]).isdecimal()}
    if num_here == num_experts or len(set(number_of.values())) != num_experts:
        return
    whole = {key: state.pop(key) for key in number_of}
    for key, value in whole.items():
        if 0 <= (here := number_of[key] - first) < num_here:
            state[f"{prefix}{here}.{key[len(prefix) :].partition('.')[2]}"] = value


def mark_expert(param: nn.Parameter, expert: Expert) -> None:
    """Mark a parameter as an expert's, beside what it is already: a column of a layer that its script has cut."""
    param.__dict__[_ATTRIBUTE] = replace(of(param), expert=expert)


def mark_tied(param: nn.Parameter, *, counts: bool) -> None:
    """Mark a parameter that other stages of the pipeline have too; beside what it is already. `counts`: on one of them."""
    param.__dict__[_ATTRIBUTE] = replace(of(param), counts=counts)


def of(param: Any) -> Mark:
    """A parameter's mark; PLAIN without one."""
    made = getattr(param, "__dict__", {}).get(_ATTRIBUTE)
    if made is None:
        is_cut = any(getattr(param, "__dict__", {}).get(name) is True for name in _MEGATRON)
        return Mark(cuts=(Cut("tp"),)) if is_cut else PLAIN
    assert isinstance(made, Mark), f"not a mark: {made!r}"
    return made
