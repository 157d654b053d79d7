"""The command `deepspeed.checkpoint` (also `python -m deepspeed.checkpoint`): inspect, verify, diff.

    deepspeed.checkpoint inspect ckpt               what is inside: a table of tensors, step, ranks, sizes
    deepspeed.checkpoint verify  ckpt/global_step10 every digest, every header, every tensor's cover
    deepspeed.checkpoint diff    a b                names, shapes, and elements that differ

A path is a tag's folder, or the folder above it, of which the latest is taken. Exit status: 0 fine, 1 damaged or
different, 2 not a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from deepspeed.checkpoint.container import DTYPE_OF
from deepspeed.checkpoint.digest import digest_function
from deepspeed.checkpoint.find import LATEST, checkpoint_folder, latest_tag, open_checkpoint
from deepspeed.checkpoint.manifest import FILE_NAME
from deepspeed.checkpoint.reader import ByteRange, read_ranges
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.store import Stored
from deepspeed.utils.errors import CheckpointError, DamagedError

CHUNK = 1 << 22
"""Elements compared at a time."""


def locate(path: Path) -> Path:
    """A tag's folder from itself or from the folder above. Raises CheckpointError."""
    if (path / LATEST).exists() and not (path / FILE_NAME).exists():
        tag = latest_tag(path)
        assert tag is not None, "the file is there"
        return checkpoint_folder(path, tag)
    return path


def _is_checkpoint(path: Path) -> bool:
    """Whether there is one to be damaged."""
    try:
        return (locate(path) / FILE_NAME).exists()
    except (CheckpointError, OSError):
        return False


def human(nbytes: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def inspect(path: Path, as_json: bool) -> int:
    """Print what is inside."""
    source = open_checkpoint(locate(path))
    kinds = list(source.tensors)
    rows = [
        (name, kind, str(DTYPE_OF[t.dtype]).removeprefix("torch."), list(t.shape), t.nbytes, len(t.extents))
        for kind in kinds
        for name, t in source.tensors[kind].items()
    ]
    if as_json:
        keys = ("name", "kind", "dtype", "shape", "nbytes", "num_pieces")
        print(
            json.dumps(
                {**source.about, "tied": source.tied, "tensors": [dict(zip(keys, r, strict=True)) for r in rows]}
            )
        )
        return 0
    _print_table(
        [
            ("tensor", "kind", "dtype", "shape", "size", "pieces"),
            *((n, k, d, str(s), human(b), str(p)) for n, k, d, s, b, p in rows),
        ]
    )
    for alias, name in source.tied.items():
        print(f"{alias} is {name}")
    print()
    for kind in kinds:
        tensors = source.tensors[kind].values()
        total = sum(t.nbytes for t in tensors)
        print(f"{kind}: {len(tensors)} tensors, {sum(math.prod(t.shape) for t in tensors)} elements, {human(total)}")
    frozen = sum(info.is_frozen for info in source.parameters.values())
    print(f"parameters: {len(source.parameters)}, of which {frozen} frozen")
    for key, value in source.about.items():
        print(f"{key}: {value}")
    return 0


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def verify(path: Path) -> int:
    """Check everything that can be checked; print every problem."""
    folder = locate(path)
    source = open_checkpoint(folder)
    if not isinstance(source, Stored):
        print(
            f"{folder} was written by the original DeepSpeed: it has no digests. Every tensor is covered exactly once."
        )
        return 0
    problems = _problems(source)
    for problem in problems:
        print(problem)
    listed = {FILE_NAME, *source.manifest.files}
    others = sorted(entry.name for entry in os.scandir(folder) if entry.name not in listed)
    if others:
        print(f"not part of the checkpoint: {', '.join(others)}")
    total = sum(record.nbytes for record in source.manifest.files.values())
    outcome = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "whole"
    print(f"{folder}: {len(source.manifest.files)} files, {human(total)}: {outcome}")
    return 1 if problems else 0


def _problems(source: Stored) -> list[str]:
    """Every problem once, a line each."""
    manifest = source.manifest
    found: list[str] = []
    unreadable: set[str] = set()
    for name, record in manifest.files.items():
        first, ranges = 0, [ByteRange(0, record.nbytes, _ignore, name)]
        try:
            if name in manifest.shards:
                ranges = _pieces_of(source, name)
        except (CheckpointError, OSError) as error:
            found.append(_first_line(error))
            unreadable.add(name)
            if not isinstance(error, DamagedError):
                continue
            first = manifest.block  # without a header nobody knows what lies where, but damage further on is damage
        found += _damaged_blocks(source, name, first, ranges)
    for kind, by_name in manifest.tensors.items():
        for tensor_name, tensor in by_name.items():
            for extent in tensor.extents:
                if manifest.shards[extent.file] not in unreadable:
                    found += _words_of(lambda: source.entry(kind, tensor_name, extent))  # noqa: B023 - called at once
    if not found:
        found += _words_of(source.state)
        for rank in range(len(manifest.shards)):
            found += _words_of(lambda: source.rank_state(rank))  # noqa: B023 - called at once
    return found


def _pieces_of(source: Stored, name: str) -> list[ByteRange]:
    layout = source.layout(name)
    ranges = [ByteRange(entry.start, entry.stop, _ignore, key) for key, entry in layout.entries.items()]
    return [*ranges, ByteRange(0, len(layout.header), _ignore, "the header")]


def _damaged_blocks(source: Stored, name: str, first: int, ranges: list[ByteRange]) -> Iterable[str]:
    """Block by block, so that one damaged block does not hide the next."""
    manifest, record = source.manifest, source.manifest.files[name]
    digest = digest_function(manifest.algorithm)
    for low in range(first, record.nbytes, manifest.block):
        high = min(low + manifest.block, record.nbytes)
        touched = [ByteRange(max(low, r.start), min(high, r.stop), r.sink, r.what) for r in ranges]
        try:
            read_ranges(source.folder / name, record, manifest.block, touched, digest)
        except (CheckpointError, OSError) as error:
            yield _first_line(error)
            if not isinstance(error, DamagedError):
                break


def _ignore(offset: int, values: Tensor) -> None:
    """A sink for bytes that are only digested."""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _words_of(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except (CheckpointError, OSError) as error:
        return [_first_line(error)]
    return []


def diff(one: Path, other: Path) -> int:
    """Compare two checkpoints tensor by tensor; of differing ones the number of elements and the largest difference."""
    a, b = open_checkpoint(locate(one)), open_checkpoint(locate(other))
    num_different = 0
    for kind in dict.fromkeys([*a.tensors, *b.tensors]):
        if kind == "value":
            continue
        ours, theirs = a.tensors.get(kind, {}), b.tensors.get(kind, {})
        for name in dict.fromkeys([*ours, *theirs]):
            text = _difference(a, b, kind, name)
            if text:
                num_different += 1
                print(f"{kind} {name}: {text}")
    for key in ("global_steps", "zero_stage", "world_size"):
        if a.about.get(key) != b.about.get(key):
            print(f"{key}: {a.about.get(key)} and {b.about.get(key)}")
    print(f"{num_different} tensors differ" if num_different else "all tensors are equal")
    return 1 if num_different else 0


def _difference(a: Source, b: Source, kind: str, name: str) -> str:
    ours, theirs = a.tensors.get(kind, {}).get(name), b.tensors.get(kind, {}).get(name)
    if ours is None or theirs is None:
        return "only in the second" if ours is None else "only in the first"
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)} and {list(theirs.shape)}"
    num, largest = 0, 0.0
    for start in range(0, ours.numel, CHUNK):
        count = min(CHUNK, ours.numel - start)
        left, right = (_read(source, kind, name, start, count) for source in (a, b))
        if not torch.equal(left, right):
            unequal = (left != right) & ~(left.isnan() & right.isnan())
            num += int(unequal.sum())
            if unequal.any():
                largest = max(largest, float((left.double() - right.double())[unequal].abs().max()))
    note = f"dtype {ours.dtype} and {theirs.dtype}; " if ours.dtype != theirs.dtype else ""
    if num == 0:
        return ""
    return f"{note}{num} of {ours.numel} elements differ, by at most {largest:.3g}"


