"""Weights as Hugging Face lays them out: one file, or shards of bounded size with an index.

Used by `export` and `zero_to_fp32`. Planning, and the index's text; the bytes are written by `writer` (safetensors)
or torch.save (bin).

    model.safetensors                                            all of it, if it fits `max_nbytes`
    model-00001-of-00003.safetensors ... model.safetensors.index.json
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from deepspeed.utils.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int | None) -> int | None:
    """Bytes of "5GB", "200MiB" or a number; None (no limit) for None, 0 and "0". Raises CheckpointError."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise CheckpointError(
            f"max_shard_size = {text!r} is not a size.\n  Use bytes, or a number with KB, MB, GB or TB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()]) or None


def plan(nbytes_of: Mapping[str, int], max_nbytes: int | None, file_name: str) -> dict[str, list[str]]:
    """File name -> tensor names, in order. A tensor larger than `max_nbytes` has a file of its own."""
    files: list[list[str]] = [[]]
    used = 0
    for name, nbytes in nbytes_of.items():
        if max_nbytes is not None and files[-1] and used + nbytes > max_nbytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += nbytes
    if len(files) == 1:
        return {file_name: files[0]}
    path = Path(file_name)
    return {f"{path.stem}-{i:05d}-of-{len(files):05d}{path.suffix}": names for i, names in enumerate(files, 1)}


def remove_others(folder: Path, planned: Mapping[str, list[str]], file_name: str) -> None:
    """Delete what an earlier export under the same name left: loaders would take the old single file before the new
    shards, or old shards beside the new ones."""
    path = Path(file_name)
    shard = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    index = f"{file_name}.index.json"
    for entry in list(os.scandir(folder)):
        is_ours = entry.name == file_name or shard.fullmatch(entry.name) or (entry.name == index and len(planned) == 1)
        if is_ours and entry.name not in planned and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def index_text(files: Mapping[str, list[str]], nbytes_of: Mapping[str, int]) -> bytes:
    """The index that goes beside several files."""
    weight_map = {name: file for file, names in files.items() for name in names}
    total = {"total_size": sum(nbytes_of.values())}
    return json.dumps({"metadata": total, "weight_map": weight_map}, indent=2).encode()
