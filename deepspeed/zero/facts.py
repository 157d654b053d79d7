"""What a script may change about a model between steps, and whether it did: facts, and what has become of them.

Held by `zero.takeover`, which asks once per step and acts. A parameter is a view of its bucket, its master follows its
value, its optimizer group was read when the engine was made. A script that assigns, writes, unfreezes, adds or deletes
says nothing to anybody; so each of these is a *fact*, written down when it was last true and compared where a step begins.

    Tree       which parameters the modules have, by identity          added, removed, replaced
    Flags      `requires_grad` of parameters that do not train         unfrozen, or given a gradient all the same
    Memory     each parameter is the very view of its bucket           `param.data = ...`, `.to(...)`
    Versions   torch's version counters                                written in place
    Groups     the optimizer's groups and what they list               `add_param_group`, edited lists
    Prints     sums of samples of whole buckets                    written through `.data`, maybe on one rank alone
    Seal       a digest of parameters that have separate masters       written in place, also through `.data`

The first five are comparisons of addresses, flags and counters on the host. The seal is computed on the device, where the
parameters are, and read after the host has waited for the norm anyway: `.data` and collectives bypass the counters.

Invariant: nothing here changes anything of the model's; ranks whose scripts did the same see the same.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.kernels.native_watch import watch
from deepspeed.zero.bucket import Bucket, is_view
from deepspeed.zero.build import Built
from deepspeed.zero.master import Master
from deepspeed.zero.param import grads_of, slot_of
from deepspeed.zero.prints import Prints

WORD_COLUMNS = 127
"""A seal adds 8-byte words up in so many columns; a prime, so that rows of a matrix that change places do not cancel."""


TREE_EVERY = 16
"""Steps from one look at the model's tree to the next."""


class Kind(enum.Enum):
    """What can become of a parameter between two steps."""

    ADDED = "is new in the model"
    REMOVED = "has left the model"
    TRAINS = "begins to train"
    ASSIGNED = "was given other data"
    WRITTEN = "was written in place"
    GRADIENT = "was given a gradient"


@dataclass(frozen=True, slots=True)
class Change:
    """One parameter's. `detail` belongs to the description that ranks compare."""

    kind: Kind
    name: str
    param: nn.Parameter
    detail: str = ""

    @property
    def line(self) -> str:
        """What ranks compare."""
        return f"{self.name} {self.kind.value}{self.detail}"


class Fact(abc.ABC):
    """Something that was true when it was last renewed."""

    @abc.abstractmethod
    def renew(self) -> None:
        """Write down what is true now."""

    @property
    @abc.abstractmethod
    def has_changed(self) -> bool:
        """Whether it is true no more. Cheap: asked in every step."""


