"""Names: of a checkpoint's files, and of what ranks hold, so that no two things of one job have one name.

Pure but for walking a module's children. Used by saving and loading alike, which therefore agree.

A pipeline stage numbers its layers from 0, and an expert-parallel rank its experts: both say with `name_children` what
their children are called in the whole model, and everything in a checkpoint goes by those names.

    stage 1 of 2      ModuleList child "0" is the model's "12"            layers.0.weight -> layers.12.weight
    ep rank 1 of 4    ModuleList child "0" is expert "2"                  mlp.experts.0.w -> mlp.experts.2.w
    tied head         child "weight" is "/embed.weight": from the root    head.weight     -> embed.weight

A parameter of which nobody can say where it lies in a whole one (Megatron's mark without a position, or values that
differ between model-parallel ranks without any mark) is stored as its rank's own: `mp_rank_01.<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_CHILDREN = "_checkpoint_children"


def shard_file(rank: int, num_ranks: int) -> str:
    """The tensors that a rank writes."""
    return f"shard-{rank:05d}-of-{num_ranks:05d}.safetensors"


def rank_file(rank: int) -> str:
    """A rank's own state."""
    return f"rank-{rank:05d}.json"


def piece_key(kind: str, name: str, start: int, stop: int) -> str:
    """The name of a piece inside its safetensors file."""
    return f"{kind}/{name}[{start}:{stop}]"


def name_children(module: nn.Module, names: Mapping[str, str]) -> None:
    """Say what a module's children and parameters are called in the whole model; "/a.b" counts from the root.

    To be called before `deepspeed.initialize`. Names that are not given stay.
    """
    module.__dict__[_CHILDREN] = dict(names)


class GlobalNames:
    """From a module's own dotted names to those in the whole model."""

    def __init__(self, root: nn.Module) -> None:
        self._children = {
            prefix: module.__dict__[_CHILDREN]
            for prefix, module in root.named_modules(remove_duplicate=False)
            if _CHILDREN in module.__dict__
        }

    def __call__(self, name: str) -> str:
        """`name` itself where nobody says otherwise."""
        if not self._children:
            return name
        found: list[str] = []
        parts = name.split(".")
        for i, part in enumerate(parts):
            called = self._children.get(".".join(parts[:i]), {}).get(part, part)
            if called.startswith("/"):
                found.clear()
            found.append(called.lstrip("/"))
        return ".".join(found)


def apart(name: str, model_rank: int) -> str:
    """The name of what only one model-parallel rank knows the meaning of."""
    return f"mp_rank_{model_rank:02d}.{name}"


def is_apart(name: str) -> bool:
    """Whether a name is one that `apart` made."""
    return name.startswith("mp_rank_")
