"""Step an optimizer on shards without processes: one thread per rank, each with its piece of one flat space.

The parameters of every group are laid end to end and the whole is cut at given positions. Rank r's optimizer holds one
run per group it meets and a `Sharding` whose collectives meet at a barrier.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.optim.traits import RunPiece


class Meeting:
    """An all-gather of objects between threads."""

    def __init__(self, world_size: int) -> None:
        self._slots: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)

    def gather(self, rank: int, item: Any) -> list[Any]:
        self._slots[rank] = item
        self.barrier.wait()
        items = list(self._slots)
        self.barrier.wait()
        return items


@dataclass
class ThreadSharding:
    """One rank's `Sharding`."""

    rank: int
    meeting: Meeting
    num_params: int
    places: dict[int, list[RunPiece]] = field(default_factory=dict)

    def pieces(self, run: Tensor) -> Sequence[RunPiece]:
        return self.places[id(run)]

    def sum_over_shards(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.gather(self.rank, values)).sum(0)

    def gather(self, runs: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Tensor]:
        mine = [
            (piece, piece.of_run(value)) for run, value in zip(runs, values, strict=True) for piece in self.pieces(run)
        ]
        full = {piece.index: torch.zeros(piece.shape) for piece, _ in mine}
        for piece, part in itertools.chain.from_iterable(self.meeting.gather(self.rank, mine)):
            if piece.index in full:
                full[piece.index].view(-1)[piece.param_start : piece.param_start + part.numel()] = part
        return full


@dataclass
class Run:
    """The part of one group in one shard: elements [start, start + numel) of the flat space."""

    start: int
    tensor: nn.Parameter
    pieces: list[RunPiece]

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.tensor.numel())


def run_of_group(flat: Tensor, shapes: Sequence[torch.Size], members: Sequence[int], low: int, high: int) -> Run | None:
    """What of parameters `members`, neighbours, lies in [low, high)."""
    starts = list(itertools.accumulate((shape.numel() for shape in shapes), initial=0))
    first = max(low, starts[members[0]])
    stop = min(high, starts[members[-1] + 1])
    if first >= stop:
        return None
    bounds = [(i, max(first, starts[i]), min(stop, starts[i + 1])) for i in members]
    pieces = [RunPiece(i, shapes[i], a - first, b - first, a - starts[i]) for i, a, b in bounds if a < b]
    return Run(first, nn.Parameter(flat[first:stop].clone()), pieces)


def step_shards(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    groups: Sequence[dict[str, Any]],
    grads: Sequence[Sequence[Tensor]],
    cuts: Sequence[int],
) -> tuple[list[Tensor], list[torch.optim.Optimizer]]:
    """The parameters of `groups` after one step per row of `grads`, stepped in pieces between `cuts`; the optimizers.

    `grads[step][i]` is the gradient of parameter i, counted through the groups.
    """
    params = [param.detach() for group in groups for param in group["params"]]
    shapes = [param.shape for param in params]
    flat = torch.cat([param.flatten() for param in params])
    bounds = list(itertools.pairwise([0, *cuts, flat.numel()]))
    meeting = Meeting(len(bounds))
    optimizers: dict[int, torch.optim.Optimizer] = {}
    errors: list[BaseException] = []

    def rank_of(rank: int) -> None:
        indices = iter(range(len(params)))
        members = [[next(indices) for _ in group["params"]] for group in groups]
        runs = [run_of_group(flat, shapes, ours, *bounds[rank]) for ours in members]
        optimizer = make(
            [{**group, "params": [run.tensor] if run else []} for group, run in zip(groups, runs, strict=True)]
        )
        held = [run for run in runs if run]
        places = {id(run.tensor): run.pieces for run in held}
        optimizer.sharding = ThreadSharding(rank, meeting, len(params), places)  # type: ignore[attr-defined]
        for row in grads:
            flat_grad = torch.cat([grad.flatten() for grad in row])
            for run in held:
                run.tensor.grad = flat_grad[run.span]
            optimizer.step()
        meeting.gather(rank, None)
        for run in held:
            flat[run.span] = run.tensor.detach()
        optimizers[rank] = optimizer

    def guarded(rank: int) -> None:
        try:
            rank_of(rank)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(len(bounds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    parts = flat.split([shape.numel() for shape in shapes])
    whole = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return whole, [optimizers[rank] for rank in range(len(bounds))]
