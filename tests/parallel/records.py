"""What is recorded of a run whose ranks share layers or sequences, for `test_record.py`."""

from __future__ import annotations

from typing import Any

import torch

import deepspeed
from tests.parallel.sequence import runs as sequences
from tests.parallel.sequence.variants import part_with_labels, start, stop
from tests.parallel.tensor import runs as tensors
from tests.parallel.tensor.models import batch, small


def _watched(config: dict[str, Any], folder: str) -> dict[str, Any]:
    return config | {"monitor": {"run_dir": folder}, "comms_logger": {"enabled": True}, "steps_per_print": 2}


def _log() -> dict[str, Any]:
    found = deepspeed.comm.log_summary(return_dict=True)
    assert found is not None
    deepspeed.comm.configure(enabled=False)
    summary: dict[str, Any] = found["summary"]
    return summary


def layers(rank: int, world: int, folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """Two steps of ranks that share layers; the log of collectives."""
    asked = tensors.config(world, 1)
    asked["tensor_parallel"] |= section
    engine, *_ = deepspeed.initialize(model=small("llama"), config=_watched(asked, folder))
    for _ in range(2):
        engine.backward(engine(**batch(2)).loss)
        engine.step()
    engine.destroy()
    return _log()


def parts(rank: int, world: int, folder: str, kv: int) -> dict[str, Any]:
    """Two steps of ranks that share a sequence of 16 tokens; the log of collectives."""
    engine = None
    try:
        engine = start(sequences.tiny_model(kv=kv), world, _watched(sequences.config_of(1), folder))
        for _ in range(2):
            engine.backward(engine(**part_with_labels(sequences.batch_of("packed", 16), rank, world)).loss)
            engine.step()
    finally:
        stop(engine)
    torch.distributed.barrier()
    return _log()
