"""Ways of dividing ranks that nobody has shown together are refused by name on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import deepspeed
from deepspeed.engine.together import as_markdown
from deepspeed.mesh.mesh import _meshes as meshes
from deepspeed.pipe import PipelineModule
from deepspeed.utils.errors import NotAvailableError
from tests.harness import run_ranks

BASE = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
TENSOR = {"tensor_parallel": {"autotp_size": 2}}
SEQUENCE = {"sequence_parallel_size": 2}

PAIRS: list[tuple[dict[str, Any], bool, str]] = [
    (TENSOR, True, "tensor_parallel.autotp_size = 2, but the mpu has 1"),
    ({**TENSOR, **SEQUENCE}, False, "tensor parallelism on 2 ranks together with parts of sequences on 2"),
    ({**TENSOR, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, False, "tensor parallelism on 2"),
    (SEQUENCE, True, "sequence_parallel_size = 2, but by the mpu 1 ranks"),
]


def refused(rank: int, world_size: int) -> list[str]:
    words = []
    for section, is_pipeline, _ in PAIRS:
        layers = [nn.Linear(4, 4) for _ in range(4)]
        model = PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss()) if is_pipeline else nn.Sequential(*layers)
        with pytest.raises((NotAvailableError, deepspeed.utils.errors.DeepSpeedError)) as caught:
            deepspeed.initialize(model=model, config={**BASE, **section})
        words.append(str(caught.value))
        assert not any(mesh.num_users for mesh in meshes.values()), "no engine lives"
    return words


def test_the_page_has_the_pairs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "composability.md"
    assert as_markdown() in page.read_text()


def test_pairs_that_nobody_has_shown_are_refused_in_words() -> None:
    for found in run_ranks(4, refused):
        for text, (*_, expected) in zip(found, PAIRS, strict=True):
            assert text.startswith(expected), text
