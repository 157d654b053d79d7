"""Tokens to the ranks that hold their experts, and their results back.

Called by every layer with experts (`layer`, `hugging_face`) with tokens, choices and weights; calls what computes.

    choices [s, k]        (token, expert) pairs, sorted by expert, and so by rank
    counts                one exchange: rows and pairs per expert that each rank will get
    rows                  one copy of a token per destination rank, however many of its experts are there
    pairs                 which row, and by what its result is weighed
    experts               on rows, sorted by expert
    partial sums          a row's results, weighed and added up where they were computed: one row back

With one rank there is no exchange: rows are the tokens themselves. A rank without tokens takes part with none.
What stays on a rank does not travel, and does not pass through a buffer of the wire.

Invariant: every rank of the group calls the same layers in the same order. The counts name their layer, so a rank that
skipped one is named instead of its tokens being taken for others'.

The backward of sending rows is adding up what comes back, and the other way round: two functions, each other's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.recorder import watched
from deepspeed.parallel.expert import even
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedError, RankMismatchError
from deepspeed.utils.values import has_values

Compute = Callable[[Tensor, "list[int]"], Tensor]
"""(rows [n, width] sorted by local expert, rows per local expert) -> [n, width]."""
Mix = Callable[[Tensor, Tensor, Tensor, "list[int]"], Tensor]
"""(rows [s, width], at [n] a row for each pair, sorted by local expert, weights [n, 1], pairs per local expert) -> [s, width]: at
each row the sum of what its experts give, weighed."""


def run_experts(
    tokens: Tensor,
    choices: Tensor,
    weights: Tensor,
    place: ExpertPlace,
    mix: Mix,
    chosen: Tensor | None = None,
) -> Tensor:
    """sum_j weights[i, j] * expert[choices[i, j]](tokens[i]), wherever the experts are.

    tokens [s, width]; choices [s, k] global expert numbers, -1 (or one too many) for none; weights [s, k]. Returns
    [s, width] in the tokens' dtype. `chosen`: how many choices the gate made, where some of them were dropped. Collective
    over the place's group.
    """
    k = choices.shape[1]
    flat = choices.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= place.num_experts), place.num_experts, flat)
    order = torch.argsort(flat, stable=True)  # dropped ones are last
    counts = _count(flat, place.num_experts)
    place.load.add(counts, counts if chosen is None else chosen)
    weights = weights.reshape(-1, 1)
    if place.size == 1:
        per_expert = counts.tolist() if has_values(counts) else even.shares(len(flat), place.num_experts)
        order = order[: sum(per_expert)]
        token = order // k
        return mix(tokens, token, weights.index_select(0, order), per_expert)
    routing = plan(flat[order], order // k, counts, len(tokens), place)
    with place.times.during("first exchange"):
        rows = SendRows.apply(tokens, routing.rows)
    sent_weights = SendRows.apply(weights, routing.pairs_of(order))
    at = _exchange(routing.row_of_pair.view(-1, 1), routing.pairs)[:, 0].long() + routing.row_starts
    by_expert = torch.argsort(routing.experts, stable=True)
    at = at[by_expert]
    partial = mix(rows, at, sent_weights.index_select(0, by_expert), routing.counts_here)
    with place.times.during("second exchange"):
        result: Tensor = AddRows.apply(partial, routing.rows, len(tokens))
    return result


def _count(choices: Tensor, num_experts: int) -> Tensor:
    """[num_experts] how often each was chosen; unlike `bincount` without asking a device for the largest."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=choices.device)
    return counts.index_add_(0, choices.long(), torch.ones_like(choices, dtype=torch.int64))[:num_experts]


