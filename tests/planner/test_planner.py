"""Layouts, clusters, shapes and the commands: pure, or traced on the meta device."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.launcher import runner
from deepspeed.memory.inside import Inside, Way
from deepspeed.memory.shape import ModelShape, shape_of
from deepspeed.memory.trace import own_memory, trace_step
from deepspeed.parallel.pipeline.check import Costs, simulate
from deepspeed.parallel.pipeline.schedules import NAMED
from deepspeed.planner import largest, machine
from deepspeed.planner.cluster import read_cluster
from deepspeed.planner.largest_model import deepest_below
from deepspeed.planner.layouts import Layout, evaluate, layouts, rank_params
from deepspeed.planner.machine import Asked, measure
from deepspeed.planner.search import parse_layout, plan_cluster, simulated
from deepspeed.profiling import rates
from deepspeed.profiling.counter import Phase
from deepspeed.utils import figures
from deepspeed.utils.errors import DeepSpeedError
from tests.planner.test_doctor import write_model

CLUSTER: dict[str, Any] = {
    "nodes": 512,
    "devices_per_node": 8,
    "device": {"memory_gb": 80, "tflops": 600, "memory_gb_s": 2500},
    "links": {"within_gb_s": 300, "between_gb_s": 40, "latency_us": 8},
    "price_per_device_hour": 2.0,
}
LLAMA_70B = ModelShape(
    name="Llama", num_blocks=80, block_params=855_654_400, block_cut_params=855_638_016, block_expert_params=0,
    outer_params=2_101_354_496, first_params=1_050_673_152, block_flops=2.27e13, outer_flops=2.58e13, block_kept_nbytes=1.78e9,
    outer_kept_nbytes=2.37e9, boundary_nbytes=67_108_864.0, itemsize=2, num_heads=64, num_kv_heads=8,
    inside={Way(tp).name(again): Inside(block={"tensor.all_reduce": (4 + again, (4 + again) * 67_108_864)} if tp > 1 else {})
            for tp in (1, 2, 4, 8) for again in (False, True)},
)  # fmt: skip


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(depth)
        )
        self.head = nn.Linear(16, 50)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1).float(), y.flatten())


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.zeros(1, 24, dtype=torch.int64, device="meta")
    return made, made


def test_the_parts_of_a_shape_sum_to_the_traced_whole() -> None:
    model = Stack(7)
    shape = shape_of(model, tokens())
    trace = trace_step(Stack(7), tokens(), {}, dtype=torch.bfloat16, device_type="cuda")
    forward_end = next(i for i, event in enumerate(trace.events) if event.what.value == "backward")
    assert shape.num_params == sum(param.numel() for param in model.parameters())
    assert shape.flops == trace.flops.by_phase[Phase.FORWARD] + trace.flops.by_phase[Phase.BACKWARD]
    assert shape.num_blocks * shape.block_kept_nbytes + shape.outer_kept_nbytes == list(own_memory(trace))[forward_end]
    assert shape.boundary_nbytes == 24 * 16 * 2
    assert len(model.blocks) == 7


def test_thousands_of_ranks_are_planned_in_seconds_and_every_plan_is_whole() -> None:
    cluster = read_cluster(CLUSTER)
    answer = plan_cluster(LLAMA_70B, cluster, 4096)
    assert answer.num_layouts > 1000
    for plan in answer.plans:
        at = plan.layout
        assert at.pp * at.dp * at.sp * at.tp == 4096
        assert at.dp * at.micro * at.accumulation == 4096
        assert plan.device_nbytes <= 80e9
        assert parse_layout(at.name) == at
    assert [plan.step_s for plan in answer.plans] == sorted(plan.step_s for plan in answer.plans)
    assert 0.3 < LLAMA_70B.flops * 4096 / answer.plans[0].step_s / (4096 * 600e12) < 0.7


def test_the_bubble_is_that_of_the_schedules_own_list() -> None:
    cluster = read_cluster({**CLUSTER, "links": {"within_gb_s": 1e9, "between_gb_s": 1e9, "latency_us": 0}})
    plan = simulated(evaluate(LLAMA_70B, cluster, Layout(pp=4, dp=1024, micro=1, accumulation=12, stage=1)))
    listed = simulate(NAMED["1f1b"](4, 12), Costs.equal(4)).bubble
    assert plan.bubble == pytest.approx(listed, rel=1e-6)
    assert plan.bubble == pytest.approx(3 / 15, rel=1e-6)


def test_ranks_that_take_turns_on_processors_fill_bubbles_and_work_for_their_messages() -> None:
    links = {"within_gb_s": 1e9, "between_gb_s": 1e9, "latency_us": 1000}
    own, shared = (
        read_cluster({"devices_per_node": 8, "device": {"memory_gb": 80, "tflops": 1}, "links": links, **more})
        for more in ({}, {"processors": 2})
    )
    layout = Layout(pp=8, accumulation=8)
    apart, together = (simulated(evaluate(LLAMA_70B, cluster, layout)) for cluster in (own, shared))
    assert apart.bubble == pytest.approx(7 / 15, rel=1e-3)
    assert together.bubble == 0.0, "two of eight are busy as soon as the second stage is"
    assert together.compute_s - apart.compute_s == pytest.approx(8 * 2 * 1e-3 * 7 / 8)
    assert [shared.latency_s(ranks) for ranks in (2, 3, 4, 8)] == [1e-3, 2e-3, 2e-3, 3e-3]
    as_many = read_cluster({"devices_per_node": 8, "device": {"memory_gb": 80, "tflops": 1}, "processors": 8})
    assert as_many.turns == 1.0


def test_calls_and_gradients_are_paid_for_by_micro_batch() -> None:
    cluster = read_cluster({"device": {"memory_gb": 80, "tflops": 1, "memory_gb_s": 1000, "call_us": 50}})
    shape = replace(LLAMA_70B, block_modules=14, outer_modules=6)
    once, twice = (evaluate(shape, cluster, Layout(micro=4 // n, accumulation=n)).compute_s for n in (1, 2))
    assert twice - once == pytest.approx((80 * 14 + 6) * 50e-6 + 4 * 2 * shape.num_params / 1e12, rel=1e-6)
    made = shape_of(Stack(7), tokens())
    assert (made.block_modules, made.outer_modules) == (4, 4)


def test_rates_of_ranks_that_take_turns_are_those_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes 1 ms, and every tenth one 9 more: a turn of somebody else's."""
    clock = itertools.count(1)
    passed = [0.0]

    def call() -> None:
        passed[0] += 0.010 if next(clock) % 10 == 0 else 0.001

    monkeypatch.setattr(rates.time, "perf_counter", lambda: passed[0])
    assert rates._fastest(call) == pytest.approx(0.001)
    monkeypatch.setattr(rates, "_take_turns", lambda: True)
    assert rates._fastest(call) == pytest.approx(0.0019)


