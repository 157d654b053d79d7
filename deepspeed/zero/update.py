"""The update: the wrapped optimizer steps its runs, sub-group by sub-group in memory, tile by tile where they rest on a tier.

Owned by `zero.optimizer`, called once per step that is not skipped, with the factor that unscales and clips. Gradients are
taken from where they rest, in the master dtype.

Invariant: an update of an element does not depend on how runs are cut; a parameter without a gradient is not stepped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import final

from torch import Tensor

from deepspeed.optim.traits import FusedRun, Needs, StepsFused, needs_of, steps_rows
from deepspeed.utils.errors import TierError
from deepspeed.zero.rows import give_rows
from deepspeed.zero.runs import Runs
from deepspeed.zero.stream import Segment


@final
class Update:
    """Steps `runs` by their optimizer."""

    def __init__(self, runs: Runs) -> None:
        self._runs, self._optimizer = runs, runs.optimizer

    def run(
        self, factor: float | Tensor, unused: Sequence[tuple[int, int]], kept: Sequence[Tensor] | None = None
    ) -> TierError | None:
        """One step from gradients times `factor`, without the `unused` (bucket, parameter); what could not be moved.

        factor: a tensor, where the step is recorded (`zero.graphed`). kept: the gradients by bucket, where the reducer has them no more; may be written over.
        """
        self._runs.show_states()
        for members in self._sub_groups():
            stepped = [pair for i in members for pair in self._with_gradients(i, factor, unused, kept)]
            if len(members) == len(self._runs.masters):
                self._optimizer.step()
            else:
                self._step_only(stepped)
            for _, tensor in stepped:
                tensor.grad = None
        return self._step_streamed(factor, unused) if isinstance(factor, float) else None

    def _step_streamed(self, factor: float, unused: Sequence[tuple[int, int]]) -> TierError | None:
        runs = self._runs
        if runs.stream is None:
            return None
        skipped = {segment for i, j in unused if runs.is_streamed(runs.masters[i]) for segment in self._cut_out(i, j)}
        try:
            runs.stream.step(functools.partial(self._step_segments, factor, skipped))
        except TierError as error:
            return error
        # What torch's learning-rate schedulers look for: they watch `step`, which a fused step and a rank without elements do not go through.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        return None

    def _cut_out(self, index: int, param: int) -> list[Segment]:
        """The segments of one parameter, made segments of their own."""
        master = self._runs.masters[index]
        return [
            segment
            for piece in master.layout.pieces(master.rank)
            if piece.param == param
            for segment in self._runs.tiles.isolate(index, piece.in_shard, piece.in_shard + piece.numel)
        ]

    def _step_segments(
        self,
        factor: float,
        skipped: set[Segment],
        segments: list[Segment],
        gradients: dict[int, Tensor],
        low: dict[int, Tensor | None],
    ) -> None:
        """Step loaded segments; their parameters in low precision go to `low`."""
        stepped = [i for i, segment in enumerate(segments) if segment not in skipped]
        rounds = isinstance(self._optimizer, StepsFused)
        if isinstance(self._optimizer, StepsFused):
            runs = [(i, FusedRun(segments[i].param, gradients[i], _if_narrow(low[i]))) for i in stepped]
            self._optimizer.step_fused(
                [(self._optimizer.param_groups[segments[i].group], run) for i, run in runs], factor
            )
        else:
            for i in stepped:
                grad = gradients[i].to(segments[i].param.dtype)
                segments[i].param.grad = grad.mul(factor) if factor != 1.0 else grad
            self._step_only([(segments[i].group, segments[i].param) for i in stepped])
        for i, segment in enumerate(segments):
            segment.param.grad = None
            target = low[i]
            is_written = rounds and _if_narrow(target) is not None and segment not in skipped
            if target is not None and not is_written:
                target.copy_(segment.param.data)

    def _sub_groups(self) -> Iterator[list[int]]:
        members: list[int] = []
        numel = 0
        for i, master in enumerate(self._runs.masters):
            if self._runs.is_streamed(master):
                continue
            if members and numel + master.numel > self._runs.sub_group_numel and not self._is_one_step:
                yield members
                members, numel = [], 0
            members.append(i)
            numel += master.numel
        if members:
            yield members

    @property
    def _is_one_step(self) -> bool:
        """Whether the wrapped optimizer may count its calls, so that a step must be one call."""
        return needs_of(self._optimizer) is not Needs.ELEMENTWISE

    def _with_gradients(
        self, index: int, factor: float | Tensor, unused: Sequence[tuple[int, int]], kept: Sequence[Tensor] | None
    ) -> list[tuple[int, Tensor]]:
        """Give one bucket's runs their gradients in the master dtype, times `factor`."""
        master, gradients = self._runs.masters[index], self._runs.gradients[index]
        result = gradients.rest().view(0, master.numel) if kept is None else kept[index]
        assert result is not None, "what is not streamed is in memory"
        result = result.to(master.weights.dtype)
        if isinstance(factor, Tensor) or factor != 1.0:
            result.mul_(factor)
        if self._runs.gives_whole:
            pieces = master.bucket.split_numbers(result)
        else:
            pieces = [result.narrow(0, span.start, span.stop - span.start) for span in master.spans]
        for (_, tensor), piece in zip(self._runs.steppable[index], pieces, strict=True):
            tensor.grad = piece
        if steps_rows(self._optimizer):
            give_rows(self._runs, index, {j for i, j in unused if i == index})
        for j in [j for i, j in unused if i == index]:
            self._leave_out(index, j)
        return self._runs.steppable[index]

    def _leave_out(self, index: int, param: int) -> None:
        """Keep a parameter without gradients out of this step: its run has no gradient, and is its own from now on."""
        if self._runs.gives_whole:
            self._runs.steppable[index][param][1].grad = None
        elif needs_of(self._optimizer) is Needs.ELEMENTWISE:
            master = self._runs.masters[index]
            for piece in master.layout.pieces(master.rank):
                if piece.param == param:
                    position = self._runs.isolate(index, piece.in_shard, piece.in_shard + piece.numel)
                    self._runs.steppable[index][position][1].grad = None

    def _step_only(self, members: Sequence[tuple[int, Tensor]]) -> None:
        everything = [group["params"] for group in self._optimizer.param_groups]
        try:
            for i, group in enumerate(self._optimizer.param_groups):
                group["params"] = [tensor for index, tensor in members if index == i]
            self._optimizer.step()
        finally:
            for group, params in zip(self._optimizer.param_groups, everything, strict=True):
                group["params"] = params


def _if_narrow(low: Tensor | None) -> Tensor | None:
    """`low` where it is narrower than fp32, which is what a fused step can write."""
    return low if low is not None and low.dtype.itemsize < 4 else None
