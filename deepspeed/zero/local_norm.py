"""One norm of a step's gradients where no rank has their mean: each has its own, which its optimizer will compress.

Owned by the optimizer wrapper, beside `zero.norm`, for steps of optimizers that average by themselves. The norm of the mean is
not known before it is made; the root of the mean of the ranks' squares takes its place, which is never below it. All ranks
get the same bits, so they clip by one factor and skip together.

Invariant: one all-reduce of two numbers over the job; a gradient that is not finite on any rank shows on all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.mesh import Mesh, marks
from deepspeed.utils.waits import COMMUNICATION
from deepspeed.zero.gradients import Gradients, norm_of
from deepspeed.zero.norm import CHANGED, Measured


class LocalNorm:
    """Measures each rank's own gradients. Collective to make."""

    def __init__(self, gradients: Sequence[Gradients], mesh: Mesh, device: torch.device) -> None:
        self._gradients, self._mesh, self._device = gradients, mesh, device
        self._group = mesh.group("job", "control" if device.type == "cpu" else "norm")

    def measure(self, news: bool | Tensor = False) -> Measured:
        """As `GradientNorm.measure`. Collective."""
        misses_here = float(any(gradients.arrivals.misses_any for gradients in self._gradients))
        missed = torch.full((), misses_here, device=self._device) + CHANGED * news
        norms = [norm for gradients in self._gradients for norm in self._norms(gradients)]
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self._device)
        both = torch.stack([total.square(), missed])
        if self._group is not None:
            with COMMUNICATION.during("zero.norm", both.nbytes):
                torch.distributed.all_reduce(both, group=self._group)
        squares, num_missed = both.tolist()
        norm = (squares / self._mesh.size("average")) ** 0.5
        return Measured(norm, num_missed % CHANGED > 0, num_missed >= CHANGED)

    def _norms(self, gradients: Gradients) -> list[Tensor]:
        views, shape, rank = gradients.local_views, self._mesh.shape, self._mesh.global_rank
        return [
            # Where it is counted elsewhere, 0 * norm still shows what is not finite here.
            norm_of(views[i]) * float(marks.of(param).counts_here(shape, rank))
            for i, param in gradients.bucket.members()
        ]
