"""`prepare_autosp_inputs`: every rank of a sequence has all of it, and a forward takes the rank's part.

Called by scripts written for the original's compiler pass "autosp"; the cut is made by the hook of `forward.py`, before ranks
join what layers have to know of whole sequences. Here no graph is rewritten: attention exchanges as it does for every model that
is registered, and everything else sees its part.

    rank 0 and rank 1 have A      forward on rank 0: A[:, :s/2]      on rank 1: A[:, s/2:]

Invariant: what a script marked stays as it was; a model that is not split, or not in this forward, gets it whole. Names and
arguments are the public contract of the original.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.utils.errors import DeepSpeedError

_MARK = "_sequence_dim"
PER_TOKEN = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask", "token_type_ids")


class AutoSPInputs(NamedTuple):
    """What `prepare_autosp_inputs` returns: the tensors that it was given."""

    input_id: Tensor
    label_id: Tensor | None
    position_id: Tensor | None
    attention_mask: Tensor | None


def prepare_autosp_inputs(
    input_id: Tensor,
    label_id: Tensor | None = None,
    position_id: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seq_dim: int = 1,
) -> AutoSPInputs:
    """Say that these are whole sequences, alike on the ranks that share them, along `seq_dim`.

    input_id, label_id and position_id are [batch, sequence] integers, attention_mask a padding mask of that shape; labels
    are not shifted. The same tensors come back, and go to the model by its own names; without position ids they count from 0.
    Not collective. Raises ValueError for a dimension that a tensor lacks or lengths that differ.
    """
    if input_id is None:
        raise ValueError("prepare_autosp_inputs: input_id is required.")
    found = AutoSPInputs(input_id, label_id, position_id, attention_mask)
    for name, tensor in found._asdict().items():
        if tensor is None:
            continue
        if not 0 <= seq_dim < tensor.dim():
            raise ValueError(
                f"prepare_autosp_inputs: seq_dim = {seq_dim}, but {name} has the shape {tuple(tensor.shape)}.\n"
                "  seq_dim is the dimension of tokens, counted from 0."
            )
        if tensor.shape[seq_dim] != input_id.shape[seq_dim]:
            raise ValueError(
                f"prepare_autosp_inputs: {name} has {tensor.shape[seq_dim]} tokens along dimension {seq_dim}, input_id "
                f"{input_id.shape[seq_dim]}.\n  Give whole sequences, all of one length."
            )
        setattr(tensor, _MARK, seq_dim)
    return found


def own_parts(named: dict[str, Any], group: Any, *, compares: bool) -> dict[str, Any] | None:
    """By name what of a forward's inputs is this rank's part, where they were marked as whole; None where none was.

    compares: whether ranks tell each other their tokens first, which have to be alike. Collective over `group` then.
    """
    marked = [name for name in PER_TOKEN if hasattr(named.get(name), _MARK)]
    if not marked:
        return None
    whole: Tensor = named[marked[0]]
    dim = getattr(whole, _MARK)
    length, rank, size = whole.shape[dim], dist.get_rank(group), dist.get_world_size(group)
    if length < size:
        raise DeepSpeedError(
            f"a sequence of {length} tokens cannot be shared by {size} ranks.\n  Give sequences of at least {size} tokens."
        )
    if compares:
        _check_alike(whole, group)
    given = {name: named[name] for name in PER_TOKEN if isinstance(named.get(name), Tensor)}
    if "position_ids" not in given:
        shape = [length if i == dim else 1 for i in range(2)]
        given["position_ids"] = torch.arange(length, device=whole.device).view(shape).expand(whole.shape[:2])
    elif given["position_ids"].shape[0] == 1 < whole.shape[0]:
        given["position_ids"] = given["position_ids"].expand(whole.shape[0], -1)
    return {
        name: tensor.tensor_split(size, dim=dim)[rank].contiguous()
        for name, tensor in given.items()
        if tensor.dim() > dim and tensor.shape[dim] == length
    }


def _check_alike(whole: Tensor, group: Any) -> None:
    """Refuse sequences that differ between the ranks that share them, on all of them."""
    values = whole.detach().reshape(-1).to(torch.float64)
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    own = torch.stack([values.sum(), (values * weights).sum(), values.new_tensor(values.numel())])
    found = own.new_empty(dist.get_world_size(group) * 3)
    all_gather_single(found, own, group=group)
    others = [r for r, row in enumerate(found.view(-1, 3)) if not torch.equal(row, found[:3])]
    if others:
        raise DeepSpeedError(
            f"ranks {others} of a sequence have other tokens than its first rank: they share one sequence, of which each takes a part.\n"
            "  Give the ranks of a sequence the same batch: a sampler over data-parallel ranks, or UlyssesSPDataLoaderAdapter "
            "in place of prepare_autosp_inputs."
        )
