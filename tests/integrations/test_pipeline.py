"""What Accelerate, the Trainer, Lightning and Fabric make of a PipelineModule: its engine trains by `train_batch`, and the calls of
their own loops are refused in the contract's words."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations import pipeline_jobs as jobs
from tests.integrations.common import run_job

REFUSED = "PipelineError: Only train_batch() is accessible in pipeline mode."


def test_accelerate_prepares_a_pipeline_whose_loop_is_train_batch() -> None:
    found = run_job(jobs.accelerate)
    assert found["kind"] == "PipelineEngine" and found["unwrapped"]
    assert found["losses"] == run_job(jobs.by_hand)
    assert found["forward"] == found["backward"] == REFUSED
    assert found["optimizer"] == "DeepSpeedOptimizerWrapper" and found["later"], "whose step is the engine's own affair"


def test_accelerate_counts_processes_where_pipelines_are_to_be_counted_and_is_told_so() -> None:
    words = run_job(jobs.accelerate_counts, {**jobs.CONFIG, "train_batch_size": "auto"})
    assert "16 != 4 * 2 * 1" in words and "Set train_batch_size to 8" in words


def test_the_trainer_calls_a_pipeline_and_is_refused(tmp_path: Path) -> None:
    assert run_job(jobs.trainer, str(tmp_path)) == REFUSED


def test_fabric_sets_up_a_pipeline_whose_loop_is_train_batch() -> None:
    pytest.importorskip("lightning")
    found = run_job(jobs.fabric)
    assert found["kind"] == "PipelineEngine" and found["losses"] == run_job(jobs.by_hand)
    assert found["forward"] == found["backward"] == REFUSED


def test_a_lightning_module_around_a_pipeline_is_refused_by_name() -> None:
    pytest.importorskip("lightning")
    words = run_job(jobs.inside)
    assert words.startswith("DeepSpeedConfigError: net of the Holder is a PipelineModule of 2 stages")
