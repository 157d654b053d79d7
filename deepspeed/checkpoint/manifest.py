"""The manifest: every file with its size and digests, every tensor with the intervals that make it up.

Made by `save` from what all ranks wrote, read by `store`, the command line and `consolidate`. Written last, so that its
presence says that everything it lists is durable.

    tensors["param"]["h.0.weight"] = dtype F32, shape (768, 768), pieces (file 0: [0, 300000)), (file 1: [300000, 589824))

Where ranks hold boxes of a tensor (tensor parallelism), a piece is an interval of its box instead (`boxes`). A piece is stored in its file under the key `piece_key(kind, name, start, stop)`, 1-D. Kinds: "param" (the weights, in
the widest precision the run kept), "buffer", "optim.<state>", and "value" (whole tensors that JSON values refer to).

Invariant: the pieces of every box cover it exactly once, and the boxes of every tensor tile it. `check_coverage` proves it before a checkpoint is published
and again when one is opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed.checkpoint.boxes import Box, check_box, describe, tiling_problem
from deepspeed.checkpoint.container import DTYPE_OF, parse_json
from deepspeed.checkpoint.digest import digest_function
from deepspeed.checkpoint.files import check_name
from deepspeed.checkpoint.staging import BLOCK
from deepspeed.checkpoint.writer import FileRecord
from deepspeed.utils.errors import CheckpointError

FILE_NAME = "manifest.json"
STATE_NAME = "state.json"
FORMAT = "deepspeed.checkpoint"
PLAIN_VERSION, VERSION = 1, 2
"""A manifest without boxes is written as version 1, which earlier releases read too."""
SEAL = "seal"
"""The manifest's last field: the digest of everything before it."""
MAX_MANIFEST = 1 << 30
_HEX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements [start, stop) of a flattened box of a tensor, in the file at this position of `Manifest.shards`."""

    start: int
    stop: int
    file: int
    box: Box | None = None
    """None is the whole tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one kind."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * DTYPE_OF[self.dtype].itemsize

    def coverage_problem(self) -> str | None:
        """What keeps the pieces from covering the tensor exactly once; None if nothing."""
        by_box: dict[Box | None, list[Extent]] = {}
        for extent in self.extents:
            by_box.setdefault(extent.box, []).append(extent)
        if set(by_box) <= {None}:
            return coverage_problem(self.extents, self.numel)
        for box, extents in by_box.items():
            problem = coverage_problem(extents, self.numel if box is None else box.numel)
            if problem:
                return f"of its box {describe(box)}, {problem}"
        return tiling_problem(list(by_box), self.shape)


@dataclass(frozen=True)
class ParameterInfo:
    """What the model says about a parameter. `dtype` is the model's, which may be narrower than what is stored."""

    dtype: str
    shape: tuple[int, ...]
    is_frozen: bool


@dataclass
class Manifest:
    """See the module's text. `about` holds what people ask first: tag, step, world_size, zero_stage, versions."""

    about: dict[str, Any]
    algorithm: str
    shards: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    parameters: dict[str, ParameterInfo] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    """Other names of parameters: name -> the name it is stored under."""
    tensors: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    block: int = BLOCK

    def to_json(self) -> bytes:
        """As the file's text."""
        tensors = {
            kind: {name: _tensor_to_json(tensor) for name, tensor in by_name.items()}
            for kind, by_name in self.tensors.items()
        }
        has_boxes = any(e.box for by_name in self.tensors.values() for t in by_name.values() for e in t.extents)
        value = {
            "format": FORMAT,
            "version": VERSION if has_boxes else PLAIN_VERSION,
            **self.about,
            "digest": {"algorithm": self.algorithm, "block": self.block},
            "shards": self.shards,
            "files": {name: {"bytes": r.nbytes, "digests": list(r.digests)} for name, r in self.files.items()},
            "parameters": {
                name: {"dtype": p.dtype, "shape": list(p.shape), "frozen": p.is_frozen}
                for name, p in self.parameters.items()
            },
            "tied": self.tied,
            "tensors": tensors,
        }
        return seal(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), self.algorithm)

    def check_coverage(self) -> None:
        """Raise CheckpointError, naming the tensors, unless the pieces of each cover it exactly once."""
        problems = [
            f"{kind} {name}: {problem}"
            for kind, by_name in self.tensors.items()
            for name, tensor in by_name.items()
            if (problem := tensor.coverage_problem())
        ]
        if problems:
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise CheckpointError("the checkpoint is not whole:\n  " + "\n  ".join(problems[:10]) + more)


def coverage_problem(extents: Sequence[Extent], numel: int) -> str | None:
    """What is wrong with a set of intervals that should tile [0, numel); None if nothing."""
    position = 0
    for extent in sorted(extents, key=lambda extent: (extent.start, extent.stop)):
        if extent.start != position:
            what = "missing" if extent.start > position else "stored twice"
            low, high = sorted((extent.start, position))
            return f"elements [{low}, {min(high, numel)}) are {what}"
        position = extent.stop
    if position != numel:
        return f"elements [{min(position, numel)}, {max(position, numel)}) are {'missing' if position < numel else 'too many'}"
    return None


def seal(text: bytes, algorithm: str) -> bytes:
    """A JSON object with a last field that digests all of the text before it."""
    body = text[:-1]
    return body + f',"{SEAL}":"{digest_function(algorithm)(body)}"}}'.encode()