def test_zero_divides_states_and_tensor_parallelism_matrices() -> None:
    cluster = read_cluster(CLUSTER)
    plans = {stage: evaluate(LLAMA_70B, cluster, Layout(pp=1, dp=8, stage=stage)) for stage in range(4)}
    params = LLAMA_70B.num_params
    assert plans[0].memory["optimizer states"] == 12 * params
    assert plans[1].memory["optimizer states"] == 12 * params / 8
    assert plans[2].memory["gradients"] == 2 * params / 8
    assert plans[3].memory["parameters"] == 2 * params / 8
    assert rank_params(LLAMA_70B, Layout(tp=8), 80) < params / 6
    assert plans[0].traffic["reduce"] == 2 * plans[1].traffic["reduce"] == 2 * plans[1].traffic["gather"]
    assert all(layout.tp <= 8 for layout in layouts(LLAMA_70B, cluster, 4096))


@pytest.mark.parametrize(
    ("cluster", "batch", "words"),
    [
        ({**CLUSTER, "device": {"memory_gb": 0.5, "tflops": 1}}, 4096, "nothing fits 0.5 GB per device"),
        (
            {"device": {"memory_gb": 80, "tflops": 1}, "nodes": 97, "devices_per_node": 1},
            3,
            "no layout divides a batch of 3",
        ),
        ({"nodes": 2}, 1, 'the cluster has no "device"'),
        ({**CLUSTER, "nodes": [{"devices": 8}, {"devices": 4}]}, 1, "nodes is a list, and takes one number: all nodes"),
        ({"device": {"memory_gb": {"a": 80, "b": 40}, "tflops": 1}}, 1, "device.memory_gb is an object, and takes one"),
        ({**CLUSTER, "nodez": 2}, 1, "nodez is not a key.\n  Did you mean nodes?"),
        ({**CLUSTER, "nodes": 1e12}, 1, "nodes = 1000000000000.0 is not a whole number from 1 to 1,048,576"),
        ({**CLUSTER, "nodes": 0}, 1, "nodes = 0 is not a whole number from 1 to"),
        ({"device": {"memory_gb": 80, "tflops": 0}}, 1, "device.tflops = 0 is not a number, above 0"),
        ({**CLUSTER, "links": {"between_gb_s": 0}}, 1, "links.between_gb_s = 0 is not a number, above 0"),
        (
            {**CLUSTER, "price_per_device_hour": float("nan")},
            1,
            "price_per_device_hour = nan is not a number, at least 0",
        ),
        ({**CLUSTER, "processors": 0}, 1, "processors = 0 is not a whole number from 1 to"),
        ({**CLUSTER, "device": {"memory_gb": 80}}, 1, "device.tflops is missing"),
    ],
)
def test_what_cannot_be_planned_says_why(cluster: dict[str, Any], batch: int, words: str) -> None:
    with pytest.raises(DeepSpeedError) as caught:
        plan_cluster(LLAMA_70B, read_cluster(cluster), batch)
    assert words in str(caught.value)


