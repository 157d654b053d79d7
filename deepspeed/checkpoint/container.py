"""The safetensors layout: an 8-byte length, a JSON header, then the tensors' bytes end to end.

Written by `writer` (which lays out a file before it has any byte of it), read by `reader`, `export` and the command line.

Own code rather than the library's, because the library needs all tensors of a file in memory at once, and because here
a header is checked completely before anything in it is believed.

Invariant: a `Layout` that was parsed covers its file exactly: no gap, no overlap, no byte beyond the end.
Source: the format's description at https://github.com/huggingface/safetensors. Ours are padded with spaces to 4 KiB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.utils.errors import CheckpointError

PAGE = 4096
"""Data begins at a multiple of this, so that direct I/O needs no copy."""
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
DTYPE_OF: dict[str, torch.dtype] = {key: getattr(torch, name) for key, name in _DTYPES.items() if hasattr(torch, name)}
NAME_OF: dict[torch.dtype, str] = {dtype: key for key, dtype in DTYPE_OF.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `start` and `stop` are byte positions in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What lies where in one file."""

    entries: dict[str, Entry]
    header: bytes
    """Length, JSON and padding: the file's first bytes."""
    nbytes: int


def dtype_key(dtype: torch.dtype, what: str) -> str:
    """The format's name of a dtype. Raises CheckpointError where it has none."""
    if dtype not in NAME_OF:
        raise CheckpointError(f"{what} has dtype {dtype}, for which the safetensors format has no name.")
    return NAME_OF[dtype]


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """Place tensors one after the other, wide dtypes first, so that each is aligned to its own element size."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    sized = sorted(tensors, key=lambda item: -item[1].itemsize)
    offset = 0
    for name, dtype, shape in sized:
        if name in fields:
            raise CheckpointError(f"two tensors have the name {name}.")
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        fields[name] = {
            "dtype": dtype_key(dtype, name),
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    header = struct.pack("<Q", len(text)) + text
    entries = {
        name: Entry(
            field["dtype"],
            tuple(field["shape"]),
            len(header) + field["data_offsets"][0],
            len(header) + field["data_offsets"][1],
        )
        for name, field in fields.items()
        if name != "__metadata__"
    }
    return Layout(entries, header, len(header) + offset)


def header_length(first: bytes, file_nbytes: int, path: str) -> int:
    """Bytes of length field and JSON together, from a file's first 8 bytes. Raises CheckpointError."""
    if len(first) < 8:
        raise CheckpointError(f"{path} is cut off: {file_nbytes} bytes, not even a header.")
    (length,) = struct.unpack("<Q", first[:8])
    if length > min(MAX_HEADER, file_nbytes - 8):
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, the file has {file_nbytes}: it is cut off or damaged."
        )
    return 8 + length


def parse(header: bytes, file_nbytes: int, path: str) -> Layout:
    """Read and check a header (length field included). Raises CheckpointError, naming the file and the tensor."""
    fields = parse_json(header[8:], f"{path}: its header")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object.")
    fields.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, field in fields.items():
        try:
            dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
            numbers = (*shape, start, stop)
            if dtype not in DTYPE_OF or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
                raise ValueError("a dtype, size or position that is none")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the header's entry of {name} is malformed ({error}).") from error
        numel = 1
        for size in shape:
            numel *= size
        if stop - start != numel * DTYPE_OF[dtype].itemsize:
            raise CheckpointError(
                f"{path}: {name} is {dtype}{list(shape)}, which is not the {stop - start} bytes its header gives it."
            )
        entries[name] = Entry(dtype, shape, len(header) + start, len(header) + stop)
    _check_cover(entries, len(header), file_nbytes, path)
    return Layout(entries, header, file_nbytes)


def _check_cover(entries: Mapping[str, Entry], start: int, stop: int, path: str) -> None:
    position, last = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a gap after"
            raise CheckpointError(f"{path}: {name} {kind} {last} (byte {entry.start}, expected {position}).")
        position, last = entry.stop, name
    if position != stop:
        raise CheckpointError(
            f"{path}: its tensors end at byte {position}, the file has {stop}: it is cut off or damaged."
        )


def parse_json(text: bytes, what: str) -> Any:
    """JSON that a stranger may have written. Raises CheckpointError for anything malformed, nested too deep, or doubled."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in names if names.count(k) > 1)!r} appears twice")
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
