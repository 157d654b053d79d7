"""Weights at rest, whoever wrote them: names, shapes, and reading a part of one tensor.

Opened by `found`, matched to a model by `names`, read by `load`. All headers are read and checked when files are opened, so that a
damaged file is an error before a model is touched.

    SafetensorsFiles     byte ranges are read into place, nothing is mapped
    TorchFiles           state dicts as data only, mapped: what is read is copied out
    TrainingCheckpoint   ours and the original's, at any stage, whole tensors put together from ranks' pieces

Invariant: `read` gives memory of its own, of the box's shape, in the dtype asked for, and holds no more than that (`room`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box, common
from deepspeed.checkpoint.container import DTYPE_OF, Entry, header_length, parse
from deepspeed.checkpoint.files import open_plain
from deepspeed.checkpoint.mapped import Mapped
from deepspeed.checkpoint.original import read_torch_file
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.subject import BUFFER
from deepspeed.inference.room import PIECE, copy_out, new_tensor
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.shards import PARAM


@dataclass(frozen=True, slots=True)
class Held:
    """One stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """Tensors by name."""

    what: str
    held: dict[str, Held]

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """A part of a tensor, None the whole; cast to a dtype, None is the stored one. Raises CheckpointError, naming file and tensor."""
        ...


class SafetensorsFiles:
    """See `Weights`."""

    def __init__(self, paths: Sequence[Path], what: str) -> None:
        self.what = what
        self.held: dict[str, Held] = {}
        self._places: dict[str, tuple[Path, Entry]] = {}
        self._staging = new_tensor([PIECE], torch.uint8)
        for path in paths:
            for name, entry in _header(path).items():
                if name in self._places:
                    raise CheckpointError(f"{name} is in {self._places[name][0]} and in {path}: which of them counts?")
                self._places[name] = path, entry
                self.held[name] = Held(entry.shape, DTYPE_OF[entry.dtype])

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`."""
        path, entry = self._places[name]
        held = self.held[name]
        values = new_tensor(held.shape if box is None else box.shape, dtype or held.dtype)
        flat, size = values.view(-1), held.dtype.itemsize
        is_cast = values.dtype is not held.dtype
        staging = self._staging.view(held.dtype)
        with open_plain(path.resolve()) as fd:
            for stretch in common(box, None, held.shape):
                target = flat[stretch.at_first : stretch.at_first + stretch.numel]
                start = entry.start + stretch.at_second * size
                for part in target.split(staging.numel()) if is_cast else (target,):
                    into = staging[: part.numel()] if is_cast else part
                    _read_into(fd, _bytes(into), start, f"{path}: {name}")
                    start += into.nbytes
                    if is_cast:
                        part.copy_(into)
        return values


def _bytes(values: Tensor) -> memoryview:
    flat: Any = values.view(torch.uint8).numpy()
    return memoryview(flat)


def _header(path: Path) -> Mapping[str, Entry]:
    with open_plain(path.resolve()) as fd:
        nbytes = os.fstat(fd).st_size
        length = header_length(os.pread(fd, 8, 0), nbytes, str(path))
        return parse(os.pread(fd, length, 0), nbytes, str(path)).entries


def _read_into(fd: int, memory: memoryview, position: int, what: str) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(fd, [memory[done:]], position + done)
        if count == 0:
            raise CheckpointError(f"{what} ends at byte {position + done}: the file was cut off while it was read.")
        done += count


class TorchFiles:
    """See `Weights`. A state dict may lie under "module", "model" or "state_dict"."""

    def __init__(self, paths: Sequence[Path], what: str) -> None:
        self.what = what
        self._tensors: dict[str, Any] = {}
        self._files: dict[str, Mapped] = {}
        for path in paths:
            content = read_torch_file(path.resolve())
            file = Mapped(path.resolve())
            for name, value in _state_dict(content).items():
                if not isinstance(value, Tensor) and not _is_quantized(value):
                    continue
                if name in self._tensors:
                    raise CheckpointError(
                        f"{name} is in {path} and in another of the files: which of them counts?\n"
                        "  Files of ranks that hold parts of one tensor are read where a JSON says so (tp_size)."
                    )
                self._tensors[name], self._files[name] = value, file
        self.held = {name: _held(value) for name, value in self._tensors.items()}

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`."""
        value, file = self._tensors[name], self._files[name]
        if isinstance(value, Tensor):
            return copy_out(value, box, dtype or value.dtype, file)
        found = copy_out(_dequantized(value), box, dtype or torch.float32, None)
        for stored in value:
            file.let_go(stored)
        return found


def cut(whole: Tensor, box: Box | None) -> Tensor:
    """A part of a tensor: itself where that is all of it, memory of its own otherwise."""
    part = whole
    for dim, ranges in enumerate(() if box is None else box.ranges):
        if ranges != ((0, whole.shape[dim]),):
            pieces = [part.narrow(dim, start, stop - start) for start, stop in ranges]
            part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    is_part = part.numel() < whole.numel() and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return part.clone(memory_format=torch.contiguous_format) if is_part else part


def _state_dict(content: Any) -> Mapping[str, Any]:
    for key in ("module", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError("a torch file holds no state dict.")
    return content


def _is_quantized(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)


def _held(value: Any) -> Held:
    return (
        Held(tuple(value.shape), value.dtype)
        if isinstance(value, Tensor)
        else Held(tuple(value[0].shape), torch.float32)
    )


def _dequantized(pair: Any) -> Tensor:
    values, scales = pair
    return (values.float().view(scales.numel(), -1) * scales.float().view(-1, 1)).view(values.shape)


class TrainingCheckpoint:
    """See `Weights`. Parameters in the precision that they are stored in, masters first."""

    def __init__(self, source: Source, what: str) -> None:
        self.what = what
        self._source = source
        self._places = {name: (PARAM, name) for name in source.tensors.get(PARAM, {})}
        self._places |= {alias: self._places[name] for alias, name in source.tied.items() if name in self._places}
        self._places |= {name: (BUFFER, name) for name in source.tensors.get(BUFFER, {})}
        stored = {name: source.tensors[kind][of] for name, (kind, of) in self._places.items()}
        self.held = {name: Held(tuple(tensor.shape), DTYPE_OF[tensor.dtype]) for name, tensor in stored.items()}

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`."""
        held = self.held[name]
        values = new_tensor(held.shape if box is None else box.shape, dtype or held.dtype)
        flat = values.view(-1)

        def sink(offset: int, found: Tensor) -> None:
            flat.narrow(0, offset, found.numel()).copy_(found)

        self._source.fetch([Wanted(*self._places[name], 0, values.numel(), sink, box)])
        return values
