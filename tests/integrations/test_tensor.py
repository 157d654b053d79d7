"""Two ranks that share the layers of a model, by `tensor_parallel.autotp_size`, train like one process under both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from tests.integrations import tensor_jobs as jobs
from tests.integrations.common import ADAMW, ds_config, run_job, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(model: str, plain_folder: Path) -> dict[str, Any]:
    return run_job(jobs.train, model, str(plain_folder), None, world_size=1)


@pytest.fixture(scope="module")
def filled(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two plain data-parallel ranks, on an evaluation set that fills the last batches of both."""
    return run_job(jobs.train, model, str(tmp_path_factory.mktemp("filled")), None, num_evaluated=16)


@pytest.fixture(scope="module")
def plain_loop(model: str, plain_folder: Path) -> dict[str, Any]:
    return run_job(jobs.loop, model, str(plain_folder), None, world_size=1)


def assert_equal_runs(run: dict[str, Any], plain: dict[str, Any]) -> None:
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert run["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    if "eval" in plain:
        assert run["eval"] == pytest.approx(plain["eval"], rel=1e-5)


def assert_equal_weights(saved: Path, plain: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (saved, plain))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert_close(ours[name], weight)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Adam's first steps divide small gradients by themselves, so what differs in the last bit may differ in a few more."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.compat("Transformers Trainer", "`tensor_parallel.autotp_size`: 2; train, evaluate, `save_model`")
@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("optimizer", ["hf", pytest.param("ds", marks=pytest.mark.matrix)])
def test_the_trainers_curves_and_saved_weights_equal_one_process(
    stage: int, optimizer: str, model: str, plain: dict[str, Any], plain_folder: Path, tmp_path: Path
) -> None:
    own = {"optimizer": ADAMW} if optimizer == "ds" else {}
    assert_equal_runs(run_job(jobs.train, model, str(tmp_path), ds_config(stage, **jobs.AUTOTP, **own)), plain)
    assert_equal_weights(tmp_path / "saved2", plain_folder / "saved1")


@pytest.mark.matrix
@pytest.mark.compat("Transformers Trainer", "`tensor_parallel.autotp_size`: 2 beside two data-parallel ranks")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layers_are_shared_beside_data_parallel_ranks(
    stage: int, model: str, filled: dict[str, Any], tmp_path: Path
) -> None:
    """Evaluated samples fill the last batches of all readers: of what is beyond, Accelerate 1.x cuts off the repetitions, and counts
    as such also what the second of two ranks that share layers has computed; the mean is then a weighted one."""
    own = ds_config(stage, **jobs.AUTOTP)
    found = run_job(jobs.train, model, str(tmp_path), own, world_size=4, num_evaluated=16)
    assert_equal_runs(found, filled)


@pytest.mark.matrix
def test_a_last_batch_that_is_not_full_weighs_less_in_the_trainers_evaluation_and_in_nothing_else(
    model: str, tmp_path: Path
) -> None:
    """Batches of 4 on two readers: 12 samples are a full round and one whose second reader begins again. Accelerate gathers a value
    per sample from all four ranks, and keeps as many of the last round as there are samples in it: the first rank's. The samples
    of full rounds count for each of the two ranks that share layers, the others once."""
    found = run_job(jobs.train, model, str(tmp_path / "cut"), ds_config(1, **jobs.AUTOTP), world_size=4)["eval"]
    plain = {
        count: run_job(jobs.train, model, str(tmp_path / str(count)), None, num_evaluated=count)["eval"]
        for count in (8, 12)
    }
    full, last = plain[8], (12 * plain[12] - 8 * plain[8]) / 4
    assert found == pytest.approx((2 * 8 * full + 4 * last) / 20, rel=2e-6)
    assert abs(found - plain[12]) > 10 * abs(found - (2 * 8 * full + 4 * last) / 20)


@pytest.mark.matrix
@pytest.mark.compat("Transformers Trainer", "`tensor_parallel.autotp_size`: resume a checkpoint of 1 or 2 with 1 or 2")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_is_resumed_at_another_size(
    stage: int, before: int, after: int, model: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    for size, more in ((before, {"saves": True}), (after, {"resume_from": 3})):
        config = ds_config(stage, **(jobs.AUTOTP if size > 1 else {}))
        found = run_job(jobs.train, model, str(tmp_path), config, world_size=size, **more)
        assert_equal_runs(found, plain)


@pytest.mark.matrix
@pytest.mark.compat(
    "Accelerate", "`tensor_parallel.autotp_size`: 2 in a loop; `save_state`, `load_state`, `get_state_dict`"
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loop_of_accelerate_saves_and_resumes_like_one_process(
    stage: int, model: str, plain_loop: dict[str, Any], plain_folder: Path, tmp_path: Path
) -> None:
    assert_equal_runs(run_job(jobs.loop, model, str(tmp_path), stage), plain_loop)
    assert_equal_weights(tmp_path / "saved", plain_folder / "saved")
    rest = run_job(jobs.loop, model, str(tmp_path), stage, resumes=True)
    assert_equal_runs(rest, {name: values[4:] for name, values in plain_loop.items()})
