"""Which gradients are not finite: for the error of a loss scale that cannot get any smaller, and for steps that are skipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeed.mesh import Mesh
from deepspeed.utils.logging import logger
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.master import Master


def blame(masters: Sequence[Master], gradients: Sequence[Gradients], mesh: Mesh) -> str:
    """The first bad gradient of every rank, and what usually helps. Collective."""
    lines = [f"  {text}" for text in _found(masters, gradients, mesh)]
    largest = max((m.tensor.abs().max().item() for m in masters if m.numel), default=0.0)
    hint = "the weights themselves exceed fp16's largest value" if largest > 65504 else "values of fp16's range"
    lines.append(
        f"  Largest weight {largest:.4g} (fp16 ends at 65504): {hint}. A model pretrained in bf16 often overflows in "
        'fp16: use "bf16": {"enabled": true}, or lower the learning rate.'
    )
    return "\n".join(lines)


def tell_what_is_bad(masters: Sequence[Master], gradients: Sequence[Gradients], mesh: Mesh) -> None:
    """Warn of a skipped step, where nothing else would say why. Collective."""
    told = "; ".join(_found(masters, gradients, mesh))
    logger.warning("the step is skipped: %s", told or "a gradient is not finite on another rank")


def _found(masters: Sequence[Master], gradients: Sequence[Gradients], mesh: Mesh) -> list[str]:
    bad = (_first_non_finite(*pair) for pair in zip(masters, gradients, strict=True))
    texts = mesh.gather_objects("shard", next((text for text in bad if text), None))
    return [f"[rank {rank}] {text}" for rank, text in zip(mesh.ranks("shard"), texts, strict=True) if text]


def _first_non_finite(master: Master, gradients: Gradients) -> str | None:
    result = gradients.values()
    for piece in master.layout.pieces(master.rank):
        part = result.narrow(0, piece.in_shard, piece.numel)
        if not torch.isfinite(part).all():
            kind = "nan" if torch.isnan(part).any() else "inf"
            return f"first bad gradient: {master.bucket.names[piece.param]} has {kind}"
    return None
