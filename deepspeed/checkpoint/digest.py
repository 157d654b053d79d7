"""Digests of blocks: xxh3_64, which keeps up with any disk; crc32 where the xxhash package is missing.

Used by writer and reader. They notice damage, not a forger. Sizes and names are in docs/checkpoint-format.md.

One core of an AMD EPYC (Zen 3): xxh3_64 see benchmarks/README.md, crc32 1.1 GB/s, blake2b 0.5 GB/s, sha256 0.6 GB/s.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import warn_once

Digest = Callable[[Any], str]


def _crc32(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def _find_xxh3() -> Digest | None:
    try:
        xxhash = importlib.import_module("xxhash")
    except ImportError:
        return None
    return lambda data: xxhash.xxh3_64_hexdigest(data)


def default_algorithm() -> str:
    """What new checkpoints use."""
    if _find_xxh3() is None:
        warn_once("the xxhash package is missing: checkpoints get crc32 digests, which cost more time than the disk.")
        return "crc32"
    return "xxh3_64"


def digest_function(algorithm: str) -> Digest:
    """From bytes to hexadecimal digits. Raises CheckpointError for an unknown algorithm."""
    found = {"crc32": _crc32, "xxh3_64": _find_xxh3()}.get(algorithm, False)
    if found is None:
        raise CheckpointError("the checkpoint's digests are xxh3_64.\n  pip install xxhash")
    if not found:
        raise CheckpointError(
            f"digest algorithm {algorithm!r} is unknown.\n  A newer version may have written this checkpoint."
        )
    return found  # type: ignore[return-value]
