"""The oracle matrix on the simulated device: the bits of the CPU in fp32, whatever the stage and the tier."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from deepspeed.assembly import assemble
from deepspeed.comm.exchange import Pending
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.reduce import InFlight
from tests.device.cases import TIERS, config_of, tier_section
from tests.engine.runs import Run, engine_of, on_device, train, whole_weights
from tests.engine.test_equals_plain_pytorch import native_products
from tests.harness import run_ranks
from tests.models import MODELS, build, make_batches, rank_share, total_loss

STAGES = (0, 1, 2, 3)
IS_WHOLE = bool(os.environ.get("DS_TEST_DEVICE"))
"""Whether to run the whole matrix; see conftest.py."""

SOME_TIERS = TIERS if IS_WHOLE else [(2, "cpu", "none"), (3, "nvme", "nvme")]
SOME_MODELS = sorted(set(MODELS) - {"example"}) if IS_WHOLE else ["gpt_tied"]


@functools.lru_cache(maxsize=None)
def on_cpu(name: str, stage: int, accumulation: int, clip: float = 0.0) -> Run:
    """The CPU's run."""
    run: Run = run_ranks(2, train, name, config_of(stage, accumulation=accumulation, clip=clip))[0]
    return run


def assert_same_bits(run: Run, expected: Run) -> None:
    assert run.losses == expected.losses
    assert [name for name in expected.weights if not torch.equal(run.weights[name], expected.weights[name])] == []


@pytest.mark.parametrize("accumulation", [1, 2] if IS_WHOLE else [2])
@pytest.mark.parametrize("name", SOME_MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_has_the_bits_of_the_cpu(stage: int, name: str, accumulation: int) -> None:
    run = run_ranks(2, train, name, config_of(stage, accumulation=accumulation), device="sim")[0]
    assert_same_bits(run, on_cpu(name, stage, accumulation))


@pytest.mark.parametrize(("stage", "optimizer", "param"), SOME_TIERS)
def test_every_tier_has_the_bits_of_the_cpu(stage: int, optimizer: str, param: str, tmp_path: Path) -> None:
    config = config_of(stage, clip=0.5, zero=tier_section(optimizer, param, tmp_path))
    run = run_ranks(2, train, "gpt_tied", config, device="sim")[0]
    assert_same_bits(run, on_cpu("gpt_tied", stage, 2, 0.5))


def held_back(
    rank: int, world_size: int, most: int, *arguments: Any, **options: Any
) -> tuple[Run, list[tuple[int, int]]]:
    """`train`, and after each start the bytes on the wire and those of the one that was started, where `most` may be."""
    seen: list[tuple[int, int]] = []
    add = InFlight.add

    def watched(wire: InFlight[Gradients], gradients: Gradients, pending: Pending, nbytes: int) -> None:
        add(wire, gradients, pending, nbytes)
        seen.append((wire.nbytes, gradients.bucket.layout.padded_numel * gradients.dtype.itemsize))

    with patch.object(assemble, "MAX_NBYTES_IN_FLIGHT", most), patch.object(InFlight, "add", watched):
        return train(rank, world_size, *arguments, **options), seen


@pytest.mark.parametrize(("stage", "most"), [(2, 6_000), (3, 60_000)])
def test_so_many_bytes_of_gradients_are_on_the_wire_and_the_bits_are_the_same(stage: int, most: int) -> None:
    small = {"reduce_bucket_size": 1_000}
    run, seen = run_ranks(2, held_back, most, "gpt_tied", config_of(stage, accumulation=2, zero=small), device="sim")[0]
    assert_same_bits(run, on_cpu("gpt_tied", stage, 2))
    assert all(on_wire <= most or on_wire == own for on_wire, own in seen), "one always may, however large"
    assert any(on_wire > own for on_wire, own in seen), "there were several"
    assert 2 * max(own for _, own in seen) > most, "and they did not all find room"


LOW = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 128}}}
SOME_LOW = list(LOW) if IS_WHOLE else ["fp16"]


@pytest.mark.parametrize("precision", SOME_LOW)
@pytest.mark.parametrize("stage", STAGES if IS_WHOLE else [3])
def test_low_precision_on_one_rank_has_the_bits_of_the_cpu(stage: int, precision: str) -> None:
    config = config_of(stage, **LOW[precision])
    runs = [
        run_ranks(1, train, "gpt_tied", config, samples=3, prepare=prepare, device=device)[0]
        for device, prepare in (("cpu", native_products), ("sim", None))
    ]
    assert_same_bits(*runs)


@pytest.mark.parametrize("precision", SOME_LOW)
@pytest.mark.parametrize("stages", [(0, 1), (2, 3)] if IS_WHOLE else [(2, 3)])
def test_low_precision_stages_that_reduce_alike_agree_bit_for_bit(stages: tuple[int, int], precision: str) -> None:
    runs = [run_ranks(2, train, "gpt_tied", config_of(s, **LOW[precision]), device="sim")[0] for s in stages]
    assert_same_bits(*runs)


def resume(rank: int, world_size: int, config: dict[str, Any], folder: str, loads: bool) -> dict[str, torch.Tensor]:
    """Four steps; with `loads` the last two by another engine, from a checkpoint."""
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=4, accumulation=1, samples=6)

    def run(engine: Any, some: Any) -> None:
        for (batch,) in some:
            engine.backward(total_loss(engine(*on_device(rank_share(batch, rank, world_size), engine.device))))
            engine.step()

    with engine_of(model, config) as engine:
        run(engine, batches[:2])
        if not loads:
            run(engine, batches[2:])
            return whole_weights(engine)
        engine.save_checkpoint(folder)
    with engine_of(build("gpt_tied", seed=7), config) as engine:
        engine.load_checkpoint(folder)
        run(engine, batches[2:])
        return whole_weights(engine)


@pytest.mark.parametrize("stage", STAGES if IS_WHOLE else [3])
def test_training_resumes_from_a_checkpoint_bit_for_bit(stage: int, tmp_path: Path) -> None:
    config = config_of(stage, accumulation=1)
    runs = [run_ranks(2, resume, config, str(tmp_path), loads, device="sim")[0] for loads in (False, True)]
    assert [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])] == []


@pytest.mark.parametrize("stage", STAGES if IS_WHOLE else [3])
def test_offloaded_activations_have_the_bits_of_the_cpu(stage: int) -> None:
    extra = {"activation_checkpointing": {"recompute": "full", "cpu_checkpointing": True}}
    runs = [run_ranks(2, train, "gpt_tied", config_of(stage, **extra), device=d)[0] for d in ("cpu", "sim")]
    assert_same_bits(*runs)