def test_a_layout_of_ones_own_that_does_not_fit_says_so() -> None:
    cluster = read_cluster({**CLUSTER, "host": {"memory_gb": 1000}})
    assert evaluate(LLAMA_70B, cluster, Layout(dp=4096, stage=3, recompute=True)).fits(cluster)
    assert not evaluate(LLAMA_70B, cluster, Layout(dp=4096, recompute=True)).fits(cluster)
    states = [Layout(tp=8, dp=ranks, stage=1, offload=True, recompute=True) for ranks in (2, 8)]
    assert [evaluate(LLAMA_70B, cluster, layout).fits(cluster) for layout in states] == [True, True]
    small = read_cluster({**CLUSTER, "host": {"memory_gb": 1}})
    assert not evaluate(LLAMA_70B, small, states[0]).fits(small), "states have no room on the hosts"


def test_figures_are_in_units_that_show_them() -> None:
    assert [figures.count(n) for n in (70.55e9, 3_670_016, 512)] == ["70.55B", "3.67M", "512"]
    assert [figures.nbytes(n) for n in (40.4e9, 6.03e6, 12)] == ["40.4 GB", "6.0 MB", "12 B"]
    assert [figures.seconds(n) for n in (5.71, 0.0852, 12e-6)] == ["5.71 s", "85.2 ms", "12.0 us"]
    assert [figures.many(n, "node") for n in (1, 4096)] == ["1 node", "4,096 nodes"]


def test_states_go_to_the_hosts_where_nothing_fits_without() -> None:
    small = {**CLUSTER, "nodes": 1, "host": {"memory_gb": 2000, "link_gb_s": 25}}
    answer = plan_cluster(LLAMA_70B, read_cluster(small), 64)
    assert all(plan.layout.offload and plan.host_nbytes > 0 for plan in answer.plans)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_number_that_fits_is_found(most: int) -> None:
    assert largest.largest(lambda number: number <= most) == most


def test_beyond_what_is_asked_about_the_largest_number_is_the_last() -> None:
    assert largest.largest(lambda number: True) == largest.MOST