def apart(compute: Compute) -> Mix:
    """Gathers rows, computes, weighs and adds up, one after the other for all experts."""

    def mix(rows: Tensor, at: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        return _weighed_sum(compute(rows.index_select(0, at), counts), weights, at, len(rows))

    return mix


def _weighed_sum(results: Tensor, weights: Tensor, into: Tensor, num_rows: int) -> Tensor:
    """[num_rows, width]: results times weights [n, 1] added up at `into`."""
    weighed = (results * weights).to(results.dtype)
    return results.new_zeros(num_rows, results.shape[1]).index_add(0, into, weighed)


@dataclass(frozen=True)
class Ways:
    """Which rows of a local tensor go where. `sent[r]` to rank r and `got[r]` from it; this rank's own do not travel."""

    own: Tensor
    """[n] rows that stay here."""
    away: Tensor
    """[m] rows that travel, sorted by destination."""
    sent: tuple[int, ...]
    got: tuple[int, ...]
    place: ExpertPlace

    @property
    def num_here(self) -> int:
        """Rows after the exchange: this rank's own first, then by rank."""
        return self.own.numel() + sum(self.got)


@dataclass(frozen=True)
class Routing:
    """One layer call's exchange, seen from one rank."""

    rows: Ways
    pairs: Ways
    """Of `order`'s positions."""
    row_of_pair: Tensor
    """[pairs] int32, the row of each among those for its rank."""
    row_starts: Tensor
    """[pairs here] the first row of each pair's source rank."""
    experts: Tensor
    """[pairs here] local experts."""
    counts_here: list[int]

    def pairs_of(self, order: Tensor) -> Ways:
        """The pairs, as rows of what `order` numbers."""
        pairs = self.pairs
        return Ways(order[pairs.own], order[pairs.away], pairs.sent, pairs.got, pairs.place)


def plan(experts: Tensor, token: Tensor, counts: Tensor, num_tokens: int, place: ExpertPlace) -> Routing:
    """Who gets what, from pairs sorted by expert, dropped ones last; `counts` [experts] of those that were not.

    Collective: one exchange of counts, and one wait of the host for the device, which learns all sizes by it.
    """
    size, here, device = place.size, place.num_here, experts.device
    rank_of_pair = experts // here
    wanted = torch.zeros(size + 1, num_tokens, dtype=torch.bool, device=device)  # the last row: nobody's
    wanted[rank_of_pair, token] = True
    number = wanted.cumsum(1, dtype=torch.int32) - 1
    num_rows = wanted[:size].sum(1)
    told = torch.cat([num_rows.new_full((size, 1), place.number), num_rows[:, None], counts.view(size, here)], dim=1)
    if has_values(told):
        theirs, sent, got = _exchange_counts(told, place)
    else:
        with watched("moe.counts", told.nbytes, size):
            pass
        sent = got = even.lines(num_tokens, len(experts), place)
        theirs = torch.empty_like(told)
    theirs = _own_first(theirs.to(device), place.rank)
    of_source = theirs[:, HEADER:]
    num_pairs = sum(sum(line[HEADER:]) for line in got)
    local = torch.arange(here, device=device).repeat(size)
    rows = _numbered(wanted[:size], num_rows, sum(line[1] for line in sent))
    pairs = torch.arange(sum(sum(line[HEADER:]) for line in sent), device=device)
    return Routing(
        rows=_ways(rows, [line[1] for line in sent], [line[1] for line in got], place),
        pairs=_ways(pairs, [sum(line[HEADER:]) for line in sent], [sum(line[HEADER:]) for line in got], place),
        row_of_pair=number[rank_of_pair, token],
        row_starts=_starts(theirs[:, 1]).repeat_interleave(of_source.sum(1), output_size=num_pairs),
        experts=local.repeat_interleave(of_source.reshape(-1), output_size=num_pairs),
        counts_here=[sum(line[HEADER + e] for line in got) for e in range(here)],
    )


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _own_first(lines: Tensor, rank: int) -> Tensor:
    """Lines by rank, in the order in which rows lie after an exchange."""
    return torch.cat([lines[rank : rank + 1], lines[:rank], lines[rank + 1 :]])


def _numbered(wanted: Tensor, num_rows: Tensor, total: int) -> Tensor:
    """[total] the columns of `wanted` [ranks, tokens] that are set, row by row. `nonzero` would ask how many."""
    at = _starts(num_rows)[:, None] + wanted.cumsum(1) - 1
    tokens = torch.arange(wanted.shape[1], device=wanted.device).expand_as(wanted)
    found = tokens.new_empty(total + 1)  # the last place takes what is not wanted
    return found.scatter_(0, torch.where(wanted, at, total).reshape(-1), tokens.reshape(-1))[:total]


def _ways(index: Tensor, sent: Sequence[int], got: Sequence[int], place: ExpertPlace) -> Ways:
    before = sum(sent[: place.rank])
    mine = sent[place.rank]
    own, away = index[before : before + mine], torch.cat([index[:before], index[before + mine :]])

    def without_own(counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(0 if r == place.rank else n for r, n in enumerate(counts))

    return Ways(own, away, without_own(sent), without_own(got), place)


HEADER = 2
"""Integers before the counts: the layer's number, and rows."""


def _exchange_counts(told: Tensor, place: ExpertPlace) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """`told` [ranks, HEADER + local experts] goes to the ranks, line by line: what came, then both as integers.

    Raises RankMismatchError where ranks are at different layers.
    """
    mine = told.to(_device_of(place.group))
    theirs = torch.empty_like(mine)
    with watched("moe.counts", mine.nbytes, place.size):
        place.run(dist.all_to_all_single, theirs, mine)
    sent, lines = torch.stack([mine, theirs]).tolist()
    layers = [line[0] for line in lines]
    if any(layer != place.number for layer in layers):
        ranks = dist.get_process_group_ranks(place.group)
        text = ", ".join(f"rank {rank} at layer {layer}" for rank, layer in zip(ranks, layers, strict=True))
        raise RankMismatchError(
            f"ranks exchange tokens of different layers with experts: {text}.\n"
            "  Every expert-parallel rank has to run the same of these layers in the same order; one without tokens runs "
            "them on none ([0, width])."
        )
    return theirs, sent, lines


def _device_of(group: Any) -> torch.device:
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def _exchange(values: Tensor, ways: Ways) -> Tensor:
    """[own and received, ...]: the rows of `values` that stay, then those that came. Collective."""
    here = values.new_empty(ways.num_here, *values.shape[1:])
    num_own = ways.own.numel()
    torch.index_select(values, 0, ways.own, out=here[:num_own])
    _all_to_all(here[num_own:], values.index_select(0, ways.away), ways.got, ways.sent, ways.place)
    return here


def _return(here: Tensor, ways: Ways, num_rows: int) -> Tensor:
    """[num_rows, ...]: where every row of `here` came from, added up there. Collective."""
    num_own = ways.own.numel()
    back = here.new_empty(sum(ways.sent), *here.shape[1:])
    _all_to_all(back, here[num_own:].contiguous(), ways.sent, ways.got, ways.place)
    total = here.new_zeros(num_rows, *here.shape[1:]).index_add_(0, ways.own, here[:num_own])
    return total.index_add_(0, ways.away, back)


def _all_to_all(into: Tensor, rows: Tensor, got: Sequence[int], sent: Sequence[int], place: ExpertPlace) -> None:
    """Bytes travel, so that every dtype does."""
    if rows.dim() != 2:
        raise DeepSpeedError(f"rows are [n, width], not {tuple(rows.shape)}.")
    with watched("moe.tokens", rows.nbytes, len(sent)):
        if not has_values(rows):
            return
        place.run(dist.all_to_all_single, into.view(torch.uint8), rows.view(torch.uint8), list(got), list(sent))


class SendRows(torch.autograd.Function):
    """Rows to where they are wanted: [s, width] to [rows here, width]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ways: Ways) -> Tensor:
        """Collective, as is the backward."""
        ctx.ways, ctx.num_rows = ways, len(rows)
        return _exchange(rows, ways)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """What comes back is added up."""
        return AddRows.apply(gradients[0], ctx.ways, ctx.num_rows), None


class AddRows(torch.autograd.Function):
    """Results back to where their rows came from, added up: [rows here, width] to [s, width]."""

    @staticmethod
    def forward(ctx: Any, here: Tensor, ways: Ways, num_rows: int) -> Tensor:
        """Collective, as is the backward."""
        ctx.ways = ways
        return _return(here, ways, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Each row's gradient goes where the row went."""
        return SendRows.apply(gradients[0], ctx.ways), None, None