def _read(source: Source, kind: str, name: str, start: int, count: int) -> Tensor:
    values = torch.empty(count, dtype=DTYPE_OF[source.tensors[kind][name].dtype])

    def sink(offset: int, chunk: Tensor) -> None:
        values.narrow(0, offset, chunk.numel()).copy_(chunk)

    source.fetch([Wanted(kind, name, start, count, sink)])
    return values


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="deepspeed.checkpoint", description="Look into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspects = commands.add_parser("inspect", help="list what is inside: tensors, dtypes, shapes, sizes, step, ranks")
    inspects.add_argument("path", type=Path)
    inspects.add_argument("--json", action="store_true", help="as one JSON object")
    commands.add_parser("verify", help="check every digest and every tensor's cover").add_argument("path", type=Path)
    diffs = commands.add_parser("diff", help="compare two checkpoints tensor by tensor")
    diffs.add_argument("a", type=Path)
    diffs.add_argument("b", type=Path)
    options = parser.parse_args(arguments)
    actions: dict[str, Callable[[], int]] = {
        "inspect": lambda: inspect(options.path, options.json),
        "verify": lambda: verify(options.path),
        "diff": lambda: diff(options.a, options.b),
    }
    try:
        status = actions[options.command]()
        print(end="", flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (CheckpointError, OSError) as error:
        print(f"deepspeed.checkpoint: {error}", file=sys.stderr)
        paths = [options.a, options.b] if options.command == "diff" else [options.path]
        status = 1 if all(_is_checkpoint(path) for path in paths) else 2
    raise SystemExit(status)


if __name__ == "__main__":
    main()
