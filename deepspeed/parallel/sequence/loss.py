"""By what a rank's loss is multiplied so that gradients averaged over the ranks of a sequence are those of the whole sequence.

Asked by the engine before every backward; knows the ranks that share a sequence. ZeRO averages gradients over data and sequence,
at every stage. What that makes of them depends on what the script did with its losses l_r, means over n_r of N tokens:

    gathered   a differentiable all-gather or all-reduce, then the weighted mean: the same loss on every rank, whose backward
               sums over the ranks already. The average is right: 1
    summed     an in-place all_reduce, which autograd does not see, or a collective whose backward slices: the same loss on
               every rank, but each backward has its own tokens' part alone. The sum would be right: P
    local      nothing: each rank has its own mean. Weights by tokens make it the mean over all: P n_r / N, where the labels went
               through the model's forward; else 1, as if all had the same number

At the first backward the ranks tell each other the loss's value and whether a summing collective is in its graph, and
decide together: a collective is "gathered"; else equal values are "summed", and different ones "local". `sequence_parallel_loss`
in the configuration decides instead. A loss of half precision may be equal by chance, so there equal values are an error that
names the key, unless it is the model's own output, which no script has touched.

After what scripts of the original do, where the same loss gives gradients P times too large, or right, by ZeRO stage.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.parallel.sequence.forward import SequenceForward
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import log_dist, warn_once

Convention = Literal["gathered", "summed", "local"]
_SUMMING = re.compile(r"all_?(gather|reduce)", re.IGNORECASE)
_LARGEST_GRAPH = 1_000_000


class SequenceLoss:
    """Of one engine. `group`: the ranks that share a sequence. `asked`: the configuration's word, "auto" to find out."""

    def __init__(self, group: Any, asked: str, hook: SequenceForward | None) -> None:
        self._group, self._asked, self._hook = group, asked, hook
        self._decided: Convention | None = None if asked == "auto" else asked  # type: ignore[assignment]
        self._num_ranks = dist.get_world_size(group)
        self._own_loss: weakref.ref[Tensor] | None = None
        self._own_value: Tensor | None = None
        self._is_untouched = False
        self._counts_items = False

    def note_forward(self, kwargs: Any, output: Any) -> None:
        """Remember the loss that a forward gave, before the script does anything to it."""
        loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
        if loss is None and isinstance(output, (tuple, list)) and output:
            loss = output[0]
        self._own_loss = self._own_value = None
        if self._decided is None and isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            self._own_loss, self._own_value = weakref.ref(loss), loss.detach().clone()
        self._counts_items = kwargs.get("num_items_in_batch") is not None

    def note_loss(self, loss: Tensor) -> None:
        """Look at what the script wants to differentiate, before it is divided and scaled."""
        own = self._own_loss() if self._own_loss is not None and self._decided is None else None
        self._is_untouched = own is loss and torch.equal(loss.detach(), self._own_value)  # type: ignore[arg-type]

    def weighted(self, loss: Tensor) -> Tensor:
        """`loss` times the factor. Collective until it is known what losses are."""
        convention = self._decided or self._decide(loss)
        if convention == "gathered":
            return loss
        if convention == "summed":
            return loss * self._num_ranks
        return self._by_tokens(loss)

    def check_plain(self) -> None:
        """A `loss.backward()` that the engine does not see begins."""
        if self._decided in (None, "gathered"):
            warn_once(
                "loss.backward() under sequence parallelism: the engine does not see the loss, and averages gradients over the ranks "
                "of a sequence. That is right for losses gathered with a differentiable collective; else use engine.backward(loss)."
            )
            return
        raise DeepSpeedError(
            f'loss.backward() with sequence_parallel_loss = "{self._decided}": the loss has to be weighted first.\n'
            "  Use engine.backward(loss)."
        )

    def _by_tokens(self, loss: Tensor) -> Tensor:
        inputs = self._hook.latest if self._hook is not None else None
        if self._counts_items:  # the model divided the sum of its own tokens by the number of all
            return loss * self._num_ranks
        counts = inputs.num_targets if inputs is not None else None
        if counts is None or inputs is None or sum(counts) == 0:
            return loss
        own = counts[inputs.rank]
        if own == 0:  # a mean over no token is nan, and so would be nothing times it
            loss = loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return loss * (self._num_ranks * own / sum(counts))

    def _decide(self, loss: Tensor) -> Convention:
        is_low = loss.dtype.itemsize < 4
        has_collective = any(_sums_over(node, self._group) for node in _nodes(loss.grad_fn))
        told = torch.stack(
            [
                loss.detach().double(),
                *(loss.new_tensor(float(x)).double() for x in (has_collective, self._is_untouched)),
            ]
        )
        found = told.new_empty(self._num_ranks * 3)
        all_gather_single(found, told.contiguous(), group=self._group)
        rows = found.view(-1, 3).tolist()
        values = [row[0] for row in rows]
        if any(row[1] for row in rows):
            return self._say("gathered", "a differentiable collective is in its graph")
        if any(value != value for value in values):
            return "local"  # nan tells nothing; ask again next time
        if all(row[2] for row in rows) or len(set(values)) > 1:
            return self._say("local", "each rank has its own")
        if values[0] == 0.0:
            return "local"
        if is_low:
            raise DeepSpeedError(
                f"the loss is {values[0]:g} on all {self._num_ranks} ranks that share a sequence, in {loss.dtype}, with no "
                "differentiable collective in its graph: it may have been all-reduced in place, or be equal by chance.\n"
                '  Set "sequence_parallel_loss" to "summed" or "local" in the configuration, or compute the loss in float32.'
            )
        return self._say("summed", "it is equal on all of them, and no differentiable collective made it so")

    def _say(self, convention: Convention, reason: str) -> Convention:
        self._decided = convention
        meaning = {
            "gathered": "its gradients are averaged over the ranks of a sequence",
            "summed": "its gradients are summed over the ranks of a sequence",
            "local": "it is weighted by its share of the sequence's tokens where labels went through the model, else by 1",
        }[convention]
        log_dist(
            f'sequence parallelism: the loss is "{convention}" ({reason}): {meaning}. "sequence_parallel_loss" sets it.',
            ranks=[0],
        )
        return convention


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of a graph, nearest first."""
    seen, near = {root}, [root] if root is not None else []
    while near and len(seen) < _LARGEST_GRAPH:
        found = []
        for node in near:
            yield node
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    found.append(following)
        near = found


def _sums_over(node: Any, group: Any) -> bool:
    """Whether a node is a collective of torch whose backward sums over the group. Ours, and those of other groups, are not."""
    if not _SUMMING.search(node.name()):
        return False
    made_by = getattr(type(node), "_forward_cls", None)
    if made_by is not None and made_by.__module__.startswith("deepspeed."):
        return False
    over = getattr(node, "group", None)
    if over is None or not isinstance(over, dist.ProcessGroup):
        return True
    return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(over))