class Tree(Fact):
    """Which modules and parameters the model has, by identity."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.renew()

    def renew(self) -> None:
        self._modules = [
            (module._parameters, list(map(id, module._parameters.values())), module._modules, _ids(module._modules))
            for module in self._root.modules()
        ]
        self.names = {param: name for name, param in self._root.named_parameters()}
        """The first name of every parameter."""

    @property
    def has_changed(self) -> bool:
        for params, param_ids, children, child_ids in self._modules:
            if list(map(id, params.values())) != param_ids or ((children or child_ids) and _ids(children) != child_ids):
                return True
        return False

    def changes(self) -> list[Change]:
        """Parameters that came and went since the last renewal."""
        now = {param: name for name, param in self._root.named_parameters()}
        added = [
            Change(Kind.ADDED, name, param, f" {tuple(param.shape)}")
            for param, name in now.items()
            if param not in self.names
        ]
        return added + [Change(Kind.REMOVED, name, param) for param, name in self.names.items() if param not in now]


def _ids(children: Mapping[str, nn.Module | None]) -> list[int]:
    return list(map(id, children.values()))


class Flags(Fact):
    """`requires_grad` of parameters that have no master, and that those of the optimizer's groups have no gradient: with one, torch's
    optimizers step what is frozen, too."""

    def __init__(self) -> None:
        self.params: list[nn.Parameter] = []
        self._flags: list[bool] = []
        self._grouped: list[nn.Parameter] = []

    def watch(self, params: Sequence[nn.Parameter], grouped: Container[nn.Parameter]) -> None:
        """From now on of these, of which some are in groups."""
        self.params = list(params)
        self._grouped = [param for param in params if param in grouped]
        self._watch = watch(self._grouped, no_grads=True)
        self.renew()

    def renew(self) -> None:
        self._flags = self._read()

    @property
    def has_changed(self) -> bool:
        return self._read() != self._flags or self._have_gradients()

    def _have_gradients(self) -> bool:
        if self._watch is not None and self._watch.is_same():
            return False
        return any(gradient is not None for gradient in grads_of(self._grouped))

    def is_news(self, param: nn.Parameter) -> bool:
        """Whether one of these has another flag than was last written down."""
        at = next((i for i, other in enumerate(self.params) if other is param), None)
        return at is not None and self._flags[at] != param.requires_grad

    def _read(self) -> list[bool]:
        with torch._C.DisableTorchFunctionSubclass():  # sharded parameters answer through a function of Python's
            return [param.requires_grad for param in self.params]


class Memory(Fact):
    """Parameters of buckets that are whole on every rank are the views that the bucket has of itself."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self._params: list[nn.Parameter] = []
        self._views: list[Tensor] = []

    def watch(self, buckets: Sequence[Bucket]) -> None:
        """From now on of these."""
        self._buckets = list(buckets)
        self.renew()

    def renew(self) -> None:
        self._params = [param for bucket in self._buckets for param in bucket.params]
        self._views = [view for bucket in self._buckets for view in bucket.views]
        self._pointers = [view.data_ptr() for view in self._views]
        self._matrices = [param for param, view in zip(self._params, self._views, strict=True) if view.dim() > 1]
        self._watch = watch(self._params, memory=True)

    @property
    def has_changed(self) -> bool:
        if (self._watch is not None and self._watch.is_same()) or any(bucket.is_away for bucket in self._buckets):
            return False
        with torch._C.DisableTorchFunctionSubclass():  # which each call would look for: a fifth of the time
            # A square matrix transposed begins at the same address.
            return list(map(Tensor.data_ptr, self._params)) != self._pointers or not all(
                map(Tensor.is_contiguous, self._matrices)
            )

    @property
    def has_changed_oddly(self) -> bool:
        """Whether a vector has other strides at the same address. Seldom asked."""
        with torch._C.DisableTorchFunctionSubclass():
            return not (self.has_changed or all(map(Tensor.is_contiguous, self._params)))

    def changes(self, names: Mapping[nn.Parameter, str]) -> list[Change]:
        """Parameters that are no views of their buckets any more; those that have left the model may be what they like."""
        return [
            Change(Kind.ASSIGNED, names[param], param)
            for param, view in zip(self._params, self._views, strict=True)
            if param in names and not is_view(param, view) and not _is_away(param)
        ]


def _is_away(param: nn.Parameter) -> bool:
    slot = slot_of(param)
    return slot is not None and slot.bucket.is_away


class Versions(Fact):
    """How often torch saw parameters written. Publishing and gathering go through the buckets' own views and do not count."""

    def __init__(self) -> None:
        self._params: list[nn.Parameter] = []
        self._versions: list[int] = []

    def watch(self, params: Sequence[nn.Parameter]) -> None:
        """From now on of these."""
        self._params = list(params)
        self.renew()

    def renew(self) -> None:
        self._versions = self._read()
        self._watch = watch(self._params, versions=True)

    @property
    def has_changed(self) -> bool:
        return not (self._watch is not None and self._watch.is_same()) and self._read() != self._versions

    def changes(self, names: Mapping[nn.Parameter, str]) -> list[Change]:
        """Parameters that were written since the last renewal."""
        pairs = zip(self._params, self._versions, strict=True)
        return [Change(Kind.WRITTEN, names[p], p) for p, version in pairs if p._version != version and p in names]

    def _read(self) -> list[int]:
        return [param._version for param in self._params]


