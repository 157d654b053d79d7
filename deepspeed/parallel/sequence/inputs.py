"""What every layer of a forward has to know of the whole sequence: lengths of all parts, position ids, padding, targets.

Gathered once per forward by the hook on the model (`forward.py`), read by the attention of each layer. Two small collectives:
first a header of a few integers, in which ranks also tell each other what they lack, then the ids themselves.

Invariant: a rank whose input cannot be used says so in the header, so that all ranks raise and none waits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.comm.recorder import watched
from deepspeed.parallel.sequence.documents import Documents, documents_of
from deepspeed.utils.errors import DeepSpeedError

Group = Any
IGNORED = -100
"""The label that a loss ignores."""

REQUIRES_POSITION_IDS = (
    "Ulysses SP requires position_ids in every forward() call: a rank has a part of each sequence, and without them the model "
    "would count from 0 in each part.\n  Pass position_ids=..., cut like input_ids (UlyssesSPDataLoaderAdapter does)."
)


@dataclass(frozen=True, kw_only=True)
class SequenceInputs:
    """One forward's sequences as a whole. lengths: of every rank's part. position_ids: [.., b, s]. num_targets: per rank, how
    many labels count; None where the model got none."""

    lengths: tuple[int, ...]
    rank: int
    position_ids: Tensor
    documents: Documents
    padding_mask: Tensor | None = None
    labels: Tensor | None = None
    num_targets: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Of the whole sequence."""
        return sum(self.lengths)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of [.., s]."""
        start = sum(self.lengths[: self.rank])
        return whole[..., start : start + self.lengths[self.rank]].contiguous()


def gather_inputs(
    group: Group,
    position_ids: Tensor | None,
    padding_mask: Tensor | None = None,
    labels: Tensor | None = None,
    problem: str = "",
) -> SequenceInputs:
    """Join what all ranks have. position_ids: [.., b, s_r]; padding_mask, labels: [b, s_r]. Collective over the group.

    Raises DeepSpeedError on every rank if one of them has a `problem`, or no position ids, or another batch.
    """
    device = next((t.device for t in (position_ids, labels, padding_mask) if t is not None), torch.device("cpu"))
    ids = position_ids.reshape(-1, *position_ids.shape[-2:]) if position_ids is not None else None
    batch = max((t.shape[0] for t in (padding_mask, labels) if t is not None), default=1)
    ids = ids.expand(-1, batch, -1) if ids is not None and ids.shape[1] == 1 else ids
    shape = tuple(ids.shape) if ids is not None else (0, 0, 0)
    own = [int(bool(problem)), int(padding_mask is not None), int(labels is not None), *shape]
    everyone = _gather(group, torch.tensor(own, device=_wire_device(group, device)), len(own)).tolist()
    rank = dist.get_rank(group)
    _check(everyone, rank, problem)
    has_mask, has_labels = (any(row[i] for row in everyone) for i in (1, 2))
    lengths = tuple(row[5] for row in everyone)
    assert ids is not None, "a rank without is refused above"
    parts = [ids]
    if has_mask:
        parts.append((torch.ones_like(ids[0]) if padding_mask is None else padding_mask.to(ids.dtype))[None])
    if has_labels:
        parts.append((torch.full_like(ids[0], IGNORED) if labels is None else labels.to(ids.dtype))[None])
    padded = F.pad(torch.cat(parts), (0, max(lengths) - ids.shape[-1])).contiguous()
    found = _gather(group, padded, padded.numel()).view(len(lengths), *padded.shape)
    whole = torch.cat([part[..., :length] for part, length in zip(found, lengths, strict=True)], dim=-1)
    num_rows = ids.shape[0]
    mask = whole[num_rows] if has_mask else None
    if mask is not None and bool(mask.all()):
        documents = Documents(tuple(((0, whole.shape[-1]),) for _ in range(whole.shape[1])))
    else:
        # Three rows are the axes of an image's patches; where a fourth stands before them it is the text's.
        has_text_row = num_rows in (1, 2, 4)
        documents = documents_of(
            whole[0] if has_text_row else torch.arange(whole.shape[-1])[None].expand(whole.shape[1:]), mask
        )
    return SequenceInputs(
        lengths=lengths,
        rank=rank,
        position_ids=whole[0] if position_ids is not None and position_ids.dim() == 2 else whole[:num_rows],
        documents=documents,
        padding_mask=None if mask is None or documents.are_whole_rows else mask,
        labels=whole[-1] if has_labels else None,
    )


def _check(everyone: Sequence[Sequence[int]], rank: int, problem: str) -> None:
    bad = [i for i, row in enumerate(everyone) if row[0]]
    if bad:
        raise DeepSpeedError(
            problem if rank in bad else f"sequence-parallel rank {bad[0]} refused its inputs; see there."
        )
    missing = [i for i, row in enumerate(everyone) if row[5] == 0]
    if missing:
        raise DeepSpeedError(
            f"{REQUIRES_POSITION_IDS}\n  Without: sequence-parallel rank {missing[0]} of {len(everyone)}."
        )
    shapes = {tuple(row[3:5]) for row in everyone}
    if len(shapes) > 1:
        raise DeepSpeedError(
            f"ranks that share sequences have batches of different sizes: {[row[4] for row in everyone]} by rank.\n"
            "  Give each of them its part of the same samples."
        )


def _gather(group: Group, values: Tensor, numel: int) -> Tensor:
    """[ranks, numel] of every rank's values."""
    num_ranks = dist.get_world_size(group)
    found = values.new_empty(num_ranks * numel)
    with watched("sequence.inputs", found.nbytes, num_ranks):
        all_gather_single(found, values.reshape(-1), group=group)
    return found.view(num_ranks, numel)


def _wire_device(group: Group, device: torch.device) -> torch.device:
    """Where a small tensor of a group's collectives has to be."""
    kinds = {kind.type for kind in group._device_types} if hasattr(group, "_device_types") else set()
    return device if not kinds or device.type in kinds else torch.device(next(iter(kinds)))


def shifted(labels: Tensor) -> Tensor:
    """Each token's target: the next one's label; none for the last. [.., s]"""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def with_targets(inputs: SequenceInputs, targets: Tensor) -> SequenceInputs:
    """The same, with how many of the whole sequence's targets [b, s] count on each rank."""
    counts = [int((part != IGNORED).sum()) for part in targets.split(list(inputs.lengths), dim=-1)]
    return dataclasses.replace(inputs, labels=None, num_targets=tuple(counts))
