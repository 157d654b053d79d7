"""`UlyssesSPDataLoaderAdapter`: from a loader that gives every rank other samples to parts of the same samples.

Wraps the loader of each rank. One batch is drawn from it per as many steps as ranks share a sequence: they tell each other their
batches, and go through them together, each with its part. So a sampler over all ranks, which knows nothing of sequences,
goes on to be right, and a batch of the job has as many samples as before.

    rank 0 draws A, rank 1 draws B      step 1: A[:, :s/2] on 0, A[:, s/2:] on 1      step 2: B[:, :s/2], B[:, s/2:]

`labels` become `shift_labels`, shifted over the whole sequence before it is cut. What is not a tensor is everybody's.

Invariant: a rank whose loader is dry, or whose batch cannot be used, says so in the exchange; all stop, or raise, together.
Names, checks and their words are the public contract of the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.parallel.sequence.inputs import shifted
from deepspeed.parallel.sequence.parallel_state import current_place
from deepspeed.utils.errors import DeepSpeedError

REQUIRED = ("input_ids", "position_ids", "labels")


class UlyssesSPDataLoaderAdapter:
    """Iterates over this rank's parts, on the CPU. Collective over the group whenever a batch is drawn.

    dl: gives dicts of [batch, sequence] tensors with input_ids, position_ids and labels. device: where the group's
    collectives take tensors from. Attributes that it lacks are the wrapped loader's.
    """

    def __init__(self, dl: Any, sp_rank: int, sp_group: Any, sp_world_size: int, device: Any) -> None:
        self.dl = dl
        self.sp_rank, self.sp_group, self.sp_world_size, self.device = sp_rank, sp_group, sp_world_size, device
        self.iter: Iterator[Any] | None = None
        self.micro_batches: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        return self

    def __next__(self) -> dict[str, Any]:
        if not self.micro_batches:
            self._refill()
        return self.micro_batches.pop(0)

    def __getattr__(self, name: str) -> Any:
        if name == "dl":
            raise AttributeError(name)
        return getattr(self.dl, name)

    def _refill(self) -> None:
        if self.iter is None:
            self.iter = iter(self.dl)
            self.sp_group, self.sp_rank = current_place(self.sp_group, self.sp_rank)
        batch = next(self.iter, None)
        problem = "" if batch is None else _problem_of(batch, self.sp_world_size)
        others = {} if batch is None or problem else {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
        tensors = {} if batch is None or problem else {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        own = (batch is None, problem, {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}, others)
        everyone: list[Any] = [None] * self.sp_world_size
        dist.all_gather_object(everyone, own, group=self.sp_group)
        problems = [text for _, text, _, _ in everyone if text]
        if problems:
            raise DeepSpeedError(
                problem or f"another rank of the sequence has a batch that cannot be used: {problems[0]}"
            )
        if any(is_dry for is_dry, *_ in everyone):
            self.iter = None
            raise StopIteration
        if len({tuple(shapes) for _, _, shapes, _ in everyone}) > 1:
            raise DeepSpeedError(
                f"ranks that share sequences drew batches with different fields: {[list(shapes) for _, _, shapes, _ in everyone]}."
            )
        sizes = {shape[0] for _, _, shapes, _ in everyone for shape, _ in shapes.values()}
        if len(sizes) > 1:
            raise DeepSpeedError(
                f"ranks that share sequences drew batches of different sizes: {sorted(sizes)}.\n  Use drop_last=True."
            )
        wholes: list[dict[str, Any]] = [dict(objects) for *_, objects in everyone]
        for name in tensors:
            parts = self._gather(tensors[name], [shapes[name] for _, _, shapes, _ in everyone])
            for whole, part in zip(wholes, parts, strict=True):
                whole[name] = part
        self.micro_batches = [self._own_part(whole) for whole in wholes]

    def _gather(self, own: Tensor, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """A field of every rank's batch, on the CPU."""
        nbytes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
        mine = own.to(self.device).contiguous().reshape(-1).view(torch.uint8)
        padded = torch.nn.functional.pad(mine, (0, max(nbytes) - mine.numel()))
        found = padded.new_empty(self.sp_world_size * padded.numel())
        all_gather_single(found, padded, group=self.sp_group)
        rows = found.cpu().view(self.sp_world_size, -1)
        return [
            row[:size].clone().view(dtype).view(shape)
            for row, size, (shape, dtype) in zip(rows, nbytes, shapes, strict=True)
        ]

    def _own_part(self, whole: dict[str, Any]) -> dict[str, Any]:
        if "shift_labels" not in whole:
            whole["shift_labels"] = shifted(whole["labels"])
        whole.pop("labels", None)
        length = whole["input_ids"].shape[1] // self.sp_world_size
        own = slice(self.sp_rank * length, (self.sp_rank + 1) * length)
        return {k: v[:, own].contiguous() if isinstance(v, Tensor) else v for k, v in whole.items()}


def _problem_of(batch: Any, num_ranks: int) -> str:
    """Why a batch cannot be cut, or nothing."""
    if not hasattr(batch, "items"):
        return f"Ulysses SP needs batches that are dicts, got a {type(batch).__name__}."
    for name in REQUIRED:
        if name not in batch:
            return (
                f"Ulysses SP requires `{name}` in every batch; this one has {sorted(batch)}.\n  Have the data collator return it"
                " (position_ids count from 0 in each sample)."
            )
    length = batch["input_ids"].shape[-1]
    for name, value in batch.items():
        if isinstance(value, Tensor) and (value.dim() != 2 or value.shape[1] != length):
            return (
                f"Ulysses SP cuts tensors of [batch, sequence] = {tuple(batch['input_ids'].shape)}; `{name}` is "
                f"{tuple(value.shape)}."
            )
    if length % num_ranks:
        return (
            f"a sequence length of {length} isn't divisible by sp-size {num_ranks}.\n"
            f"  Pad to a multiple of {num_ranks} (pad_to_multiple_of in the data collator)."
        )
    return ""