class Groups(Fact):
    """The optimizer's groups, and the tensors that each lists."""

    def __init__(self, groups: Callable[[], Sequence[dict[str, Any]]]) -> None:
        self._groups = groups
        self.renew()

    def renew(self) -> None:
        self._listed = self._read()

    @property
    def has_changed(self) -> bool:
        return self._read() != self._listed

    def _read(self) -> list[list[int]]:
        return [list(map(id, group["params"])) for group in self._groups()]


class Seal:
    """A digest of one master's part of the parameters, which are other bytes than the master's."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.renew()

    def renew(self) -> None:
        """The parameters are what the master was rounded to."""
        self._digest = _digest(self.master.low())

    def is_broken(self) -> Tensor:
        """A scalar on the device: whether somebody wrote the parameters since. Nobody waits for it here."""
        return (_digest(self.master.low()) != self._digest).any()


def _digest(values: Tensor) -> Tensor:
    """Sums of 8-byte words, wrapping, in columns; buckets are padded to whole words."""
    words = values.view(torch.int64)
    whole = words.numel() // WORD_COLUMNS * WORD_COLUMNS
    columns = words[:whole].view(-1, WORD_COLUMNS).sum(0)
    return torch.cat([columns, words[whole:]])


class Facts:
    """All facts of one engine's model."""

    def __init__(
        self,
        root: nn.Module,
        built: Built,
        groups: Callable[[], Sequence[dict[str, Any]]],
        is_alone: bool,
        may_differ: bool = False,
    ) -> None:
        self._built, self._is_alone, self._may_differ = built, is_alone, may_differ
        self.tree, self.flags, self.memory, self.versions = Tree(root), Flags(), Memory(), Versions()
        self.groups = Groups(groups)
        self.prints = Prints()
        self._each_step: list[Fact] = [self.groups, self.flags, self.memory]
        self._steps_slices = built.builder.placing.policy.optimizer.is_sharded
        if self._steps_slices:
            self._each_step.append(self.versions)
        self._num_looks = 0
        self.seals: list[Seal] = []
        self.renew()

    def renew(self) -> None:
        """Everything is as it should be: write it down."""
        self.tree.renew()
        trained = {param for master in self._built.masters for param in master.bucket.params}
        untrained = [param for param in self.tree.names if param not in trained]
        self.flags.watch(untrained, self._built.builder.group_of)
        self.whole = whole = [bucket for bucket in self._built.buckets if not bucket.is_sharded]
        self.memory.watch(whole)
        # One rank has nobody to differ from, and the seals tell what it wrote.
        compared = [] if self._is_alone else whole
        self.versions.watch([param for bucket in compared for param in bucket.params])
        # Experts differ from rank to rank, and so does what an optimizer with local steps has between its averages.
        printed = [bucket for bucket in compared if bucket.over == "shard" and not self._may_differ]
        self.prints.watch(printed, share=1 if self._steps_slices else 4)
        self.groups.renew()
        sealed = {seal.master for seal in self.seals}
        # Not those that are there: whether they are broken is still to be asked.
        self.seals += [Seal(m) for m in self._built.masters if m.can_be_written and m not in sealed]

    def have_changed(self, looks_at_all: bool = False) -> bool:
        """Whether any is true no more. Modules are many, and parameters that come or go change nothing until a group has them
        or a checkpoint is saved: unless `looks_at_all`, the tree is looked at now and then. So are versions where every rank
        steps the whole: what one of them wrote alone is there until it is compared."""
        self._num_looks += 1
        if any(fact.has_changed for fact in self._each_step):
            return True
        return (looks_at_all or self.is_long_look) and (
            self.tree.has_changed or self.memory.has_changed_oddly or self.versions.has_changed
        )

    @property
    def is_long_look(self) -> bool:
        """Whether the last look was one of those that see more: at the same steps on every rank."""
        return self._num_looks % TREE_EVERY == 0

    def is_news(self, param: nn.Parameter) -> bool:
        """Whether a parameter that does not train is new, or was frozen when that was last written down."""
        return param not in self.tree.names or self.flags.is_news(param)

    def is_trained(self, param: nn.Parameter) -> bool:
        """Whether a parameter has a master."""
        slot = slot_of(param)
        return slot is not None and any(master.bucket is slot.bucket for master in self._built.masters)
