"""(to be written)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.utils.errors import CheckpointError


def Original(folder: Path) -> Any:  # noqa: N802
    """To be written."""
    raise CheckpointError(f"{folder} was written by the original DeepSpeed, whose checkpoints are not read yet.")
