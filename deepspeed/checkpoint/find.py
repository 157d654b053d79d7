"""From a folder and a tag to an open checkpoint, whoever wrote it.

Used by `load`, `zero_to_fp32` and the command line. A checkpoint with a manifest is ours; one with `*_model_states.pt`
was written by the original.
"""

from __future__ import annotations

from pathlib import Path

from deepspeed.checkpoint.files import check_tag, read_plain
from deepspeed.checkpoint.manifest import FILE_NAME, STATE_NAME
from deepspeed.checkpoint.original import Original
from deepspeed.checkpoint.original_stages import is_pipeline
from deepspeed.checkpoint.original_tensor import OriginalParts, num_model_ranks
from deepspeed.checkpoint.source import Source
from deepspeed.checkpoint.store import Stored
from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import logger

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"


def latest_tag(folder: Path, is_universal: bool = False) -> str | None:
    """What `latest` says (`latest_universal`, where that is asked for and there); None where there is no such file.

    Raises CheckpointError if it leads out of the folder.
    """
    for name in [LATEST_UNIVERSAL, LATEST] if is_universal else [LATEST]:
        path = folder / name
        if path.exists() or path.is_symlink():
            return check_tag(read_plain(path, 4096).decode(errors="replace").strip())
    return None


def checkpoint_folder(folder: Path, tag: str) -> Path:
    """The folder of a tag. If a replacement of it died between two renames, the old one under its aside name."""
    path = folder / check_tag(tag)
    if not path.exists():
        aside = sorted(path.parent.glob(f".{path.name}.????????.old")) if path.parent.is_dir() else []
        if aside:
            logger.warning("%s is missing; loading %s, which a save that died had moved there.", path, aside[0])
            return aside[0]
    return path


def open_checkpoint(path: Path) -> Source:
    """Open the folder of one tag. Raises CheckpointError, saying what is there instead."""
    if not path.is_dir():
        tags = sorted(p.parent.name for p in path.parent.glob(f"*/{FILE_NAME}")) if path.parent.is_dir() else []
        there = f" There are: {', '.join(tags[-8:])}." if tags else ""
        raise CheckpointError(f"there is no checkpoint {path}.{there}")
    if (path / FILE_NAME).exists() or (path / FILE_NAME).is_symlink():
        return Stored(path)
    if (path / "zero").is_dir():
        raise CheckpointError(
            f"{path} is a universal checkpoint of the original DeepSpeed.\n"
            "  Load the checkpoint that it was converted from: any world size and ZeRO stage works, without conversion."
        )
    if any(path.glob("shard-*-of-*.safetensors")) or (path / STATE_NAME).exists():
        # Its *_states.pt, which hold no weights, must not be taken for the original's.
        raise CheckpointError(
            f"{path} has lost its {FILE_NAME}, without which nothing else in it can be trusted; was it copied in part?\n"
            "  Copy the whole folder again, or load another checkpoint."
        )
    if any(path.glob("*_states.pt")):
        is_cut = num_model_ranks(path) > 1 and not is_pipeline(path)
        return OriginalParts(path) if is_cut else Original(path)
    tags = sorted(p.parent.name for p in path.glob(f"*/{FILE_NAME}"))
    if tags:
        raise CheckpointError(
            f"{path} holds checkpoints and no file {LATEST!r} that says which is the latest.\n"
            f"  Name one of them: {', '.join(tags[-8:])}."
        )
    raise CheckpointError(f"{path} is not a checkpoint: it has no {FILE_NAME}.")
