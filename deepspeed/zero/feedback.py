"""What quantised reductions left out, into checkpoints and back: each rank's own, bucket by bucket.

Called by `engine.checkpoints`; what it is belongs to `comm.feedback`, kept by the exchange in each bucket's `Reduction`.

Invariant: errors are of one bucket's messages in its own layout; a bucket of other parameters, or of other sizes, begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.zero.gradients import Gradients


def feedback_state(gradients: Sequence[Gradients]) -> list[dict[str, Any]]:
    """Of every bucket that keeps errors: whose they are, and theirs by message. Nothing where none does."""
    return [
        {"names": list(one.bucket.names), "numel": one.bucket.layout.padded_numel, "errors": errors}
        for one in gradients
        if (errors := [kept.state() for kept in one.reduction.feedback])
    ]


def take_feedback(gradients: Sequence[Gradients], saved: Sequence[dict[str, Any]]) -> bool:
    """Go on from what `feedback_state` gave; whether every bucket that keeps errors found its own."""
    by_bucket = {(tuple(entry["names"]), int(entry["numel"])): entry["errors"] for entry in saved}
    found_all = True
    for one in gradients:
        kept = one.reduction.feedback
        errors = by_bucket.get((tuple(one.bucket.names), one.bucket.layout.padded_numel), [])
        is_found = len(errors) == len(kept)
        found_all = found_all and is_found
        for i, feedback in enumerate(kept):
            feedback.take(errors[i] if is_found else None, one.bucket.full.device)
    return found_all
