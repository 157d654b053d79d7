"""One logger for the package, silent by default, and the helpers that write to it.

Called from everywhere; calls nothing of ours. Libraries set its level through `deepspeed.utils.logger.setLevel`.
Nothing is written at import, and torch is not
imported: the launcher logs too. A repeated warning is written once per process (`warn_once`), on rank 0 alone unless the
text is about one rank.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def _make_logger() -> logging.Logger:
    made = logging.getLogger("DeepSpeed")
    made.setLevel(logging.WARNING)
    made.propagate = False
    if not made.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [deepspeed] %(message)s", "%H:%M:%S"))
        made.addHandler(handler)
    return made


logger = _make_logger()


def current_rank() -> int:
    """This process's global rank; 0 where torch.distributed is not up."""
    dist = sys.modules.get("torch.distributed")
    return dist.get_rank() if dist is not None and dist.is_available() and dist.is_initialized() else 0


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log `message` on the listed global ranks; None or [-1] means every rank."""
    if not ranks or -1 in ranks or current_rank() in ranks:
        logger.log(level, f"[rank {current_rank()}] {message}")


@functools.lru_cache(maxsize=None)
def warn_once(message: str, every_rank: bool = False) -> None:
    """Log a warning the first time this text is seen in this process, on rank 0 unless `every_rank`."""
    if every_rank or current_rank() == 0:
        logger.warning(message)


def set_log_level_from_string(level: str) -> None:
    """Set the package logger's level by name: debug, info, warning, error or critical."""
    try:
        logger.setLevel(LEVELS[level.lower()])
    except (KeyError, AttributeError):
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}.") from None


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Print on the listed global ranks; None or [-1] means every rank."""
    if not ranks or -1 in ranks or current_rank() in ranks:
        print(f"[rank {current_rank()}] {message}")


def print_json_dist(
    message: dict[str, Any], ranks: Sequence[int] | None = None, path: str | Path | None = None
) -> None:
    """Write `message`, with the rank added, as JSON to `path` on the listed global ranks; [-1] means every rank."""
    if path is not None and ranks and (-1 in ranks or current_rank() in ranks):
        message["rank"] = current_rank()
        Path(path).write_text(json.dumps(message), encoding="utf-8")


def print_configuration(args: Any, name: str) -> None:
    """Print the attributes of an object, one a line."""
    print(f"{name}:")
    for key, value in sorted(vars(args).items()):
        print(f"  {key} = {value}")
