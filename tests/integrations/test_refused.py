"""What docs/compatibility.md says is refused, is refused, in these words."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations import refused_jobs as jobs
from tests.integrations.common import ds_config, run_job, save_model, save_tokenizer
from tests.integrations.tensor_jobs import AUTOTP


def test_a_weight_normed_model_cannot_be_loaded_sharded(tmp_path: Path) -> None:
    assert "is sharded and cannot be used in 'weight_norm'" in run_job(jobs.speech, str(tmp_path))


def test_transformers_refuses_the_search_for_a_batch_size_at_stage_3(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    words = run_job(jobs.batch_size_search, folder, str(tmp_path), ds_config(3))
    assert "`auto_find_batch_size` isn't supported yet with DeepSpeed Zero-3" in words


def test_a_reference_worked_out_ahead_wants_a_model_that_was_loaded_before_the_arguments(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    folder = save_model(tmp_path / "model")
    save_tokenizer(folder)
    (words, _), (_, losses), (_, plain) = (
        run_job(jobs.reference_ahead, folder, str(tmp_path / "out"), config, world_size=1, is_sharded=is_sharded)
        for config, is_sharded in ((ds_config(3), True), (ds_config(3), False), (None, False))
    )
    assert "is sharded and cannot be used in 'cpu'" in words
    assert len(losses) == 2 and losses == pytest.approx(plain, rel=2e-5)


@pytest.mark.matrix
def test_transformers_refuses_to_load_a_file_under_zero_init_for_ranks_that_share_layers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    words = run_job(jobs.cut_layers_from_file, folder, str(tmp_path), ds_config(3, **AUTOTP))
    assert (
        "Weight conversions (e.g., MoE expert fusion) with DeepSpeed Tensor Parallelism are not yet implemented"
        in words
    )


def test_lightning_insists_on_cuda() -> None:
    pytest.importorskip("lightning")
    assert "only supported on CUDA GPUs but `CPUAccelerator` is used" in run_job(jobs.lightning_on_cpu, world_size=1)


def test_gradients_are_clipped_at_1_unless_the_configuration_says_otherwise() -> None:
    assert run_job(jobs.default_clipping, world_size=1) == 1.0
