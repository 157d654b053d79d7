"""From what `checkpoint` says to open weights: folders, single files, JSON files and dicts of the original's forms.

    a folder     of Hugging Face (safetensors or torch files, one or with an index); of training checkpoints (`latest`, or one tag);
                 written by save_mp_checkpoint_path
    a file       *.safetensors, *.bin, *.pt, *.pth; *.json, Hugging Face's *.index.json among them
    a JSON       {"type", "checkpoints": [...] or {"non_tp": [...], "tp": [...]}, "base_dir", "tp_size", ...}
    a name       of a model that Hugging Face's cache on this machine has

Raises CheckpointError or DeepSpeedConfigError, naming the path, before anything is read but headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.container import parse_json
from deepspeed.checkpoint.files import check_name, read_plain
from deepspeed.checkpoint.find import latest_tag, open_checkpoint
from deepspeed.checkpoint.manifest import FILE_NAME
from deepspeed.checkpoint.zero_to_fp32 import open_tag
from deepspeed.config.parallelism import TP_KEY
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.joined import Parts
from deepspeed.inference.packed import unpacked
from deepspeed.inference.weights import SafetensorsFiles, TorchFiles, TrainingCheckpoint, Weights
from deepspeed.utils.errors import CheckpointError, DeepSpeedConfigError

SAVED = "ds_inference_config.json"
"""The JSON that `save_mp_checkpoint_path` writes."""
MAX_JSON = 64 << 20
_INDEX = ".index.json"
_INDICES = (f"model.safetensors{_INDEX}", f"pytorch_model.bin{_INDEX}")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_TORCH = (".bin", ".pt", ".pth")


def open_weights(config: DeepSpeedInferenceConfig, rank: int, tp_size: int) -> Weights | Parts | None:
    """What the configuration says to load, for one tensor-parallel rank of so many; None for nothing."""
    older = config.checkpoint_config
    given: Any = config.checkpoint if config.checkpoint is not None else older.checkpoint_dir
    if given is None:
        return None
    base = Path(config.base_dir or older.base_dir or "")
    if isinstance(given, Mapping):
        return _from_json(dict(given), base, "the dict given as checkpoint", rank, tp_size)
    if not isinstance(given, (str, Path)):
        raise DeepSpeedConfigError(
            f"checkpoint is a {type(given).__name__}.\n  Give a path, or a dict as the JSON file has it."
        )
    path = base / given
    if not path.exists():
        cached = _in_cache(str(given))
        if cached is None:
            raise CheckpointError(f"there is no checkpoint {path}, and no model of that name in Hugging Face's cache.")
        path = cached
    if path.is_dir():
        return _from_folder(path, rank, tp_size)
    if path.name.endswith(_INDEX):
        return _from_files(_indexed(path.parent, path.name), str(path))
    if path.suffix == ".json":
        return _from_json(_read_json(path), base if config.base_dir else path.parent, str(path), rank, tp_size)
    return _from_files([path], str(path))


def _from_folder(folder: Path, rank: int, tp_size: int) -> Weights | Parts:
    if (folder / SAVED).exists():
        return _from_json(_read_json(folder / SAVED), folder, str(folder / SAVED), rank, tp_size)
    for name in _INDICES:
        if (folder / name).exists():
            return _from_files(_indexed(folder, name), str(folder))
    for name in _SINGLE:
        if (folder / name).exists():
            return _from_files([folder / name], str(folder))
    if latest_tag(folder) is not None:
        return TrainingCheckpoint(open_tag(folder), str(folder))
    if (folder / FILE_NAME).exists() or any(folder.glob("*_states.pt")):
        return TrainingCheckpoint(open_checkpoint(folder), str(folder))
    raise CheckpointError(
        f"{folder} holds no weights: no {', '.join((*_SINGLE, *_INDICES))}, no 'latest' of a training run, no {SAVED}."
    )


def _indexed(folder: Path, name: str) -> list[Path]:
    content = _read_json(folder / name)
    of_names = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(of_names, Mapping) or not all(isinstance(file, str) for file in of_names.values()):
        raise CheckpointError(f"{folder / name} has no weight_map of names to files.")
    files = list(dict.fromkeys(check_name(file, str(folder / name)) for file in of_names.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, which its {name} names ({len(missing)} of {len(files)} files).\n"
            "  Copy or download them; nothing was loaded."
        )
    return [folder / file for file in files]


def _from_files(paths: Sequence[Path], what: str) -> Weights:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(f"{what} names {', '.join(missing[:4])}, which is missing; nothing was loaded.")
    kinds = {path.suffix for path in paths}
    if kinds == {".safetensors"}:
        return unpacked(SafetensorsFiles(paths, what), _how_quantized(paths[0].parent))
    if kinds <= set(_TORCH):
        return unpacked(TorchFiles(paths, what), _how_quantized(paths[0].parent))
    raise CheckpointError(f"{what}: files of the kinds {', '.join(sorted(kinds))} are not read as one model's weights.")


def _how_quantized(folder: Path) -> Mapping[str, Any]:
    """What another library wrote beside its weights about how they are packed."""
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            section = content.get(key) if key and isinstance(content, Mapping) else content
            if isinstance(section, Mapping):
                return section
    return {}


def _from_json(content: Any, base: Path, what: str, rank: int, tp_size: int) -> Weights | Parts:
    if not isinstance(content, Mapping) or "checkpoints" not in content:
        raise DeepSpeedConfigError(
            f'{what} has no "checkpoints".\n  It names the files: a list, or {{"non_tp", "tp"}}.'
        )
    own = content.get("base_dir")
    folder = Path(own) if isinstance(own, str) and own and Path(own).is_dir() else base
    files = content["checkpoints"]
    kind = str(content.get("type", "ds_model")).lower()
    if isinstance(files, Mapping):
        return _parts(content, files, folder, what, rank, tp_size)
    files = _names([files] if isinstance(files, str) else files, "checkpoints", what)
    if kind not in ("bloom", "ds_model") and len(files) > 1:
        raise DeepSpeedConfigError(
            f"{what}: files of type {content['type']!r} are parts of ranks, which are not put together here.\n"
            '  Save the whole model, and list its files with type "ds_model".'
        )
    return _from_files([folder / file for file in files], what)


def _parts(
    content: Mapping[str, Any], files: Mapping[str, Any], folder: Path, what: str, rank: int, size: int
) -> Parts:
    stated = content.get("tp_size", content.get("mp_size", 1))
    if not str(stated).isdecimal():  # "2" is one, as it was
        raise DeepSpeedConfigError(f"{what} has tp_size = {stated!r}, which is no whole number.")
    if int(stated) != size:
        raise DeepSpeedConfigError(
            f"{what} was saved for tp_size = {stated}, and this run has {size}.\n"
            f"  Run on {stated} ranks, or load the checkpoint that it was made from."
        )
    named = [(file, folder / file) for file in _names(files.get(TP_KEY, []), f"checkpoints.{TP_KEY}", what)]
    of_ranks = [[path for file, path in named if Path(file).name.startswith(f"tp_{r:02d}_")] for r in range(size)]
    if size == 1:
        of_ranks = [[path for _, path in named]]
    lacking = [r for r, paths in enumerate(of_ranks) if not paths]
    if lacking:
        raise CheckpointError(f"{what} names no tp_{lacking[0]:02d}_*.pt: the part of rank {lacking[0]} is missing.")
    missing = [str(path) for _, path in named if not path.exists()]
    if missing:
        raise CheckpointError(f"{what} names {', '.join(missing[:4])}, which is missing; nothing was loaded.")
    whole = _from_files([folder / file for file in _names(files.get("non_tp"), "checkpoints.non_tp", what)], what)
    return Parts(whole, [partial(_from_files, paths, what) for paths in of_ranks], rank, what)


def _names(files: Any, key: str, what: str) -> list[str]:
    if not isinstance(files, (list, tuple)) or not files or not all(isinstance(file, str) for file in files):
        raise DeepSpeedConfigError(
            f"{what} has {key} = {files!r}, which is no list of file names.\n  Name the files of the weights."
        )
    return list(files)


def _read_json(path: Path) -> Any:
    return parse_json(read_plain(path.resolve(), MAX_JSON), str(path))


def _in_cache(name: str) -> Path | None:
    """The folder of a model in Hugging Face's cache on this machine; nothing is fetched."""
    try:
        from transformers.utils import cached_file
    except ImportError:
        return None
    for file in (*_INDICES, *_SINGLE):
        try:
            found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
        if found is not None:
            return Path(found).parent
    return None
