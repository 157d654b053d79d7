"""One rank's values of a tensor of any kind, given to all: the one place through which a user's own tensors reach the wire.

Called where a model is taken over, for its buffers and for parameters that lie in no bucket. Collectives move memory
without gaps, in the dtypes that a backend knows; what users register is also sliced, expanded, transposed, sparse,
nested, quantized, or of eight bits. Sent as they lie, such tensors arrive wrong, or overwrite what lies between.

    strided                         a copy without gaps, as bytes, written back element by element into where it lies
    sparse, nested, quantized       as torch.save writes them, read with weights_only; the tensor is replaced

Invariant: a tensor that is given back as the same object has kept its memory, its strides, and every byte in its gaps.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor's elements are numbers that lie in its memory; not so for sparse, nested and quantized ones."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


@torch.no_grad()
def spread(exchange: Exchange, tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` with the first rank's values, on its own device: the same object where `is_strided` and not made in
    inference mode, else another one. All ranks give tensors of one shape, dtype and kind; their strides may differ.

    `device` is where the exchange takes buffers. Collective.
    """
    if exchange.world_size == 1:
        return tensor
    if not is_strided(tensor):
        return _spread_saved(exchange, tensor, device)
    if tensor.is_inference():
        tensor = tensor.clone()  # torch forbids writing such a tensor outside of inference mode
    if tensor.numel():
        here = tensor.detach()
        sent = here.resolve_conj().resolve_neg().contiguous()
        moved = sent.reshape(-1).view(torch.uint8).to(device)
        exchange.broadcast(moved)
        if exchange.rank != 0 and moved.data_ptr() != here.data_ptr():
            _write(moved.to(tensor.device).view(tensor.dtype).view(sent.shape), here)
    return tensor


def _write(values: Tensor, into: Tensor) -> None:
    """Write each element once: along an expanded dim all are one, and torch refuses to write them several times."""
    for dim, stride in enumerate(into.stride()):
        if stride == 0:
            into, values = into.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    into.copy_(values)


def _spread_saved(exchange: Exchange, tensor: Tensor, device: torch.device) -> Tensor:
    saved = io.BytesIO()
    if exchange.rank == 0:
        torch.save(tensor.detach().cpu(), saved)
    size = torch.tensor([saved.getbuffer().nbytes], device=device)
    exchange.broadcast(size)
    if exchange.rank == 0:
        payload = torch.frombuffer(saved.getbuffer(), dtype=torch.uint8).to(device)
    else:
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    exchange.broadcast(payload)
    if exchange.rank == 0:
        return tensor
    return torch.load(io.BytesIO(payload.cpu().numpy().tobytes()), weights_only=True).to(tensor.device)
