"""A profile: the modules of a model as a tree, each with its parameters, operations and times. Pure data and sums.

Filled by `watch.py`; shown by `text.py` and `flame.py`. A module's own operations are those it runs itself, outside of its
children; `total` adds the children's. A parameter that several modules share belongs to the first of them, so that sums
are true.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deepspeed.profiling.counter import Phase


@dataclass
class ModuleProfile:
    """One module."""

    name: str
    """Its name in its parent; the root's is its class."""
    kind: str
    """Its class, with what its `extra_repr` says."""
    path: str
    depth: int
    params: int = 0
    """Elements of its own parameters; of a sharded one, of the whole."""
    active_params: float = 0.0
    """Elements of its own parameters that a token meets: all of them, but for experts."""
    own: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    num_calls: int = 0
    """Forward calls, recomputations left out."""
    rows: int = 0
    """Vectors in the first input of all calls: tokens, mostly."""
    forward_s: float = 0.0
    """Its forward calls, children included; of a list of modules, theirs."""
    backward_s: float = 0.0
    """From the first gradient of its outputs to the last of its inputs; where no input needs one, that of its children."""
    children: list[ModuleProfile] = field(default_factory=list)

    def walk(self) -> Iterator[ModuleProfile]:
        """This module and everything below, in order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def total(self, phase: Phase) -> int:
        """Operations of this module and everything below."""
        return sum(module.own[phase] for module in self.walk())

    @property
    def flops(self) -> int:
        """Operations of forward."""
        return self.total(Phase.FORWARD)

    @property
    def macs(self) -> int:
        """Multiply-adds of forward."""
        return self.flops // 2

    @property
    def all_params(self) -> int:
        """Elements of all parameters here and below."""
        return sum(module.params for module in self.walk())

    @property
    def all_active_params(self) -> float:
        """Elements that a token meets, here and below."""
        return sum(module.active_params for module in self.walk())

    def as_dict(self) -> dict[str, Any]:
        """For JSON; counts are totals, children included."""
        return {
            "name": self.name,
            "kind": self.kind,
            "params": self.all_params,
            "active_params": round(self.all_active_params),
            "macs": self.macs,
            "flops": {phase.value: self.total(phase) for phase in Phase},
            "calls": self.num_calls,
            "forward_s": self.forward_s,
            "backward_s": self.backward_s,
            "children": [child.as_dict() for child in self.children],
        }


@dataclass
class Profile:
    """A profile of one step, or of one forward."""

    root: ModuleProfile
    update_flops: int = 0
    update_s: float = 0.0
    """The optimizer's step, with the communication in it."""
    peak_flops: float | None = None
    """What the device can do, operations per second."""
    recompute_factor: float = 0.0
    """Share of forward that backward repeats, as told; used where no backward was seen."""
    title: str = ""

    @property
    def saw_backward(self) -> bool:
        """Whether a backward was counted."""
        return self.root.total(Phase.BACKWARD) > 0

    @property
    def step_flops(self) -> float:
        """Operations of forward, backward and update, recomputation included; backward is estimated where none was seen."""
        forward = self.root.flops
        if not self.saw_backward:
            return forward * (3 + self.recompute_factor)
        return sum(self.root.total(phase) for phase in Phase) + self.update_flops

    @property
    def utilisation(self) -> float | None:
        """Operations of forward per second of forward, over what the device can do."""
        if not self.peak_flops or not self.root.forward_s:
            return None
        return self.root.flops / self.root.forward_s / self.peak_flops

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "update_flops": self.update_flops,
            "update_s": self.update_s,
            "peak_flops": self.peak_flops,
            "step_flops": self.step_flops,
            "utilisation": self.utilisation,
            "model": self.root.as_dict(),
        }
