"""A checkpoint in our format, open for reading.

Made by `open_checkpoint`; used by everything that loads. Nothing in the files is believed before it is checked: names,
sizes, headers and the cover of every tensor when the checkpoint is opened, digests as blocks are read.

Invariant: opening reads only the manifest and headers, whatever the size of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Stretch, meeting
from deepspeed.checkpoint.container import DTYPE_OF, Entry, Layout, header_length, parse, parse_json
from deepspeed.checkpoint.digest import digest_function
from deepspeed.checkpoint.files import open_plain, read_plain
from deepspeed.checkpoint.manifest import (
    FILE_NAME,
    MAX_MANIFEST,
    STATE_NAME,
    Extent,
    Manifest,
    parse_manifest,
)
from deepspeed.checkpoint.names import piece_key, rank_file
from deepspeed.checkpoint.reader import ByteRange, check_size, damaged, make_staging, read_ranges
from deepspeed.checkpoint.source import Wanted
from deepspeed.checkpoint.subject import VALUE
from deepspeed.checkpoint.values import decode
from deepspeed.utils.errors import CheckpointError


class Stored:
    """See `source.Source`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = parse_manifest(read_plain(folder / FILE_NAME, MAX_MANIFEST), str(folder / FILE_NAME))
        self.about = self.manifest.about
        self.parameters = self.manifest.parameters
        self.tied = self.manifest.tied
        self.tensors = self.manifest.tensors
        self._digest = digest_function(self.manifest.algorithm)
        self._layouts: dict[str, Layout] = {}

    def state(self) -> dict[str, Any]:
        """The first rank's state."""
        return self._read_state(STATE_NAME)

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """One rank's own state."""
        name = rank_file(rank)
        return self._read_state(name) if name in self.manifest.files else None

    def _read_state(self, name: str) -> dict[str, Any]:
        record = self.manifest.files.get(name)
        if record is None:
            raise CheckpointError(f"{self.folder / FILE_NAME} lists no {name}: the checkpoint is not whole.")
        with open_plain(self.folder / name) as fd:
            check_size(self.folder / name, os.fstat(fd).st_size, record)
        data = bytearray(record.nbytes)
        into = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

        def sink(offset: int, values: Tensor) -> None:
            into.narrow(0, offset, values.numel()).copy_(values)

        whole = ByteRange(0, record.nbytes, sink, "the run's state")
        read_ranges(self.folder / name, record, self.manifest.block, [whole], self._digest)
        value = parse_json(bytes(data), str(self.folder / name))
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / name} is not a JSON object.")
        return decode(value, _Values(self, _tensor_names(value)))

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Deliver elements to their sinks, reading every file once, from start to end."""
        ranges: dict[int, list[ByteRange]] = {}
        for want in wanted:
            stored = self.tensors[want.kind][want.name]
            wanted_of_box = want.box, want.start, want.start + want.numel
            for extent in stored.extents:
                for meets in meeting((extent.box, extent.start, extent.stop), wanted_of_box, stored.shape):
                    ranges.setdefault(extent.file, []).append(self._range(want, extent, meets))
        staging = make_staging()
        for file in sorted(ranges):
            name = self.manifest.shards[file]
            record = self.manifest.files[name]
            read_ranges(self.folder / name, record, self.manifest.block, ranges[file], self._digest, staging)

    def entry(self, kind: str, name: str, extent: Extent) -> Entry:
        """Where a piece lies, by its shard's header. Raises CheckpointError unless that says what the manifest does."""
        file = self.manifest.shards[extent.file]
        key = piece_key(kind, name, extent.start, extent.stop)
        stored = self.tensors[kind][name]
        found = self.layout(file).entries.get(key)
        if found is None or found.dtype != stored.dtype or found.shape != (extent.stop - extent.start,):
            raise CheckpointError(f"{self.folder / file}: {key} is missing or not what the manifest says.")
        if found.start % DTYPE_OF[stored.dtype].itemsize:
            raise CheckpointError(f"{self.folder / file}: {key} is not aligned to its element size.")
        return found

    def _range(self, want: Wanted, extent: Extent, meets: Stretch) -> ByteRange:
        entry = self.entry(want.kind, want.name, extent)
        dtype = DTYPE_OF[entry.dtype]

        def sink(offset: int, data: Tensor) -> None:
            want.sink(meets.at_second - want.start + offset // dtype.itemsize, data.view(dtype))

        first = entry.start + (meets.at_first - extent.start) * dtype.itemsize
        return ByteRange(first, first + meets.numel * dtype.itemsize, sink, f"{want.kind} {want.name}")

    def layout(self, file: str) -> Layout:
        """The checked header of a shard."""
        if file not in self._layouts:
            path, record = self.folder / file, self.manifest.files[file]
            with open_plain(path) as fd:
                nbytes = os.fstat(fd).st_size
                check_size(path, nbytes, record)
                length = header_length(os.pread(fd, 8, 0), nbytes, str(path))
                # The header's own blocks are checked before it is parsed.
                end = min(record.nbytes, -(-length // self.manifest.block) * self.manifest.block)
                data = os.pread(fd, end, 0)
            for index in range(-(-end // self.manifest.block)):
                block = data[index * self.manifest.block : (index + 1) * self.manifest.block]
                if self._digest(block) != record.digests[index]:
                    raise damaged(path, index, self.manifest.block, self._pieces_of(file, index))
            self._layouts[file] = parse(data[:length], nbytes, str(path))
        return self._layouts[file]

    def _pieces_of(self, file: str, index: int) -> list[ByteRange]:
        """What the manifest says a shard holds, for the words of an error: without a header nobody knows where."""
        number = self.manifest.shards.index(file)
        low, high = index * self.manifest.block, (index + 1) * self.manifest.block
        names = [
            f"{k} {n}"
            for k, by_name in self.tensors.items()
            for n, t in by_name.items()
            if any(e.file == number for e in t.extents)
        ]
        return [ByteRange(low, high, lambda *_: None, text) for text in ["the header", *names]]


class _Values(Mapping[str, Tensor]):
    """The tensors that a JSON value refers to, read together."""

    def __init__(self, store: Stored, names: set[str]) -> None:
        known = store.tensors.get(VALUE, {})
        missing = sorted(names - known.keys())
        if missing:
            raise CheckpointError(f"{store.folder}: the tensor {missing[0]} of the run's state is missing.")
        for name in names:  # before memory is taken for them: a lying size ends here
            for extent in known[name].extents:
                store.entry(VALUE, name, extent)
        self._tensors = {n: torch.empty(known[n].shape, dtype=DTYPE_OF[known[n].dtype]) for n in names}
        store.fetch([Wanted(VALUE, n, 0, t.numel(), _into(t)) for n, t in self._tensors.items()])

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _into(tensor: Tensor):  # type: ignore[no-untyped-def]
    flat = tensor.view(-1)
    return lambda offset, values: flat.narrow(0, offset, values.numel()).copy_(values)


def _tensor_names(value: Any) -> set[str]:
    if isinstance(value, list):
        return {name for item in value for name in _tensor_names(item)}
    if not isinstance(value, dict):
        return set()
    found = {name for item in value.values() for name in _tensor_names(item)}
    return found | {item for tag, item in value.items() if tag in ("$tensor", "$array") and isinstance(item, str)}