def _check_seal(text: bytes, algorithm: str, path: str) -> None:
    body, _, rest = text.rpartition(f',"{SEAL}":"'.encode())
    if rest != f'{digest_function(algorithm)(body)}"}}'.encode():
        raise CheckpointError(f"{path} is damaged: it does not match its own digest.\n  Load another checkpoint.")


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Read and check a manifest. Raises CheckpointError, naming the field, for anything that `to_json` would not write."""
    value = parse_json(text, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of this format.")
    if value.get("version") not in (PLAIN_VERSION, VERSION):
        raise CheckpointError(
            f"{path} has version {value.get('version')!r}; this release reads versions {PLAIN_VERSION} and {VERSION}.\n"
            "  Use a newer release."
        )
    place = "its top level"
    try:
        rest = {"format", "version", "digest", "shards", "files", "parameters", "tied", "tensors", SEAL}
        about = {key: item for key, item in value.items() if key not in rest}
        place = "digest"
        block = _count(value["digest"]["block"])
        if not 4096 <= block <= 1 << 30 or block % 4096:
            raise ValueError(f"a block of {block} bytes")
        manifest = Manifest(about, _text(value["digest"]["algorithm"]), block=block)
        _check_seal(text, manifest.algorithm, path)
        place = "shards"
        manifest.shards = [check_name(_text(name), path) for name in value["shards"]]
        for name, record in value["files"].items():
            place = f"files.{name}"
            manifest.files[check_name(name, path)] = _file(record, block)
        for name, info in value["parameters"].items():
            place = f"parameters.{name}"
            manifest.parameters[name] = ParameterInfo(
                _dtype(info["dtype"]), _shape(info["shape"]), info["frozen"] is True
            )
        place = "tied"
        manifest.tied = {name: _text(other) for name, other in value["tied"].items()}
        for kind, by_name in value["tensors"].items():
            for name, tensor in by_name.items():
                place = f"tensors.{kind}.{name}"
                stored = _tensor_of_json(tensor)
                if any(e.start > e.stop or e.file >= len(manifest.shards) for e in stored.extents):
                    raise ValueError("a piece that cannot be")
                manifest.tensors.setdefault(kind, {})[name] = stored
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: {place} is malformed ({error!r}).") from error
    missing = [name for name in manifest.shards if name not in manifest.files]
    if missing:
        raise CheckpointError(f"{path}: the shard {missing[0]} is not among its files.")
    manifest.check_coverage()
    return manifest


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = list(dict.fromkeys(e.box for e in tensor.extents if e.box is not None))
    pieces = [[e.file, e.start, e.stop, *([boxes.index(e.box)] if e.box is not None else [])] for e in tensor.extents]
    value = {"dtype": tensor.dtype, "shape": list(tensor.shape), "pieces": pieces}
    return value | ({"boxes": [[[list(r) for r in of_dim] for of_dim in box.ranges] for box in boxes]} if boxes else {})


def _tensor_of_json(value: Mapping[str, Any]) -> StoredTensor:
    shape = _shape(value["shape"])
    boxes = [_box(ranges, shape) for ranges in value.get("boxes", ())]
    extents = []
    for file, start, stop, *rest in value["pieces"]:
        box = boxes[_count(rest[0])] if rest else None
        extents.append(Extent(_count(start), _count(stop), _count(file), box))
    return StoredTensor(_dtype(value["dtype"]), shape, tuple(extents))


def _box(value: Any, shape: tuple[int, ...]) -> Box:
    box = Box(tuple(tuple((_count(start), _count(stop)) for start, stop in of_dim) for of_dim in value))
    check_box(box, shape)
    return box


def _file(record: Mapping[str, Any], block: int) -> FileRecord:
    nbytes, digests = _count(record["bytes"]), tuple(record["digests"])
    if len(digests) != -(-nbytes // block) or not all(isinstance(d, str) and _HEX.fullmatch(d) for d in digests):
        raise ValueError("its digests do not fit its size")
    return FileRecord(nbytes, digests)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _dtype(value: Any) -> str:
    if value not in DTYPE_OF:
        raise ValueError(f"{value!r} is not a dtype")
    return str(value)


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(_count(size) for size in value)
    if len(shape) > 64 or math.prod(shape) >= 1 << 62:
        raise ValueError(f"{value!r} is not a shape")
    return shape


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank wrote: elements [start, stop) of its box of a tensor."""

    kind: str
    name: str
    dtype: str
    start: int
    stop: int
    box: Box | None = None


def merge(
    pieces_of_files: Iterable[Sequence[Piece]], shapes: Mapping[tuple[str, str], tuple[int, ...]]
) -> dict[str, dict[str, StoredTensor]]:
    """The manifest's table from each file's pieces. `shapes[kind, name]` gives shapes. Raises CheckpointError where ranks
    wrote one tensor in different dtypes."""
    found: dict[tuple[str, str], tuple[str, list[Extent]]] = {}
    for file, pieces in enumerate(pieces_of_files):
        for piece in pieces:
            dtype, extents = found.setdefault((piece.kind, piece.name), (piece.dtype, []))
            if dtype != piece.dtype:
                raise CheckpointError(
                    f"{piece.kind} {piece.name} has dtype {dtype} on one rank and {piece.dtype} on another."
                )
            extents.append(Extent(piece.start, piece.stop, file, piece.box))
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for (kind, name), (dtype, extents) in found.items():
        tensors.setdefault(kind, {})[name] = StoredTensor(
            dtype, shapes[kind, name], tuple(sorted(extents, key=lambda e: (e.start, e.stop, e.file)))
        )
    return tensors
