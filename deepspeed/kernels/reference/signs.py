"""One bit per element with error feedback, in plain torch: what the 1-bit optimizers send, and the oracle of the faster forms.

    error += x                     what is said now, and what earlier messages did not say
    scale = ||error|| / sqrt(n)
    bits  = error >= 0             eight elements a byte, the first in the lowest bit
    error -= scale * sign          is said next time; the sign of 0 is +1

After 1-bit Adam, arXiv:2102.02888, section 4. The norm is summed in double precision and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


def check_signs(numel: int) -> None:
    """Raise DeepSpeedError unless the signs fill whole bytes."""
    if numel % 8:
        raise DeepSpeedError(f"{numel} elements: their signs do not fill whole bytes.\n  Pad to a multiple of 8.")


def compress_signs(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(bits [n / 8] uint8, scale [] fp32) of x + error, which `error` [n] fp32 keeps the rest of. Changes `error`."""
    check_signs(x.numel())
    error.add_(x)
    scale = (error.double().square().sum() / max(x.numel(), 1)).sqrt().float()
    is_positive = error >= 0
    error.sub_(torch.where(is_positive, scale, -scale))
    return pack_bits(is_positive), scale


def add_signs(bits: Tensor, into: Tensor, scale: Tensor | float) -> None:
    """into += scale * sign, `into` [8 * len(bits)] fp32."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=into.device)
    into.add_(torch.where(unpack_bits(bits), scale, -scale))


def pack_bits(flags: Tensor) -> Tensor:
    """[n] bool to [n / 8] uint8, the first in the lowest bit."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).bool().view(-1)
