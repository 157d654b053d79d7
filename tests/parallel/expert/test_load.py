"""What is told about experts: their load, dropped choices, auxiliary losses that nobody uses, operations."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from deepspeed.engine import expert_load
from deepspeed.kernels import grouped
from deepspeed.moe.layer import MoE
from deepspeed.monitor.report import main
from deepspeed.profiling.counter import OpCounter, StepFlops
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.monitor.test_report import BROWSER, FLAGS
from tests.parallel.expert.models import NUM_EXPERTS, WIDTH, FeedForward, Model, batches


class Forgetful(Model):
    """Leaves the auxiliary losses out."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return F.cross_entropy(self.last(x), y)


def layers(num: int = 2, **arguments: Any) -> list[nn.Module]:
    settings = {"ep_size": 2, "capacity_factor": 0.5, "min_capacity": 1, "k": 1, **arguments}
    return [MoE(WIDTH, FeedForward(), NUM_EXPERTS, **settings) for _ in range(num)]


def watched(rank: int, world_size: int, folder: str, forgets: bool) -> dict[str, Any]:
    """Three steps, an evaluation between the first two."""
    os.chdir(folder)
    torch.manual_seed(0)
    model = (Forgetful if forgets else Model)(layers())
    counts: list[list[Tensor]] = []
    kept: list[int] = []
    out, said = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(said)
    deepspeed.utils.logger.addHandler(handler)
    config = make_config(1, micro=1, steps_per_print=1, monitor={"run_dir": "run"}, csv_monitor={"enabled": True, "output_path": "csv", "job_name": "job"}, wall_clock_breakdown=forgets)  # fmt: skip
    try:
        with contextlib.redirect_stdout(out), engine_of(model, config) as engine:
            for step in batches(3, world_size):
                loss = engine(*step[rank])
                counts.append([layer.deepspeed_moe.exp_counts.clone() for layer in model.layers])
                kept.append(sum(int(layer.deepspeed_moe.place.load.counts.sum()) for layer in model.layers))
                engine.backward(loss)
                engine.step()
                with torch.no_grad():
                    engine(*step[rank])
            times = [
                (layer.time_moe, layer.time_falltoall, layer.time_salltoall, layer.gate.gate_time)
                for layer in engine.moe_layers
            ]
            known = (
                engine.has_moe_layers,
                engine.num_experts,
                engine.gate_modules == [x.gate for x in engine.moe_layers],
            )
    finally:
        deepspeed.utils.logger.removeHandler(handler)
    losses = [float(layer.deepspeed_moe.l_aux) for layer in model.layers]
    return {"counts": counts, "kept": kept, "out": out.getvalue(), "said": said.getvalue(), "losses": losses, "times": times, "known": known}  # fmt: skip


def test_the_record_the_line_and_monitors_tell_the_load_of_experts_over_all_ranks(tmp_path: Path) -> None:
    found = run_ranks(2, watched, str(tmp_path), False)
    check_times(found, are_timed=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    tables = [line["layers"] for line in lines if line["kind"] == "experts"]
    steps = [line["experts"] for line in lines if line["kind"] == "step"]
    assert len(tables) == len(steps) == 3
    assert lines[0]["params"] == sum(param.numel() for param in Model(layers(ep_size=1)).parameters())
    for step, (table, told) in enumerate(zip(tables, steps, strict=True)):
        chosen = [sum(each["counts"][step][layer] for each in found).tolist() for layer in range(2)]
        kept = list(table.values())
        assert list(table) == ["layers.0", "layers.1"]
        assert sum(map(sum, kept)) == sum(each["kept"][step] for each in found)
        assert all(k <= c for k_row, c_row in zip(kept, chosen, strict=True) for k, c in zip(k_row, c_row, strict=True))
        assert told["dropped"] == pytest.approx(1 - sum(map(sum, kept)) / sum(map(sum, chosen)))
        assert told["max_over_mean"] == pytest.approx(max(max(row) * NUM_EXPERTS / sum(row) for row in kept))
        assert told["dropped"] > 0 and told["auxiliary"] > 0
    assert "| experts: max/mean " in found[0]["out"] and "dropped " in found[0]["out"]
    names = {path.name for path in (tmp_path / "csv").rglob("*.csv")}
    assert {f"Train_Samples_expert_{key}.csv" for key in ("max_over_mean", "dropped", "auxiliary")} <= names
    assert "no part of the loss" not in found[0]["said"]
    check_report(tmp_path)


def check_report(folder: Path) -> None:
    import subprocess

    assert main([str(folder / "run")]) == 0
    page = folder / "run" / "report.html"
    assert '"experts":{"kind":"experts"' in page.read_text()
    if BROWSER:
        command = [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{page}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "Uncaught" not in done.stderr
        for title in ("Evenness of experts", "Dropped choices", "Auxiliary loss", "Load per expert"):
            assert f"<h2>{title}</h2>" in done.stdout
        assert done.stdout.count('title="expert ') == 2 * NUM_EXPERTS


def test_an_auxiliary_loss_that_is_no_part_of_the_loss_is_warned_about_once(tmp_path: Path) -> None:
    found = run_ranks(2, watched, str(tmp_path), True)
    check_times(found, are_timed=True)
    assert found[0]["said"].count("the auxiliary loss of layers.0, layers.1 is no part of") == 1
    assert found[1]["said"] == ""


def check_times(found: list[dict[str, Any]], *, are_timed: bool) -> None:
    """A layer's parts are timed with `wall_clock_breakdown`, each shorter than the whole; and the engine knows its layers."""
    for each in found:
        assert each["known"] == (True, [NUM_EXPERTS] * 2, True)
        for whole, *parts in each["times"]:
            assert all(0.0 < part < whole for part in parts) if are_timed else not any((whole, *parts))


def test_a_hugging_face_model_whose_auxiliary_loss_is_off_is_told_so() -> None:
    class Config:
        router_aux_loss_coef, output_router_logits = 0.02, False

    with patch.object(expert_load, "warn_once") as warned:
        expert_load.warn_of_unused_coefficient(Config())
        assert "router_aux_loss_coef = 0.02) is not computed" in warned.call_args[0][0]
        Config.output_router_logits = True
        expert_load.warn_of_unused_coefficient(Config())
        expert_load.warn_of_unused_coefficient(None)
    assert warned.call_count == 1


@pytest.mark.parametrize("product", [grouped.looped, grouped.grouped, None])
def test_grouped_products_are_counted_once_and_their_trial_never(product: Any) -> None:
    rows, weight = torch.randn(24, 8, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
    flops = StepFlops()
    with patch.object(grouped.TRIAL, "chosen", {}), OpCounter(flops.add):
        result = (
            product(rows, weight, [3, 9, 0, 12]) if product else grouped.grouped_product(rows, weight, [3, 9, 0, 12])
        )
        result.sum().backward()
    assert flops.model == 3 * 2 * 24 * 8 * 16