@pytest.mark.parametrize("base", [0, 5, 700])
@pytest.mark.parametrize("bend", [0.0, 3.0, -20.0])
def test_the_deepest_model_that_fits_is_found_on_few_depths(base: int, bend: float) -> None:
    """Bytes that grow nearly by the same with each layer, as where allocators round."""

    def needs(layers: int) -> int:
        looked.add(layers)
        return int(base + 50 * layers + bend * math.sqrt(layers))

    for room in (0, 51, 100, 777, 1234, 3000, 4799, 5000, 40_000):
        looked: set[int] = set()
        found, is_exact = deepest_below(room, needs, 96)
        truth = max((n for n in range(2000) if n and needs(n) <= room), default=0)
        assert found == truth if is_exact else abs(found - truth) < 0.02 * truth
        assert is_exact == (truth < 96)
        looked.clear()
        deepest_below(room, needs, 96)
        assert len(looked) <= 9


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
              "max_position_embeddings": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "cluster.json").write_text(json.dumps({**CLUSTER, "nodes": 2, "devices_per_node": 2}))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "activation_checkpointing": {"recompute": "full"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_commands_answer(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, html = str(llama / "cluster.json"), llama / "plan.html"
    assert (
        runner.main(["plan", str(llama), "--cluster", cluster, "-b", "16", "-s", "64", "--html", str(html), "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["num_devices"] == 4 and said["plans"][0]["device_nbytes"] < 80e9
    page = html.read_text()
    assert "<svg" in page and "Where ranks lie" in page and "src=" not in page
    assert runner.main(["plan", str(llama), "--cluster", cluster, "-s", "64", "--layout", "pp2 dp2 zero1 2x4"]) == 0
    said_text = capsys.readouterr().out
    assert "pp2 dp2 zero1 2x4" in said_text and "within the memory of a device: 1" in said_text
    assert runner.main(["plan", str(llama), "--cluster", cluster, "-s", "64", "--layout", "dp3 zero1 2x4"]) == 2
    assert "pp x dp x sp x tp = 3, and the cluster has 4 devices" in capsys.readouterr().err
    for key, value, words in (
        ("--dtype", "int8", "--dtype int8: models train in floating-point numbers."),
        ("--layout", "", "pp x dp x sp x tp = 1, and the cluster has 4 devices"),
        ("--layout", "dp4 ep2", "LlamaForCausalLM has no experts to spread."),
        ("--layout", "pp4", "pp4: LlamaForCausalLM has 2 blocks in 1 list(s), which make at most 2 stage(s)"),
        ("--layout", "dp4 0x2", "0x2 has a 0"),
        ("--layout", "dp2 dp4", "dp4 says again what another word does"),
        ("--layout", "dp4 zero1 zero2", "zero2 says again"),
        ("--layout", "dp4 1x2x3", "'1x2x3' is no part of a layout"),
    ):
        assert runner.main(["plan", str(llama), "--cluster", cluster, "-s", "64", key, value]) == 2
        assert words in capsys.readouterr().err

    ds = str(llama / "ds.json")
    assert (
        runner.main(["doctor", str(llama), "-c", ds, "-n", "4", "-s", "64", "--cluster", cluster, "--device", "cpu"])
        == 0
    )
    said_text = capsys.readouterr().out
    assert "The one change that helps most: " in said_text and "A step is predicted to take" in said_text

    low = json.loads((llama / "ds.json").read_text()) | {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}
    }
    (llama / "low.json").write_text(json.dumps(low))  # which needs ZeRO
    asked = ["doctor", str(llama), "-c", str(llama / "low.json"), "-n", "4", "-s", "64", "--cluster", cluster]
    assert runner.main([*asked, "--device", "cpu"]) == 0
    capsys.readouterr()

    room = str(64 / 1024)
    assert runner.main(["max-batch", str(llama), "-c", ds, "-s", "64", "-m", room, "--device", "cpu"]) == 0
    size = int(capsys.readouterr().out.split("train_micro_batch_size_per_gpu: ")[1].split()[0])
    assert size > 4
    assert runner.main(["max-batch", str(llama), "-c", ds, "-s", "64", "-m", "0.0001", "--device", "cpu"]) == 1
    capsys.readouterr()
    assert runner.main(["max-model", str(llama), "-c", ds, "-s", "64", "-m", str(6 / 1024), "--device", "cpu"]) == 0
    assert int(capsys.readouterr().out.split("num_hidden_layers: ")[1].split()[0]) > 4


NUMBERS = [
    *(("plan", flag) for flag in ("--batch", "--seq", "--top", "--tokens")),
    *(("doctor", flag) for flag in ("--ranks", "--seq", "--device-memory")),
    *(("estimate", flag) for flag in ("--ranks", "--batch", "--seq", "--device-memory", "--host-memory")),
    *(("max-batch", flag) for flag in ("--ranks", "--seq", "--device-memory")),
    *(("max-model", flag) for flag in ("--ranks", "--batch", "--seq", "--device-memory")),
]


@pytest.mark.parametrize(("command", "flag"), NUMBERS)
def test_a_number_that_an_argument_cannot_mean_is_told_with_its_rule(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "a finite number above 0" if flag in ("--tokens", "--device-memory", "--host-memory") else "a whole number"
    for value in ("0", "-3", "nan", "inf", "many"):
        with pytest.raises(SystemExit):
            runner.main([command, "model", f"{flag}={value}"])
        said = capsys.readouterr().err
        assert flag in said and f"{value} is not {rule}" in said


def test_rates_and_a_model_s_seconds_are_measured_by_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "MEASURED_BY", "tests.planner.short_machine")
    found = measure(torch.float32, 2, model=Asked(write_model(tmp_path, 0.01), 2, 8))
    alone, both = measure(torch.float32, 1).rates, found.rates
    assert found.clocked is not None, found.why
    assert found.clocked.forward_sample_s > 0.005, "10 ms a sample, which its few operations do not tell"
    assert alone.wire_nbytes_s == 0
    assert both.wire_nbytes_s > 1e6
    assert both.wire_latency_s > 0
    assert both.matmul_flops > 0


def test_ranks_that_cannot_be_started_to_measure_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 3, "", "no device 7")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(DeepSpeedError, match="8 ranks could not be started") as caught:
        measure(torch.float32, 8)
    assert "no device 7" in str(caught.value)
    assert "--cluster FILE" in str(caught.value)


def test_messages_hide_behind_backward_as_far_as_the_links_let_them() -> None:
    link = {"within_gb_s": 10, "between_gb_s": 10, "latency_us": 0}
    some, none = (read_cluster({**CLUSTER, "links": {**link, "overlap": share}}) for share in (0.8, 0))
    for stage in range(4):
        layout = Layout(dp=8, stage=stage, micro=1, accumulation=1)
        hidden, seen = evaluate(LLAMA_70B, some, layout), evaluate(LLAMA_70B, none, layout)
        sent = (seen.traffic["gather"] + seen.traffic["reduce"]) / 10e9
        assert seen.exposed_s == pytest.approx(sent)
        assert seen.exposed_s > hidden.exposed_s
    with pytest.raises(DeepSpeedError, match="overlap = 2 is no share"):
        read_cluster({**CLUSTER, "links": {"overlap": 2}})


def test_recomputation_sends_again_what_its_layers_send_once() -> None:
    """With devices that compute in no time a micro-batch is its messages: four of a block, five where its forward is made twice."""
    instant = read_cluster({**CLUSTER, "device": {"memory_gb": 80, "tflops": 1e9, "memory_gb_s": 1e12}})
    kept, again = (evaluate(LLAMA_70B, instant, Layout(tp=8, recompute=recompute)) for recompute in (False, True))
    assert again.compute_s == pytest.approx(kept.compute_s * 5 / 4, rel=1e-3)


def test_ranks_on_cpus_wait_for_each_others_layers_as_their_links_say() -> None:
    layout = Layout(tp=4, recompute=True)
    plain, priced, waiting = (
        evaluate(LLAMA_70B, read_cluster({**CLUSTER, "links": {**CLUSTER["links"], **more}}), layout).compute_s
        for more in ({}, {"inside_us": 1008}, {"inside_us": 1008, "wait": 0.25})
    )
    assert priced - plain == pytest.approx(80 * 5 * 2 * 1000e-6), "each takes two steps of four ranks"
    silent = replace(LLAMA_70B, inside={name: Inside() for name in LLAMA_70B.inside})
    computed = evaluate(silent, read_cluster(CLUSTER), layout).compute_s
    assert waiting - priced == pytest.approx(0.25 * computed, rel=0.05), "what gradients cost besides is in no wait"
