"""What an optimizer that needs more than elements may ask about its runs: norms of parameters, whole matrices.

Given by the optimizer wrapper to optimizers that declare such needs (LAMB, Muon; see optim.traits). Implements
`optim.traits.Sharding` over the wrapper's masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import RunPiece
from deepspeed.zero.master import Master


class RunSharding:
    """Where the pieces of parameters lie in the runs of one wrapped optimizer: `steppable[i]` are those of `masters[i]`.

    is_sharded: each rank has a shard of every master.
    """

    def __init__(
        self,
        masters: Sequence[Master],
        steppable: Sequence[Sequence[tuple[int, Tensor]]],
        mesh: Mesh,
        *,
        is_sharded: bool,
    ) -> None:
        self._masters = masters
        self._device = masters[0].bucket.full.device if masters else torch.device("cpu")
        purpose = "control" if self._device.type == "cpu" else "norm"
        self._group: Any = mesh.group("shard", purpose) if is_sharded else None
        self._place: dict[int, tuple[int, int]] = {}
        self._first_id: list[int] = []
        total = 0
        for i, members in enumerate(steppable):
            for j, (_, tensor) in enumerate(members):
                self._place[id(tensor)] = (i, j)
            self._first_id.append(total)
            total += len(masters[i].bucket.shapes)
        self.num_params = total
        apart = [(i, master) for i, master in enumerate(masters) if master.bucket.over == "expert_shard"]
        self._of_experts = [self._first_id[i] + j for i, master in apart for j in range(len(master.bucket.params))]
        self._copies = apart[0][1].bucket.exchange if apart else None
        """Between the ranks with the same experts."""

    def pieces(self, run: Tensor) -> Sequence[RunPiece]:
        """The pieces of parameters in a run, in order; `index` is unique over the model."""
        i, j = self._place[id(run)]
        master = self._masters[i]
        span = master.spans[j]
        return [
            RunPiece(
                index=self._first_id[i] + piece.param,
                shape=master.bucket.shape_of_numbers(piece.param),
                run_start=piece.in_shard - span.start,
                run_stop=piece.in_shard - span.start + piece.numel,
                param_start=piece.in_param,
            )
            for piece in master.layout.pieces(master.rank)
            if span.start <= piece.in_shard < span.stop
        ]

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks that share parameters. Collective."""
        on_device = values.to(self._device)
        of_experts = on_device[self._of_experts] if self._of_experts else None
        if self._group is not None:
            torch.distributed.all_reduce(on_device, group=self._group)
        if of_experts is not None:
            # Other ranks have other experts under these indices.
            assert self._copies is not None, "experts have buckets"
            self._copies.start_all_reduce(of_experts).wait()
            on_device[self._of_experts] = of_experts
        return on_device

    def gather(self, runs: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Full values of every parameter with a piece in `runs` here, by index, shaped. Collective over the shards.

        Every rank takes part with every bucket, since runs of one bucket differ between ranks.
        """
        by_bucket: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for run, value in zip(runs, values, strict=True):
            by_bucket.setdefault(self._place[id(run)][0], []).append((run, value))
        found: dict[int, Tensor] = {}
        for i, master in enumerate(self._masters):
            full = torch.zeros(master.layout.padded_numel, dtype=master.weights.dtype, device=master.bucket.full.device)
            mine = full.narrow(0, master.rank * master.layout.shard_numel, master.layout.shard_numel)
            wanted: set[int] = set()
            for run, value in by_bucket.get(i, ()):
                span = master.spans[self._place[id(run)][1]]
                mine[span.start : span.stop].copy_(value)
                wanted.update(piece.index for piece in self.pieces(run))
            if master.is_sharded:
                master.bucket.exchange.start_all_gather(full, None).wait()
            full = full.to(master.tensor.device)
            for j, view in enumerate(master.bucket.split_numbers(full)):
                if self._first_id[i] + j in wanted:
                    found[self._first_id[i] + j] = view
        return found
