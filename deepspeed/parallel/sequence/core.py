"""Attention of this rank's heads over whole sequences, by an attention function of Hugging Face Transformers.

Called by `hf.py` between the two exchanges. The function itself (sdpa, flex, flash) is theirs; what they make of a mask is ours,
because a mask made for a part of the sequence is of no use, and one of s x s elements for the whole is too large: documents
are attended to one by one, a sliding window tile by tile.

    sdpa      one call per document; with a window, one per tile of queries and the keys it reaches
    flex      one call, with a block mask
    flash     one call; it reads documents from position ids

Invariant: no tensor of s x s elements, but for a padding mask with holes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepspeed.parallel.sequence.documents import Documents, Span
from deepspeed.parallel.sequence.inputs import SequenceInputs

Core = Callable[..., Any]
WINDOW_TILE = 512
"""Least number of queries in a tile of a sliding window."""


class LocalModule:
    """An attention module as the core sees it, with this rank's number of query heads per key head."""

    def __init__(self, module: Any, group_size: int) -> None:
        self._module = module
        self.num_key_value_groups = group_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    core: Core,
    kind: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: SequenceInputs,
    kwargs: dict[str, Any],
) -> Tensor:
    """query, key, value: [b, own heads, s, d]; the output [b, s, own heads, d]. `kind`: the core's name."""
    if "flash" in kind:
        return core(module, query, key, value, inputs.padding_mask, **kwargs)[0]
    given = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if given is None else given)
    window = kwargs.get("sliding_window")
    window = int(window) if window and window < inputs.length else None
    documents = inputs.documents
    if kind == "flex_attention":
        mask = _block_mask(inputs, is_causal, window, query.device)
        return core(module, query, key, value, mask, **kwargs)[0]
    if documents.visible is not None:
        mask = _dense_mask(documents.visible, is_causal, window)
        return core(module, query, key, value, mask, **kwargs)[0]

    def of_span(row: slice, span: Span) -> Tensor:
        own = slice(*span)
        if documents.is_blank(row.start or 0, span):
            return query.new_zeros(query[row].shape[0], span[1] - span[0], query.shape[1], value.shape[-1])
        return _one_document(
            core, module, query[row, :, own], key[row, :, own], value[row, :, own], is_causal, window, kwargs
        )

    if len(set(documents.rows)) == 1:
        return _joined([of_span(slice(None), span) for span in documents.rows[0]], 1)
    rows = [_joined([of_span(slice(i, i + 1), span) for span in spans], 1) for i, spans in enumerate(documents.rows)]
    return _joined(rows, 0)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _one_document(
    core: Core,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return core(module, query, key, value, None, **kwargs)[0]
    size = max(window, WINDOW_TILE)
    tiles = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first, last = max(0, start - window + 1), end if is_causal else min(length, end + window - 1)
        behind = torch.arange(start, end, device=query.device)[:, None] - torch.arange(first, last, device=query.device)
        mask = (behind < window) & ((behind >= 0) if is_causal else (behind > -window))
        tiles.append(
            core(
                module,
                query[:, :, start:end],
                key[:, :, first:last],
                value[:, :, first:last],
                mask[None, None],
                **kwargs,
            )[0]
        )
    return torch.cat(tiles, dim=1)


def _dense_mask(visible: Tensor, is_causal: bool, window: int | None) -> Tensor:
    """[b, 1, s, s] of a padding mask with holes."""
    index = torch.arange(visible.shape[1], device=visible.device)
    behind = index[:, None] - index
    mask = visible[:, None, None, :].expand(-1, 1, visible.shape[1], -1)
    if is_causal:
        mask = mask & (behind >= 0)
    if window is not None:
        mask = mask & (behind.abs() < window)
    return mask


def _block_mask(inputs: SequenceInputs, is_causal: bool, window: int | None, device: torch.device) -> Any:
    """Flex attention's mask; the same object for all layers of a forward that ask for the same."""
    return _block_masks(inputs.documents, inputs.length, is_causal, window, device)


@functools.lru_cache(maxsize=4)
def _block_masks(documents: Documents, length: int, is_causal: bool, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    ids = documents.ids(device)
    visible = documents.visible

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (ids[row, query] == ids[row, key]) & (ids[row, query] >= 0)
        if is_causal:
            allowed = allowed & (query >= key)
        if window is not None:
            allowed = allowed & (query - key < window) & (key - query < window)
        if visible is not None:
            allowed = allowed & visible[row, key]
        return allowed

    return create_block_mask(sees, ids.shape[0], None, length, length, device=device)
