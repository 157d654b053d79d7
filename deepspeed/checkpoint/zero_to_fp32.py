"""Consolidation: plain weights from a checkpoint of any ZeRO stage, as functions and as the command `zero_to_fp32`.

Needs no GPU, process group or model. Also importable as `deepspeed.utils.zero_to_fp32`, whose functions scripts and
Lightning call. A tensor goes from the checkpoint's files to the output through a few blocks of staging: memory does not
grow with the model, unless a state dict is asked for.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint import compat, files, hf_layout
from deepspeed.checkpoint.container import DTYPE_OF, lay_out
from deepspeed.checkpoint.digest import default_algorithm
from deepspeed.checkpoint.export import check_folder
from deepspeed.checkpoint.find import checkpoint_folder, latest_tag, open_checkpoint
from deepspeed.checkpoint.manifest import StoredTensor
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.staging import Staging
from deepspeed.checkpoint.subject import BUFFER
from deepspeed.checkpoint.writer import Reads, write_tensors
from deepspeed.utils.dtypes import parse_dtype
from deepspeed.utils.errors import CheckpointError, NotAvailableError
from deepspeed.zero.checkpoint_flats import PARAM

AHEAD_NBYTES = 32 << 20
"""Bytes of a tensor read at once."""


def open_tag(checkpoint_dir: str | Path, tag: str | None = None) -> Source:
    """Open `checkpoint_dir/tag`, default the latest. Raises ValueError without `latest`, FileNotFoundError for no folder."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    tag = tag or latest_tag(folder)
    if tag is None:
        raise CheckpointError(f"{folder} has no file 'latest'.\n  Name the checkpoint with tag=... (or -t).")
    path = checkpoint_folder(folder, str(tag))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    return open_checkpoint(path)


def _entries(source: Source, exclude_frozen: bool) -> dict[str, tuple[str, str]]:
    """Name in the state dict -> (kind, stored name): parameters, their other names, buffers."""
    entries = {
        name: (PARAM, name)
        for name in source.tensors.get(PARAM, {})
        if not (exclude_frozen and name in source.parameters and source.parameters[name].is_frozen)
    }
    entries |= {alias: entries[name] for alias, name in source.tied.items() if name in entries}
    return entries | {name: (BUFFER, name) for name in source.tensors.get(BUFFER, {})}


