"""Weights at rest, whoever wrote them: names, shapes, and reading a part of one tensor.

Opened by `found`, matched to a model by `names`, read by `load`. All headers are read and checked when files are opened, so that a
damaged file is an error before a model is touched.

    SafetensorsFiles     byte ranges are read into place, nothing is mapped; pieces are read ahead by a thread
    TorchFiles           state dicts as data only, mapped: what is read is copied out
    TrainingCheckpoint   ours and the original's, at any stage, whole tensors put together from ranks' pieces

Invariant: `read` gives memory of its own, of the box's shape, in the dtype asked for, and holds no more than that (`room`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box, Stretch, common
from deepspeed.checkpoint.container import DTYPE_OF, Entry, header_length, parse
from deepspeed.checkpoint.files import open_plain
from deepspeed.checkpoint.mapped import Mapped
from deepspeed.checkpoint.original import read_torch_file
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.subject import BUFFER
from deepspeed.inference.room import PIECE, copy_out, new_tensor
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.checkpoint_flats import PARAM

_is_advised = hasattr(os, "posix_fadvise")


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

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """The same part in order, in flat tensors of `numel` elements (the last: the rest) as stored, each valid until the next is
        asked for; or in one of all."""
        ...


class SafetensorsFiles:
    """See `Weights`."""

    def __init__(self, paths: Sequence[Path], what: str) -> None:
        self.what = what
        self.held: dict[str, Held] = {}
        self._places: dict[str, tuple[Path, Entry]] = {}
        self._staging = new_tensor([3, PIECE // 2], torch.uint8)
        for path in paths:
            for name, entry in _header(path).items():
                if name in self._places:
                    raise CheckpointError(f"{name} is in {self._places[name][0]} and in {path}: which of them counts?")
                self._places[name] = path, entry
                self.held[name] = Held(entry.shape, DTYPE_OF[entry.dtype])

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`."""
        held = self.held[name]
        values = new_tensor(held.shape if box is None else box.shape, dtype or held.dtype)
        if values.dtype is not held.dtype:
            numel = self._staging.shape[1] // held.dtype.itemsize
            for part, piece in zip(values.view(-1).split(numel), self.pieces(name, box, numel), strict=True):
                part.copy_(piece)
            return values
        with self._reader(name, box, max(values.numel(), 1)) as (read, count):
            for index in range(count):
                read(index, values.view(-1))
        return values

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """See `Weights`. While one is used, the next two are read."""
        size = self.held[name].dtype.itemsize
        if numel * size > self._staging.shape[1]:
            yield self.read(name, box).view(-1)
            return
        buffers = [each[: numel * size].view(self.held[name].dtype) for each in self._staging]
        with self._reader(name, box, numel) as (read, count):
            if count < 2:
                yield from map(read, range(count), buffers)
                return
            with ThreadPoolExecutor(2, "deepspeed-weights") as ahead:
                coming = [ahead.submit(read, index, buffers[index]) for index in range(2)]
                for index in range(count):
                    piece = coming.pop(0).result()
                    if index + 2 < count:
                        coming.append(ahead.submit(read, index + 2, buffers[(index + 2) % 3]))
                    yield piece

    @contextlib.contextmanager
    def _reader(self, name: str, box: Box | None, numel: int) -> Iterator[tuple[Callable[[int, Tensor], Tensor], int]]:
        """Reads a numbered piece of `numel` elements into the front of a flat tensor, and the number of pieces."""
        path, entry = self._places[name]
        dtype = self.held[name].dtype
        cut_up = list(_by_piece(common(box, None, entry.shape), numel))
        with open_plain(path.resolve()) as fd:
            if box is None and _is_advised:  # the disk reads on while pages are cleared, or pieces quantized
                nbytes = math.prod(entry.shape) * dtype.itemsize
                os.posix_fadvise(fd, entry.start, nbytes, os.POSIX_FADV_WILLNEED)

            def read(index: int, into: Tensor) -> Tensor:
                memory = _bytes(into)
                for at, position, count in cut_up[index]:
                    start = entry.start + position * dtype.itemsize
                    part = memory[at * dtype.itemsize : (at + count) * dtype.itemsize]
                    _read_into(fd, part, start, f"{path}: {name}")
                return into[: sum(stretch.numel for stretch in cut_up[index])]

            yield read, len(cut_up)


def _by_piece(stretches: Iterable[Stretch], numel: int) -> Iterator[list[Stretch]]:
    """Stretches, in order and without gaps, cut every `numel` elements; positions count from their piece's first element."""
    piece: list[Stretch] = []
    held = 0
    for _, position, left in stretches:
        while left:
            taken = min(left, numel - held)
            piece.append(Stretch(held, position, taken))
            held, position, left = held + taken, position + taken, left - taken
            if held == numel:
                yield piece
                piece, held = [], 0
    if piece:
        yield piece


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
            for name, value in _state_dict(content, path).items():
                if not isinstance(value, Tensor) and not _is_quantized(value):
                    continue
                if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_quantized):
                    kind = value.dtype if value.is_quantized else value.layout
                    raise CheckpointError(
                        f"{name} in {path} is a tensor of torch's kind {kind}: weights are read as dense numbers.\n"
                        "  Save it made whole (to_dense(), dequantize())."
                    )
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

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """See `Weights`. Of the mapped file itself where it can be."""
        value, file = self._tensors[name], self._files[name]
        if box is not None or not isinstance(value, Tensor) or not value.is_contiguous():
            yield self.read(name, box).view(-1)
            return
        for piece in value.view(-1).split(numel):
            yield piece
            file.let_go(piece)


def cut(whole: Tensor, box: Box | None) -> Tensor:
    """A part of a tensor: itself where that is all of it, memory of its own otherwise."""
    part = whole
    for dim, ranges in enumerate(() if box is None else box.ranges):
        if ranges != ((0, whole.shape[dim]),):
            pieces = [part.narrow(dim, start, stop - start) for start, stop in ranges]
            part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    is_part = part.numel() < whole.numel() and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return part.clone(memory_format=torch.contiguous_format) if is_part else part


def _state_dict(content: Any, path: Path) -> Mapping[str, Any]:
    for key in ("module", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and no state dict.")
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
    if scales.dim() == 2 and 1 < scales.shape[1] == values.shape[1]:  # of a transposed weight: groups go down
        return (values.float().view(len(scales), -1, values.shape[1]) * scales.float().unsqueeze(1)).view(values.shape)
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

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """See `Weights`."""
        yield self.read(name, box).view(-1)
