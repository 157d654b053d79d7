"""Parameters that begin to train in the middle of a run: a bucket, a master, gradients, a run in their group.

Called by `zero.takeover` when all ranks have agreed on them. What trains already stays where it is, with its state; the
newcomers get buckets of their own behind the others. Frozen ones of ZeRO stage 3 leave the bucket they were gathered by.

Invariant: buckets, masters, gradients and runs have the same order and positions on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from deepspeed.zero.access import trainers
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.build import Built
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.hooks import ModuleHooks
from deepspeed.zero.master import Master
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import ZeroParameter, slot_of


@dataclass
class Joining:
    """Everything of one engine that has to know of a new bucket. `hooks` only at ZeRO stage 3."""

    built: Built
    optimizer: ZeroOptimizer
    hooks: ModuleHooks | None
    make_gradients: Callable[[Sequence[Master]], list[Gradients]]

    def join(self, named: Sequence[tuple[nn.Parameter, str]]) -> None:
        """Train these parameters, whose groups the builder knows. The gradients that they have are this step's.

        Collective. Their state begins with the next step, as in plain PyTorch. Frozen ones, which have a gradient all the same, are
        from now on as what was frozen while it trained.
        """
        frozen = [param for param, _ in named if not param.requires_grad]
        for param in frozen:
            param.requires_grad_(True)  # torch has no hooks on gradients of others
        built, builder = self.built, self.built.builder
        first = len(built.masters)
        by_bucket: dict[Bucket, list[tuple[nn.Parameter, str]]] = {}
        whole: dict[nn.Parameter, str] = {}
        for param, name in named:
            slot = slot_of(param)
            if slot is not None and slot.bucket.is_sharded:
                by_bucket.setdefault(slot.bucket, []).append((param, name))
            else:
                whole[param] = name
        builder.fill_by_size(whole)
        if builder.placing.policy.parameters.is_sharded:
            for param in whole:
                param.__class__ = ZeroParameter
        for old, members in by_bucket.items():
            self._divide(old, members)
        built.buckets[:] = [bucket for bucket in built.buckets if bucket.params]
        masters = built.masters[first:]
        reducer = self.optimizer.reducer
        reducer.add(self.make_gradients(masters))
        self.optimizer.add(masters)
        trainers.add(self.optimizer)
        reducer.take_left(first)
        for param in frozen:
            param.requires_grad_(False)

    def _divide(self, old: Bucket, members: Sequence[tuple[nn.Parameter, str]]) -> None:
        new = self.built.builder.make(members, is_sharded=True)
        assert self.hooks is not None, "sharded parameters are gathered by hooks"
        self.hooks.divide(old, new)
