"""Sparse gradients for an optimizer that steps listed rows alone (torch.optim.SparseAdam), from the reduced dense ones.

Called by `zero.update` before a step at stage 0, where runs are whole parameters. Which rows are listed matters beside their
values: a row whose gradient is zero, but that a batch named, has its moments decayed, and one that nobody named has not.

    each rank     the rows that its backward passes listed (`zero.gradients.Arrivals`), as a mask
    together      the masks of all parameters of a bucket, united in one all-reduce
    each run      its gradient's listed rows, as torch's own sparse tensor

Invariant: the rows that one process would list that ran all ranks' batches.
"""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.runs import Runs


def give_rows(runs: Runs, index: int, unused: Set[int]) -> None:
    """Make the dense gradients of one bucket's runs, but the `unused`, sparse ones. Collective over "average".

    Raises DeepSpeedError, on every rank alike, for a parameter whose gradients were dense.
    """
    here = [(j, run) for j, (_, run) in enumerate(runs.steppable[index]) if j not in unused]
    masks = _united(runs, index, here)
    names = runs.masters[index].bucket.names
    dense = [names[j] for (j, _), mask in zip(here, masks, strict=True) if not mask[-1]]
    if dense:
        optimizer = type(runs.optimizer).__name__
        raise DeepSpeedError(
            f"{optimizer} takes sparse gradients alone, and those of {', '.join(dense)} are dense.\n"
            f"  Give {optimizer} embeddings that were made with sparse=True, and no other parameters."
        )
    for (_, run), mask in zip(here, masks, strict=True):
        rows, gradient = mask[:-1].nonzero().view(-1), run.grad
        assert gradient is not None, "it has just been given"
        run.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), gradient[rows], gradient.shape, is_coalesced=True, check_invariants=False
        )


def _united(runs: Runs, index: int, here: list[tuple[int, Tensor]]) -> list[Tensor]:
    """By parameter, [rows + 1] uint8: the rows that any rank listed, and whether any listed rows at all."""
    sizes = [(run.shape[0] if run.dim() else 1) + 1 for _, run in here]
    device = runs.masters[index].bucket.full.device
    flat = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    masks = list(flat.split(sizes))
    rows = runs.gradients[index].arrivals.rows
    for (j, _), mask in zip(here, masks, strict=True):
        for listed in rows.get(j, ()):
            mask[listed] = 1
            mask[-1] = 1
    group = runs.mesh.group("average", "reduce")
    if group is not None:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
    return masks
