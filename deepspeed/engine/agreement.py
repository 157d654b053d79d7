"""Do all ranks have the same configuration and model? Asked before a collective could hang.

Inputs are not asked about: an image on one rank and text on another, packed sequences, batches filled by tokens are all
legitimate. A rank that has no batch at all is what the watchdog names.

Each check exchanges one short digest; only when digests differ are the details exchanged, to name the ranks and the
first difference.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deepspeed.mesh import Mesh
from deepspeed.mesh.mesh import told_by_all
from deepspeed.utils.errors import RankMismatchError
from deepspeed.zero.aliases import aliases_of
from deepspeed.zero.param import full_shape

_LOCAL_SUFFIXES = ("path", "dir", "name", "mpu", "tp_group")
"""Keys that may differ between ranks: where things are written, what runs are called, and objects of each rank's own."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The configuration as sorted lines "path = value", without keys that may differ between nodes."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += flatten(value, f"{prefix}{key}.")
        elif not str(key).endswith(_LOCAL_SUFFIXES):
            lines.append(f"{prefix}{key} = {value!r}")
    return sorted(lines)


def lazy_in(module: nn.Module) -> str | None:
    """A refusal of parameters and buffers that get their shape from the first forward (`nn.LazyLinear`), if there are any."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if not lazy:
        return None
    more = f" and {len(lazy) - 1} more" if len(lazy) > 1 else ""
    return (
        f"{lazy[0]}{more} of the model has no shape yet: a lazy module makes its parameters in its first forward.\n"
        "  Run the model once, on every rank, before deepspeed.initialize and before the optimizer is made."
    )


def describe_model(module: nn.Module) -> list[str]:
    """One line per parameter and buffer: name, full shape, whether it trains; a buffer's dtype and layout."""
    params = [
        f"{name} {tuple(full_shape(param))}{'' if param.requires_grad else ' frozen'}"
        for name, param in module.named_parameters()
    ]
    aliases = {alias.name: f" in {alias.param_name}" for alias in aliases_of(module)}
    buffers = module.named_buffers()
    return params + [f"buffer {name} {describe_buffer(buffer)}{aliases.get(name, '')}" for name, buffer in buffers]


def describe_buffer(buffer: Tensor) -> str:
    """Shape, dtype and layout, as far as ranks have to have the same; nested tensors have no one shape."""
    layout = str(buffer.layout).removeprefix("torch.").removeprefix("strided")
    shape = "nested" if buffer.is_nested else tuple(buffer.shape)
    return f"{shape} {str(buffer.dtype).removeprefix('torch.')} {layout}".rstrip()


def require_equal(mesh: Mesh, what: str, lines: Sequence[str], cure: str) -> None:
    """Raise RankMismatchError on every rank unless all ranks have the same lines. Collective over the dp ranks."""
    digest = int.from_bytes(hashlib.sha1("\n".join(lines).encode()).digest()[:7], "big")
    digests = [other for (other,) in mesh.agree("average", digest)]
    if len(set(digests)) == 1:
        return
    _raise_if_different(what, mesh.gather_objects("average", list(lines)), mesh.ranks("average"), cure)


def require_same_division(lines: Sequence[str], cure: str) -> None:
    """The same of what says how ranks are divided, before there is a mesh: ranks of different meshes would wait in different
    groups. Collective over the job."""
    everyone = told_by_all(list(lines))
    _raise_if_different("configuration", everyone, range(len(everyone)), cure)


def _raise_if_different(what: str, everyone: Sequence[Sequence[str]], ranks: Sequence[int], cure: str) -> None:
    reference = everyone[0]
    differing = {rank: first_difference(reference, theirs) for rank, theirs in zip(ranks, everyone, strict=True)}
    text = "\n".join(f"  rank {rank}: {difference}" for rank, difference in differing.items() if difference)
    if text:
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
