"""Do all ranks have the same configuration, model and kind of data? Asked before a collective could hang.

Each check exchanges one short digest; only when digests differ are the details exchanged, to name the ranks and the
first difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from deepspeed.mesh import Mesh
from deepspeed.utils.errors import RankMismatchError
from deepspeed.zero.hooks import tensors_in
from deepspeed.zero.param import full_shape

_LOCAL_SUFFIXES = ("path", "dir", "name")
"""Keys that may differ between nodes: where things are written and what runs are called."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The configuration as sorted lines "path = value", without keys that may differ between nodes."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += flatten(value, f"{prefix}{key}.")
        elif not str(key).endswith(_LOCAL_SUFFIXES):
            lines.append(f"{prefix}{key} = {value!r}")
    return sorted(lines)


def describe_model(module: nn.Module) -> list[str]:
    """One line per parameter: name, full shape, whether it trains."""
    return [
        f"{name} {tuple(full_shape(param))}{'' if param.requires_grad else ' frozen'}"
        for name, param in module.named_parameters()
    ]


def describe_inputs(inputs: Any) -> list[str]:
    """One line per tensor given to the model: dtype, number of dims, size of the first (the micro-batch)."""
    return [
        f"tensor {i}: {str(t.dtype).removeprefix('torch.')}, {t.dim()} dims, first dim {t.shape[0] if t.dim() else '-'}"
        for i, t in enumerate(tensors_in(inputs))
    ]


def require_equal(mesh: Mesh, what: str, lines: Sequence[str], cure: str) -> None:
    """Raise RankMismatchError on every rank unless all ranks have the same lines. Collective over the dp ranks."""
    digest = int.from_bytes(hashlib.sha1("\n".join(lines).encode()).digest()[:7], "big")
    digests = [other for (other,) in mesh.agree("average", digest)]
    if len(set(digests)) == 1:
        return
    everyone = mesh.gather_objects("average", list(lines))
    reference = everyone[0]
    ranks = mesh.ranks("average")
    differing = {rank: first_difference(reference, theirs) for rank, theirs in zip(ranks, everyone, strict=True)}
    text = "\n".join(f"  rank {rank}: {difference}" for rank, difference in differing.items() if difference)
    raise RankMismatchError(f"ranks do not have the same {what}; compared with rank {ranks[0]}:\n{text}\n  {cure}")


def first_difference(reference: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The first line in which two descriptions differ, in words; None if they are equal."""
    for expected, got in _padded(reference, theirs):
        if expected != got:
            return f"has {got or 'nothing'} where rank 0's has {expected or 'nothing'}"
    return None


def _padded(left: Sequence[str], right: Sequence[str]) -> Iterable[tuple[str, str]]:
    length = max(len(left), len(right))
    return zip([*left, *[""] * (length - len(left))], [*right, *[""] * (length - len(right))], strict=True)
