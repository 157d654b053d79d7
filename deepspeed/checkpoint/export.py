"""From a live engine to plain weights: the whole state dict on one rank, or files as Hugging Face has them.

Called by the engine's `save_16bit_model` and `_zero3_consolidated_16bit_state_dict`. One bucket is whole at a time; on
its way to safetensors a model is never whole in memory.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint import files, hf_layout
from deepspeed.checkpoint.container import lay_out
from deepspeed.checkpoint.digest import default_algorithm
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.staging import Staging
from deepspeed.checkpoint.subject import NamedBox, Subject
from deepspeed.checkpoint.writer import Reads, write_tensors
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.build import Built
from deepspeed.zero.param import full_shape, slot_of

MAX_SHARD = "5GB"
STAGING_BLOCKS = 8


@torch.no_grad()
def consolidated_state_dict(subject: Subject, exclude_frozen: bool = False) -> dict[str, Tensor] | None:
    """The whole state dict on the CPU of the first rank, None elsewhere; one bucket whole at a time. Collective.

    A divided model (cut layers, experts, stages) is put together there, under the names of the whole one.
    """
    module, built, mesh = subject.module, subject.built, subject.mesh
    group = mesh.group("whole", "control", "gloo")
    keeps = mesh.ranks("whole")[0] == mesh.ranks("job")[0]
    values: dict[nn.Parameter, Tensor] = {}
    for bucket in built.buckets:
        bucket.unshard()
        if keeps:
            values.update({param: param.detach().cpu().clone() for param in bucket.params})
        if bucket.holders == 0:
            bucket.reshard()
    if not keeps:
        return None
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            if not (exclude_frozen and not value.requires_grad):
                state[name] = values[value] if value in values else value.detach().cpu().clone()
        else:
            state[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    return state if group is None else _put_together(subject, state, group)


def _put_together(subject: Subject, mine: dict[str, Tensor], group: Any) -> dict[str, Tensor] | None:
    """What the ranks of one whole model hold, by names and boxes; on the first of them. Collective over them."""
    placed: list[tuple[NamedBox, Any]] = []
    first_of: dict[int, str] = {}
    known = dict(subject.module.named_parameters(remove_duplicate=False))
    for local, value in mine.items():
        named = subject.box_of(local) if local in known else NamedBox(subject.name_of(local), (), None)
        name = first_of.setdefault(id(value), named.name)
        placed.append((named, value) if name == named.name else (named, name))  # what is tied stays one tensor
    first = subject.mesh.rank("whole") == 0
    everyone: list[Any] | None = [None] * subject.mesh.size("whole") if first else None
    torch.distributed.gather_object(placed, everyone, dst=subject.mesh.ranks("whole")[0], group=group)
    whole: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for theirs in everyone or ():
        for named, value in theirs:
            if isinstance(value, str):
                tied[named.name] = value
                continue
            if named.box is None:
                whole.setdefault(named.name, value)
                continue
            into = whole.setdefault(named.name, value.new_empty(named.whole))
            indices = [torch.cat([torch.arange(*r) for r in ranges]) for ranges in named.box.ranges]
            into[torch.meshgrid(*indices, indexing="ij")] = value
    whole.update({name: whole[other] for name, other in tied.items()})
    return whole if first else None


def save_weights(subject: Subject, folder: Path, file_name: str, exclude_frozen: bool) -> None:
    """Write the weights in the model's dtype. Collective; raises CheckpointError on every rank if the first cannot."""
    ranks = Ranks(subject.mesh)
    files.check_name(file_name, "save_16bit_model")
    is_safetensors = file_name.endswith(".safetensors")
    if is_safetensors and subject.mesh.size("whole") == 1:
        _save_safetensors(subject.module, subject.built, ranks, folder, file_name, exclude_frozen)
        return
    state = consolidated_state_dict(subject, exclude_frozen)
    if is_safetensors:
        _save_put_together(state or {}, ranks, folder, file_name)
        return

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{file_name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(aside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, folder / file_name)
            hf_layout.remove_others(folder, {file_name: []}, file_name)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        files.sync_folder(folder)

    ranks.on_first(f"save_16bit_model({str(folder)!r})", write)


def _names(module: nn.Module, exclude_frozen: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once: safetensors files hold no aliases, loaders tie them again."""
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            if not (exclude_frozen and isinstance(value, nn.Parameter) and not value.requires_grad):
                yield name, value


def _save_safetensors(
    module: nn.Module, built: Built, ranks: Ranks, folder: Path, file_name: str, exclude_frozen: bool
) -> None:
    tensors = dict(_names(module, exclude_frozen))
    nbytes = {name: full_shape(t).numel() * t.element_size() for name, t in tensors.items()}
    planned = hf_layout.plan(nbytes, hf_layout.parse_size(MAX_SHARD), file_name)
    staging = Staging(STAGING_BLOCKS)
    what = f"save_16bit_model({str(folder)!r})"
    ranks.on_first(what, lambda: folder.mkdir(parents=True, exist_ok=True))
    nonce = uuid.uuid4().hex[:8]
    for file, names in planned.items():
        # Wide dtypes come first in a file; within one dtype the order stays, so that buckets are gathered once.
        ordered = sorted(names, key=lambda name: -tensors[name].element_size())
        walk = _Walk(built, [tensors[name] for name in ordered])
        error: BaseException | None = None
        if ranks.is_first:
            layout = lay_out(((n, tensors[n].dtype, tuple(full_shape(tensors[n]))) for n in names), {"format": "pt"})
            reads: dict[str, Reads] = {name: walk.reads(i) for i, name in enumerate(ordered)}
            try:
                write_tensors(folder / f".{file}.{nonce}.tmp", layout, reads, staging, default_algorithm())
            except Exception as caught:
                error = caught
        walk.finish()
        ranks.raise_any(what, error)
    ranks.on_first(what, lambda: _publish(folder, planned, nbytes, file_name, nonce))


def _save_put_together(state: dict[str, Tensor], ranks: Ranks, folder: Path, file_name: str) -> None:
    """The same files from a whole state dict on the first rank."""
    what = f"save_16bit_model({str(folder)!r})"
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.data_ptr() not in seen:
            seen |= {value.data_ptr()} if value.numel() else set()
            tensors[name] = value.contiguous()
    nbytes = {name: t.nbytes for name, t in tensors.items()}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        planned = hf_layout.plan(nbytes, hf_layout.parse_size(MAX_SHARD), file_name)
        nonce = uuid.uuid4().hex[:8]
        for file, names in planned.items():
            layout = lay_out(((n, tensors[n].dtype, tuple(tensors[n].shape)) for n in names), {"format": "pt"})
            reads: dict[str, Reads] = {n: _reads_of(tensors[n]) for n in names}
            write_tensors(folder / f".{file}.{nonce}.tmp", layout, reads, Staging(STAGING_BLOCKS), default_algorithm())
        _publish(folder, planned, nbytes, file_name, nonce)

    ranks.on_first(what, write)


def _reads_of(tensor: Tensor) -> Reads:
    return lambda start, numel: tensor.reshape(-1).narrow(0, start, numel)


def _publish(folder: Path, planned: dict[str, list[str]], nbytes: dict[str, int], file_name: str, nonce: str) -> None:
    for file in planned:
        os.replace(folder / f".{file}.{nonce}.tmp", folder / file)
    if len(planned) > 1:
        files.replace_durably(folder / f"{file_name}.index.json", hf_layout.index_text(planned, nbytes))
    hf_layout.remove_others(folder, planned, file_name)
    files.sync_folder(folder)


class _Walk:
    """Goes through tensors in order and has the bucket of the current one whole. Every rank walks the same way: those
    that do not write walk to the end in `finish`."""

    def __init__(self, built: Built, tensors: Sequence[Tensor]) -> None:
        self._managed = set(map(id, built.buckets))
        self._tensors = tensors
        self._at = -1
        self._bucket: Bucket | None = None

    def reads(self, index: int) -> Reads:
        """Elements of the tensor at `index`."""

        def read(start: int, numel: int) -> Tensor:
            self._go_to(index)
            return self._tensors[index].detach().reshape(-1).narrow(0, start, numel).cpu()

        return read

    def _go_to(self, index: int) -> None:
        while self._at < index:
            self._at += 1
            slot = slot_of(self._tensors[self._at])
            bucket = slot.bucket if slot and slot.bucket.is_sharded and id(slot.bucket) in self._managed else None
            if bucket is not self._bucket:
                self._drop()
                self._bucket = bucket
                if bucket is not None:
                    bucket.unshard()
                    bucket.hold()

    def _drop(self) -> None:
        if self._bucket is not None:
            self._bucket.unhold()
            if self._bucket.holders == 0:
                self._bucket.reshard()
            self._bucket = None

    def finish(self) -> None:
        """Walk to the end, so that all ranks have taken part in the same gathers."""
        self._go_to(len(self._tensors) - 1)
        self._drop()


def check_folder(path: Path, what: str) -> Path:
    """A folder to write to. Raises CheckpointError where a file is in its place."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{what} {path} is a file; a folder is needed, the files in it get their names here.")
    path.mkdir(parents=True, exist_ok=True)
    return path
