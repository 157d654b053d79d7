"""Two ways of dividing ranks at once train as one process does with plain PyTorch, and continue one another's checkpoints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import deepspeed
from deepspeed.mesh.mesh import _meshes as meshes
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.parallel import pairs
from tests.parallel.pairs import EXPERTS, Way

pytest.importorskip("transformers")

LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="the whole matrix: make test-pairs")
TENSOR_SEQUENCE = Way(tp=2, sp=2)
EXPERTS_SEQUENCE = Way(sp=2, ep=2, model=EXPERTS)
EXPERTS_TENSOR = Way(tp=2, ep=2, model=EXPERTS)
EXPERTS_CUT = Way(tp=2, ep=2, stage=2, experts="cut")
MICS, HPZ = {"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}


def check(world: int, way: Way) -> None:
    for found in run_ranks(world, pairs.train, way):
        assert found["loss"] < 1e-6, found
        assert found["grad"] < 1e-5, found
        assert found["norm"] < 1e-5, found
        assert found["weight"] < 2e-5, found


SHOWN: list[tuple[int, Way]] = [
    (4, replace(TENSOR_SEQUENCE, stage=3)),
    (4, replace(EXPERTS_SEQUENCE, stage=1)),
    (4, replace(EXPERTS_TENSOR, stage=2)),
    (8, Way(tp=2, stage=3, zero=MICS)),
    (8, Way(tp=2, stage=3, zero=HPZ)),
    (8, Way(tp=2, sp=2, stage=3, zero=MICS)),
    (8, Way(tp=2, sp=2, stage=3, zero=HPZ)),
    (8, Way(sp=2, stage=3, zero=HPZ)),
    (8, Way(tp=2, sp=2, ep=2, stage=2, model=EXPERTS)),
    (8, Way(tp=2, sp=2, ep=2, stage=3, model=EXPERTS)),
    (8, Way(tp=2, sp=4, stage=1)),
    *((4, Way(tp=2, ep=2, stage=stage, experts=kind)) for kind in ("cut", "native", "list") for stage in (2, 0, 1, 3)),
    *((4, Way(sp=2, ep=2, stage=stage, experts=kind)) for kind in ("native", "list") for stage in (0, 1, 2, 3)),
]
OF_EVERY_DAY = 3
"""How many of them, beside experts that layers' ranks cut."""
"""What docs/composability.md lists; the first ones are tests of every day."""


@pytest.mark.parametrize(
    ("world", "way"),
    [
        pytest.param(*each, marks=[] if i < OF_EVERY_DAY or each[1] == EXPERTS_CUT else LONG)
        for i, each in enumerate(SHOWN)
    ],
    ids=str,
)
def test_pairs_equal_one_process(world: int, way: Way) -> None:
    check(world, way)


def test_copies_of_shards_beside_tensor_parallelism() -> None:
    check(4, Way(tp=2, stage=3, zero={"mics_shard_size": 1}))


@LONG
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("way", [TENSOR_SEQUENCE, EXPERTS_SEQUENCE, EXPERTS_TENSOR])
def test_every_stage_with_and_without_data_parallelism(way: Way, world: int, stage: int) -> None:
    check(world, replace(way, stage=stage))


ALONE = (1, Way())
ALONE_EXPERTS = (1, Way(model=EXPERTS))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, replace(TENSOR_SEQUENCE, stage=3)), ALONE),
        pytest.param(ALONE, (4, replace(TENSOR_SEQUENCE, stage=2)), marks=LONG),
        pytest.param((4, replace(EXPERTS_SEQUENCE, stage=2)), ALONE_EXPERTS, marks=LONG),
        pytest.param(ALONE_EXPERTS, (4, replace(EXPERTS_SEQUENCE, stage=3)), marks=LONG),
        ((4, replace(EXPERTS_TENSOR, stage=1)), ALONE_EXPERTS),
        pytest.param(ALONE_EXPERTS, (4, replace(EXPERTS_TENSOR, stage=3)), marks=LONG),
        pytest.param((4, EXPERTS_CUT), (1, Way(experts="cut")), marks=LONG),
        pytest.param((1, Way(experts="cut")), (4, replace(EXPERTS_CUT, stage=3)), marks=LONG),
        pytest.param((4, Way(tp=2, ep=2, stage=3, experts="list")), (2, Way(experts="list")), marks=LONG),
        pytest.param((8, Way(tp=2, stage=3, zero=MICS)), ALONE, marks=LONG),
        pytest.param(ALONE, (8, Way(tp=2, stage=3, zero=MICS)), marks=LONG),
        pytest.param((8, Way(tp=2, stage=3, zero=HPZ)), (2, Way(sp=2, stage=1)), marks=LONG),
        pytest.param((2, Way(sp=2, stage=1)), (8, Way(tp=2, stage=3, zero=HPZ)), marks=LONG),
    ],
    ids=str,
)
def test_a_checkpoint_of_a_pair_continues_elsewhere(
    saved: tuple[int, Way], loaded: tuple[int, Way], tmp_path: Path
) -> None:
    expected: list[float] = run_ranks(saved[0], pairs.save, saved[1], str(tmp_path))[0]
    found: Any = run_ranks(loaded[0], pairs.load, loaded[1], str(tmp_path))[0]
    assert found == pytest.approx(expected, rel=1e-5)


def contradictions(rank: int, world_size: int) -> list[str]:
    """What is said of sizes that a pipeline's mpu does not have; no engine lives afterwards."""
    words = []
    for section in ({"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2}):
        model = PipelineModule([nn.Linear(4, 4) for _ in range(4)], num_stages=2, loss_fn=nn.MSELoss())
        with pytest.raises(DeepSpeedError) as caught:
            deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, **section})
        words.append(str(caught.value))
        assert not any(mesh.num_users for mesh in meshes.values()), "no engine lives"
    return words


def test_sizes_that_an_mpu_contradicts_are_refused_on_every_rank() -> None:
    for tensor, sequence in run_ranks(4, contradictions):
        assert tensor.startswith("tensor_parallel.autotp_size = 2, but the mpu has 1")
        assert sequence.startswith("sequence_parallel_size = 2, but by the mpu 1 ranks")


def too_many(rank: int, world_size: int) -> str:
    """A sequence's ranks times those that share layers are more than there are."""
    with pytest.raises(DeepSpeedError) as caught:
        pairs.start(Way(tp=4, sp=2))
    UlyssesSPAttentionHF.unregister()
    parallel_state_sp.destroy_sequence_parallel()
    return str(caught.value)


def test_sizes_whose_product_does_not_divide_the_ranks_are_refused() -> None:
    for text in run_ranks(4, too_many):
        assert text.startswith(
            "sequence parallel size 2 times tensor_parallel.autotp_size = 4 does not divide the 4 ranks"
        )
