"""Which ways of dividing ranks do not go together yet: refused on all ranks before anything is built.

Called by `engine.build` once the mesh is known. Each pair may well work; nobody has shown that it equals one process, and a
number that nobody compared is worse than a refusal. Showing one ends with deleting its row.
"""

from __future__ import annotations

from deepspeed.mesh import Mesh
from deepspeed.mesh.shape import Role
from deepspeed.utils.errors import NotAvailableError

WORDS: dict[Role, str] = {
    "experts": "experts",
    "tensor": "tensor parallelism",
    "pipeline": "pipeline stages",
    "sequence": "parts of sequences",
    "replicate": "copies of shards (MiCS)",
    "near": "near copies (hpZ)",
}

NOT_SHOWN: tuple[tuple[Role, Role], ...] = (
    ("experts", "tensor"),
    ("experts", "sequence"),
    ("tensor", "sequence"),
    ("tensor", "replicate"),
    ("tensor", "near"),
)


def refuse_unshown(mesh: Mesh, *, cuts_layers: bool) -> None:
    """Raise NotAvailableError for a pair of NOT_SHOWN. `cuts_layers`: tensor parallelism is the engine's, not the script's own
    (an mpu's or a topology's), which is the script's to answer for but where it meets experts."""
    for one, other in NOT_SHOWN:
        is_scripts = "tensor" in (one, other) and not cuts_layers and "experts" not in (one, other)
        if mesh.size(one) > 1 and mesh.size(other) > 1 and not is_scripts:
            raise NotAvailableError(
                f"{WORDS[one]} on {mesh.size(one)} ranks together with {WORDS[other]} on {mesh.size(other)} are not available "
                "yet: nobody has shown that they equal one process.\n  Leave one of the two out."
            )


def as_markdown() -> str:
    """The table, for `docs/composability.md`."""
    rows = [f"| {WORDS[one]} | {WORDS[other]} |" for one, other in NOT_SHOWN]
    return "\n".join(["| of these two | one at a time |", "|---|---|", *rows])