def _out_dtype(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    own = DTYPE_OF[stored.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def state_dict_of(source: Source, dtype: torch.dtype | None, exclude_frozen: bool = False) -> dict[str, Tensor]:
    """Every parameter and buffer in memory; floating-point ones in `dtype`, or None: as stored. Aliases share memory."""
    made: dict[tuple[str, str], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, place in _entries(source, exclude_frozen).items():
        if place not in made:
            stored = source.tensors[place[0]][place[1]]
            made[place] = torch.empty(stored.shape, dtype=_out_dtype(stored, dtype))
        state[name] = made[place]
    source.fetch([Wanted(*place, 0, tensor.numel(), _into(tensor)) for place, tensor in made.items()])
    return state


def _into(tensor: Tensor) -> Callable[[int, Tensor], None]:
    flat = tensor.view(-1)

    def sink(offset: int, values: Tensor) -> None:
        flat.narrow(0, offset, values.numel()).copy_(values)

    return sink


class LazyTensor:
    """A tensor of a checkpoint that is read when `contiguous()` (or `tensor()`) is called."""

    def __init__(self, source: Source, place: tuple[str, str], dtype: torch.dtype | None) -> None:
        stored = source.tensors[place[0]][place[1]]
        self.shape, self.dtype = torch.Size(stored.shape), _out_dtype(stored, dtype)
        self._source, self._place = source, place

    def contiguous(self) -> Tensor:
        """The values."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._source.fetch([Wanted(*self._place, 0, tensor.numel(), _into(tensor))])
        return tensor

    tensor = contiguous

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Any]:
    """The fp32 state dict, on the CPU. `lazy_mode`: of tensors that are read one by one, at `.contiguous()`.

    Raises ValueError without a tag and a file `latest`, FileNotFoundError where there is no such folder.
    """
    source = open_tag(checkpoint_dir, tag)
    if lazy_mode:
        entries = _entries(source, exclude_frozen_parameters)
        return {name: LazyTensor(source, place, torch.float32) for name, place in entries.items()}
    return state_dict_of(source, torch.float32, exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """The model, on the CPU, with the checkpoint's fp32 weights; names without counterpart are left."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the fp32 weights to `output_dir` as Hugging Face lays them out; see `convert`."""
    convert(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def convert(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype | None,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = True,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> list[Path]:
    """Write weights in `dtype` (None: the model's own): shards of at most `max_shard_size` and an index; the paths.

    safetensors (`safe_serialization`) are streamed: memory stays at a few blocks. torch files (`pytorch_model.bin`) need
    one shard in memory.
    """
    source = open_tag(checkpoint_dir, tag)
    folder = check_folder(Path(output_dir), "the output folder")
    entries = _entries(source, exclude_frozen_parameters)
    if safe_serialization:  # a safetensors file holds no aliases
        entries = {name: place for name, place in entries.items() if name not in source.tied}
    dtypes = {name: _target_dtype(source, place, dtype) for name, place in entries.items()}
    nbytes = {n: source.tensors[k][s].numel * dtypes[n].itemsize for n, (k, s) in entries.items()}
    base = "model.safetensors" if safe_serialization else "pytorch_model.bin"
    planned = hf_layout.plan(nbytes, hf_layout.parse_size(max_shard_size), base)
    for file, names in planned.items():
        aside = folder / f".{file}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            if safe_serialization:
                _write_safetensors(aside, source, {n: entries[n] for n in names}, dtypes)
            else:
                _write_torch(aside, source, {n: entries[n] for n in names}, dtypes)
            os.replace(aside, folder / file)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    if len(planned) > 1:
        files.replace_durably(folder / f"{base}.index.json", hf_layout.index_text(planned, nbytes))
    hf_layout.remove_others(folder, planned, base)
    files.sync_folder(folder)
    return [folder / file for file in planned]


def _target_dtype(source: Source, place: tuple[str, str], dtype: torch.dtype | None) -> torch.dtype:
    kind, name = place
    stored = source.tensors[kind][name]
    if dtype is None and kind == PARAM and name in source.parameters:
        return DTYPE_OF[source.parameters[name].dtype]
    return _out_dtype(stored, dtype)


def _write_safetensors(
    path: Path, source: Source, entries: Mapping[str, tuple[str, str]], dtypes: Mapping[str, torch.dtype]
) -> None:
    tensors = [(name, dtypes[name], source.tensors[k][s].shape) for name, (k, s) in entries.items()]
    reads: dict[str, Reads] = {name: _reads(source, place, dtypes[name]) for name, place in entries.items()}
    write_tensors(path, lay_out(tensors, {"format": "pt"}), reads, Staging(4), default_algorithm())


def _reads(source: Source, place: tuple[str, str], dtype: torch.dtype) -> Reads:
    """Elements of a stored tensor in another dtype, read ahead in larger steps than they are asked for."""
    stored = source.tensors[place[0]][place[1]]
    step = max(1, AHEAD_NBYTES // DTYPE_OF[stored.dtype].itemsize)
    held: dict[str, Any] = {"start": 0, "values": torch.empty(0, dtype=dtype)}

    def read(start: int, numel: int) -> Tensor:
        parts = []
        while numel:
            at = start - held["start"]
            if not 0 <= at < held["values"].numel():
                count = min(step, stored.numel - start)
                held["values"] = torch.empty(0)
                held["values"], held["start"] = torch.empty(count, dtype=dtype), start
                source.fetch([Wanted(*place, start, count, _into(held["values"]))])
                at = 0
            count = min(numel, held["values"].numel() - at)
            parts.append(held["values"].narrow(0, at, count))
            start, numel = start + count, numel - count
        if start == stored.numel:
            held["values"] = torch.empty(0, dtype=dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return read


def _write_torch(
    path: Path, source: Source, entries: Mapping[str, tuple[str, str]], dtypes: Mapping[str, torch.dtype]
) -> None:
    made: dict[tuple[str, str], Tensor] = {}
    for name, place in entries.items():
        if place not in made:
            made[place] = torch.empty(source.tensors[place[0]][place[1]].shape, dtype=dtypes[name])
    source.fetch([Wanted(*place, 0, tensor.numel(), _into(tensor)) for place, tensor in made.items()])
    with open(path, "wb") as file:
        torch.save({name: made[place] for name, place in entries.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def get_model_state_file(checkpoint_dir: str | Path, zero_stage: int) -> str:
    """The model state file of a checkpoint, for helpers that want its plain values. Raises FileNotFoundError."""
    if not Path(checkpoint_dir).is_dir():
        raise FileNotFoundError(f"there is no folder {checkpoint_dir}.")
    path = Path(checkpoint_dir, compat.model_file_name(3 if zero_stage == 3 else 0))
    if not path.exists():
        raise FileNotFoundError(f"there is no model state file {path}.")
    return str(path)


def get_checkpoint_files(checkpoint_dir: str | Path, pattern: str) -> list[str]:
    """Files of a checkpoint by a pattern, in the order of ranks. Raises FileNotFoundError if there are none."""
    found = sorted(
        Path(checkpoint_dir).glob(pattern),
        key=lambda path: [int(t) if t.isdigit() else t for t in path.name.split("_")],
    )
    if not found:
        raise FileNotFoundError(f"there is no file {pattern} in {checkpoint_dir}.")
    return [str(path) for path in found]


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """The optimizer state files of a checkpoint, in the order of ranks. Raises FileNotFoundError."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def parse_optim_states(files: list[str], ds_checkpoint_dir: str) -> tuple[int, int, list[Any]]:
    """Refused: the original's shards are read by `get_fp32_state_dict_from_zero_checkpoint`, and ours are no pickles."""
    raise NotAvailableError(
        "parse_optim_states reads pickled shards of the original.\n"
        "  Use get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir), which reads both formats."
    )


def get_model_state_files(checkpoint_dir: str | Path) -> list[str]:
    """The model state files of a checkpoint, in the order of ranks. Raises FileNotFoundError."""
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32", description="Write the weights of a checkpoint as Hugging Face lays them out."
    )
    parser.add_argument("checkpoint_dir", help="the folder that holds the tag folder and `latest`")
    parser.add_argument("output_dir", help="the folder to write to")
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of a file, default 5GB; 0 for one file")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors instead of torch files")
    parser.add_argument("-t", "--tag", default=None, help="the checkpoint, default what `latest` says")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave frozen parameters out")
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16, bfloat16, or model: as trained")
    parser.add_argument("-d", "--debug", action="store_true", help="print a traceback with errors")
    options = parser.parse_args(arguments)
    try:
        written = convert(
            options.checkpoint_dir,
            options.output_dir,
            None if options.dtype == "model" else parse_dtype(options.dtype),
            options.max_shard_size,
            options.safe_serialization,
            options.tag,
            options.exclude_frozen_parameters,
        )
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        parser.exit(1, f"zero_to_fp32: {error}\n")
    print(f"wrote {', '.join(path.name for path in written)} to {options.output_dir}")


if __name__ == "__main__":
    main()
