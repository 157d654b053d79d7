"""Elastic batch sizes: the published example, properties of any result, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepspeed
from deepspeed.config import load_config
from deepspeed.elasticity import (
    DSElasticAgent,
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
    get_compatible_gpus,
    get_valid_gpus,
)
from deepspeed.elasticity.command import main

BASE = {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6], "version": 0.1}


def _config(**changes: Any) -> dict[str, Any]:
    return {"elasticity": {**BASE, **changes}}


def test_the_published_example() -> None:
    batch, valid = compute_elastic_config(_config(), "1.0.0")
    assert batch == 1680
    assert 1 in valid and 840 in valid and 11 not in valid
    assert compute_elastic_config(_config(), "1.0.0", world_size=8) == (1680, valid, 6)


@settings(max_examples=150, deadline=None)
@given(
    micro=st.lists(st.integers(1, 32), min_size=1, max_size=4),
    cap=st.integers(32, 3000),
    most=st.integers(1, 300),
    larger=st.booleans(),
)
def test_every_valid_count_can_train_the_batch(micro: list[int], cap: int, most: int, larger: bool) -> None:
    batch, valid = get_compatible_gpus(micro, cap, 1, most, larger)
    assert 0 < batch <= cap
    every = [n for n in range(1, most + 1) if any(batch % (m * n) == 0 for m in micro)]
    assert valid == every == get_valid_gpus(batch, micro, 1, most)


@settings(max_examples=100, deadline=None)
@given(nodes=st.integers(1, 20), per_node=st.sampled_from([1, 4, 8]), parallel=st.sampled_from([1, 2, 4]))
def test_version_2_fits_every_number_of_nodes_it_accepts(nodes: int, per_node: int, parallel: int) -> None:
    world = nodes * per_node
    config = _config(version=0.2, num_gpus_per_node=per_node, model_parallel_size=parallel)
    if per_node % parallel:
        with pytest.raises(ElasticityConfigError, match="not a multiple of model_parallel_size"):
            compute_elastic_config(config, "1.0.0", world_size=world)
        return
    batch, valid, micro = compute_elastic_config(config, "1.0.0", world_size=world)  # type: ignore[misc]
    assert batch <= 2000 and world // parallel in valid and batch % (micro * (world // parallel)) == 0


def test_a_smaller_batch_may_be_preferred() -> None:
    assert get_compatible_gpus([2], 10, prefer_larger=True)[0] >= get_compatible_gpus([2], 10, prefer_larger=False)[0]


@pytest.mark.parametrize(
    ("config", "version", "world", "error", "words"),
    [
        ([], "1.0", 0, ValueError, "is a list, not a dict"),
        ({}, "1.0", 0, ElasticityConfigError, "no section 'elasticity'"),
        (_config(enabled=False), "1.0", 0, ElasticityConfigError, "enabled is not true"),
        (_config(version=0.3), "1.0", 0, ElasticityConfigError, "no such version"),
        (_config(model_parallel_size=2), "1.0", 0, ElasticityConfigError, "needs version 0.2"),
        (_config(micro_batch_sizes=[0]), "1.0", 0, ElasticityConfigError, "micro_batch_sizes"),
        (_config(), "0.2", 0, ElasticityError, "version 0.2 has no elasticity"),
        (_config(), "new", 0, ElasticityError, "is no version"),
        (_config(), "1.0", 11, ElasticityIncompatibleWorldSize, "11 GPUs cannot train an elastic batch of 1680"),
        (_config(version=0.2), "1.0", 0, ElasticityConfigError, "needs the number of GPUs"),
        (_config(version=0.2), "1.0", 5000, ElasticityIncompatibleWorldSize, "5000 GPUs need more samples"),
        (_config(max_train_batch_size=1), "1.0", 0, ElasticityConfigError, "no elastic batch up to 1"),
    ],
)
def test_what_cannot_be_computed_says_why(
    config: Any, version: str, world: int, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(error, match=words):
        compute_elastic_config(config, version, world_size=world)


def test_training_takes_the_elastic_sizes() -> None:
    config = load_config(_config(max_train_batch_size=8, micro_batch_sizes=[2, 4]))
    for ranks in (1, 2, 4):
        sizes = config.batch_sizes(data_parallel_size=ranks, size_source="test")
        assert sizes.train == 8 and sizes.micro * sizes.accumulation * ranks == 8
    with pytest.raises(ElasticityIncompatibleWorldSize):
        config.batch_sizes(data_parallel_size=3, size_source="test")


def test_the_schedulers_configuration_must_be_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    section = _config()["elasticity"]
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", json.dumps(section))
    ensure_immutable_elastic_config(section)
    with pytest.raises(ElasticityConfigError, match="max_train_batch_size = 100, but the scheduler was given 2000"):
        ensure_immutable_elastic_config({**section, "max_train_batch_size": 100})
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", "no json")
    with pytest.raises(ElasticityConfigError, match="is not a JSON object"):
        ensure_immutable_elastic_config(section)


def test_ds_elastic_prints_the_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(_config()))
    assert main(["-c", str(path), "-w", "8"]) == 0
    written = capsys.readouterr().out
    assert "final_batch_size .... 1680" in written and "micro_batch_size .... 6" in written
    assert main(["-c", str(path), "-w", "-4"]) == 1
    path.write_text("{")
    assert main(["-c", str(path)]) == 1
    assert main(["-c", str(tmp_path / "none")]) == 1
    written = capsys.readouterr().err
    assert "--world-size -4 is no number of GPUs" in written
    assert f"{path} is not JSON" in written and f"{tmp_path}/none cannot be read: No such file" in written


def test_names_and_switches() -> None:
    assert elasticity_enabled(_config()) and not elasticity_enabled({}) and not elasticity_enabled({"elasticity": {}})
    assert deepspeed.elasticity.compute_elastic_config is compute_elastic_config
    assert DSElasticAgent.__mro__[1].__name__ == "LocalElasticAgent"
