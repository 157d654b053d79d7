"""Who may see whom in a batch of whole sequences: pure index arithmetic on position ids and padding masks.

Read by the attention of Hugging Face models (`core.py`), after the parts of all ranks were gathered. A row of a batch is cut
into *documents*, ranges of tokens that see only each other:

    no mask, position ids     a document begins where an id is not the one before plus 1       packed samples
    a padding mask            the tokens that are there, and the padding before and after them, each a document

Padding before a sample sees nothing, and its output is zero, as where a mask forbids every key: the last of it predicts the
sample's first token, and losses count that. Padding behind sees only padding, of no consequence. A mask with holes has no
such ranges; then `visible` is the mask itself, of which each query sees the keys that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of each row of a batch, as ranges that cover it; `visible` [b, s] instead where a mask has holes."""

    rows: tuple[tuple[Span, ...], ...]
    visible: Tensor | None = None
    blank: tuple[int, ...] = ()
    """How many tokens of padding each row begins with; () for none anywhere."""

    def is_blank(self, row: int, span: Span) -> bool:
        """Whether a document is the padding before a sample."""
        return bool(self.blank) and span[1] <= self.blank[row]

    @property
    def are_whole_rows(self) -> bool:
        """Whether every row is one document, all of it seen."""
        return self.visible is None and all(len(spans) == 1 for spans in self.rows)

    def ids(self, device: torch.device) -> Tensor:
        """[b, s]: each token's document, counted in its row; -1 for padding before a sample."""
        rows = [
            torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([end - start for start, end in spans]))
            for spans in self.rows
        ]
        for row, count in zip(rows, self.blank, strict=False):
            row[:count] = -1
        return torch.stack(rows).to(device)


def documents_of(position_ids: Tensor, padding_mask: Tensor | None) -> Documents:
    """The documents of whole sequences. position_ids: [b, s]. padding_mask: [b, s], 0 where there is padding, or None."""
    if padding_mask is None:
        return Documents(_cut(position_ids[:, 1:] != position_ids[:, :-1] + 1))
    is_there = padding_mask.bool()
    rows = _cut(is_there[:, 1:] != is_there[:, :-1])
    firsts = is_there[:, 0].tolist()
    has_holes = any(len(spans) > 3 or (len(spans) == 3 and first) for spans, first in zip(rows, firsts, strict=True))
    if has_holes:
        return Documents(tuple(((0, is_there.shape[1]),) for _ in rows), is_there)
    blank = tuple(0 if first else spans[0][1] for spans, first in zip(rows, firsts, strict=True))
    return Documents(rows, blank=blank if any(blank) else ())


def _cut(begins: Tensor) -> tuple[tuple[Span, ...], ...]:
    """begins: [b, s - 1], whether a range begins at the second, third, ... token of a row."""
    length = begins.shape[1] + 1
    starts: list[list[int]] = [[0] for _ in range(begins.shape[0])]
    for row, column in begins.nonzero().tolist():
        starts[row].append(column + 1)
    return tuple(tuple(zip(row, [*row[1:], length], strict=True)) for row in starts)
