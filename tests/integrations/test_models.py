"""Transformers' models built, loaded, resized, trained, generated from and saved while sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations import model_jobs as jobs
from tests.integrations.common import VOCAB, run_job, save_model
from tests.oracle import assert_close_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.quick("bf16")
@pytest.mark.compat(
    "Transformers models", "`HfDeepSpeedConfig`, `from_pretrained` under `zero.Init`, tied weights, `generate`", stage=3
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loop_of_one_s_own_with_hf_deep_speed_config_equals_plain_pytorch(model: str, precision: str) -> None:
    found = run_job(jobs.own_loop, model, precision, 6)
    plain = jobs.plain_loop(model, precision, 6)
    assert found["all_sharded"] and found["marked"] and found["tied"]
    assert found["dtypes"] == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert found["inv_freq"].dtype == torch.float32
    torch.testing.assert_close(found["inv_freq"], plain["inv_freq"], rtol=0, atol=0)
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5 if precision == "fp32" else 5e-3)
    assert found["losses"][-1] < found["losses"][0] - 0.3
    if precision == "fp32":
        assert torch.equal(found["generated"], plain["generated"])
        assert_close_weights(found["weights"], plain["weights"])
    assert found["uneven"].shape[1] > 8


@pytest.mark.compat("Transformers models", "`resize_token_embeddings`", stage=3)
@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_can_be_resized_while_sharded(tied: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    found = run_job(jobs.resize, folder, str(tmp_path / "out"))
    assert found["kept"] and found["shape"] == (VOCAB + 16, 32) and found["tied"] is tied
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.get_output_embeddings().weight.shape == (VOCAB + 16, 32)


@pytest.mark.compat("Transformers models", "missing weights initialised", stage=3)
def test_weights_that_a_checkpoint_lacks_are_initialised_alike_on_every_rank(model: str) -> None:
    found = run_job(jobs.from_scratch, model)
    assert found["equal"] and found["shape"] == (3, 32) and 0.01 < found["std"] < 0.04
    assert found["embedding"] == (VOCAB, 32)


@pytest.mark.compat("Transformers models", "masked language model: a tied head with a bias", stage=3)
def test_an_encoder_whose_tied_head_has_a_bias_loads_sharded_and_trains(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    BertForMaskedLM(jobs.masked_config()).save_pretrained(tmp_path)
    found = run_job(jobs.masked, str(tmp_path))
    assert found["losses"] == pytest.approx(jobs.plain_masked(str(tmp_path)), rel=1e-5)


@pytest.mark.compat("Transformers models", "`weight_norm` inside a gather (speech)", stage=3)
def test_weight_norm_inside_a_gather_replaces_a_sharded_parameter() -> None:
    found = run_job(jobs.speech)
    plain = jobs.plain_speech(found["initial"])
    assert found["external"] == [32 * 8 * 16, 16]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    # Softmax does not see a bias of the keys: its gradient is rounding, which Adam blows up.
    kept = [
        {n: w for n, w in weights.items() if "k_proj.bias" not in n} for weights in (found["weights"], plain["weights"])
    ]
    assert_close_weights(*kept, tolerance=1e-3)


@pytest.mark.compat("Transformers Trainer", "evaluate and predict without training", stage=3)
def test_a_trainer_that_never_trains_evaluates_at_stage_3(model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.integrations.common import ByteDataset

    found = run_job(jobs.evaluate_only, model, str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(model)
    windows = ByteDataset(12, offset=64).windows
    with torch.no_grad():
        assert found["loss"] == pytest.approx(plain(input_ids=windows, labels=windows).loss.item(), rel=1e-5)
    assert found["shape"] == (8, 32, VOCAB)
