"""Profiles of models: whose operations they are, parameters, times, texts, files, the contract's calls."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.profiling.counter import Phase
from deepspeed.profiling.profiler import FlopsProfiler, get_model_profile
from deepspeed.profiling.tree import ModuleProfile
from tests.monitor.test_report import BROWSER, FLAGS
from tests.profiling.test_counter import FORWARD, SCORES, B, C, L, Recomputed, T, V, gpt, tokens


def profile_of(model: nn.Module, *inputs: Any, backward: bool = True) -> FlopsProfiler:
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    out = model(*inputs)
    if backward:
        out.sum().backward()
    profiler.stop_profile()
    return profiler


def by_path(root: ModuleProfile) -> dict[str, ModuleProfile]:
    return {module.path: module for module in root.walk()}


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "checkpointed_reentrant"])
def test_every_module_gets_its_own_operations_forward_and_backward(kind: str) -> None:
    model, x = gpt(), tokens()
    if kind != "plain":
        model.blocks = nn.ModuleList(Recomputed(block, "reentrant" in kind) for block in model.blocks)
    modules = by_path(profile_of(model, x, x).profile.root)
    inner = "" if kind == "plain" else ".inner"
    for i in range(L):
        block = f"blocks.{i}{inner}"
        for name, size in (("attention.qkv", 3), ("attention.proj", 1), ("expand", 4), ("shrink", 4)):
            module = modules[f"{block}.{name}"]
            assert module.own[Phase.FORWARD] == 2 * B * T * size * C * C, name
            assert module.own[Phase.BACKWARD] == 2 * module.own[Phase.FORWARD], name
            assert module.num_calls == 1
        attention = modules[f"{block}.attention"]
        assert attention.own[Phase.FORWARD] == 2 * SCORES // L
        assert attention.own[Phase.BACKWARD] == 4 * SCORES // L
        assert attention.own[Phase.RECOMPUTE] == SCORES // L * (1 if kind == "plain" else 3)
        assert modules[block].own == dict.fromkeys(Phase, 0)
    root = modules[""]
    assert (root.flops, root.macs, root.total(Phase.BACKWARD)) == (FORWARD, FORWARD // 2, 2 * FORWARD)
    assert modules["head"].own[Phase.FORWARD] == 2 * B * T * V * C


def test_shared_weights_count_once_and_shared_modules_as_often_as_they_run() -> None:
    shared = nn.Linear(8, 8, bias=False)
    twin = nn.Linear(8, 8, bias=False)
    twin.weight = shared.weight
    root = profile_of(nn.Sequential(shared, shared, twin), torch.randn(5, 8)).profile.root
    assert root.all_params == 64
    assert root.flops == 3 * 2 * 5 * 64
    assert [(m.num_calls, m.params, m.flops) for m in root.children] == [(2, 64, 2 * 640), (1, 0, 640)]
    assert gpt(tied=True).head.weight is not None
    assert profile_of(gpt(tied=True), tokens()).get_total_params() == sum(
        p.numel() for p in gpt(tied=True).parameters()
    )


class Experts(nn.Module):
    """Each token goes to the best 2 of 4 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).topk(2).indices
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).any(-1).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class Stacked(nn.Module):
    """The same with all experts in one parameter, as batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = StackedExperts()

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return self.experts(x[: 4 * 5].view(4, 5, 8))  # 10 tokens, 2 experts each: 5 rows per expert


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


def test_of_experts_a_token_meets_the_chosen_ones() -> None:
    torch.manual_seed(0)
    root = profile_of(Experts(), torch.randn(50, 8)).profile.root
    assert root.all_params == 4 * 8 + 4 * 64
    assert root.all_active_params == pytest.approx(4 * 8 + 2 * 64)
    assert root.flops == 2 * 50 * (4 * 8 + 2 * 64)


def test_of_stacked_experts_too() -> None:
    model = Stacked()
    torch.nn.init.zeros_(model.gate.weight)
    root = profile_of(model, torch.randn(20, 8)).profile.root
    assert root.all_params == 32 + 256
    assert root.all_active_params == pytest.approx(32 + 64)


def test_layers_in_a_list_are_no_experts() -> None:
    assert profile_of(gpt(), tokens()).profile.root.all_active_params == sum(p.numel() for p in gpt().parameters())


def test_nothing_stays_on_the_model_and_a_profile_starts_anew() -> None:
    model, x = gpt(), tokens()
    profiler = profile_of(model, x)
    assert profiler.get_total_flops() == FORWARD
    model(x)  # not counted
    assert profiler.get_total_flops() == FORWARD
    profiler.start_profile()
    model(x), model(x)
    profiler.stop_profile()
    assert profiler.get_total_flops() == 2 * FORWARD
    profiler.reset_profile()
    profiler.stop_profile()
    assert profiler.get_total_flops() == 0
    profiler.end_profile()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"no numbers[\s\S]*start_profile"):
        profiler.get_total_flops()


def test_an_exception_in_the_model_leaves_the_stack_whole() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.linear = Fails(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fails(x)
            except RuntimeError:
                return self.linear(x)

    modules = by_path(profile_of(Model(), torch.randn(3, 4)).profile.root)
    assert modules["linear"].own[Phase.FORWARD] == 2 * 3 * 16
    assert modules["linear"].own[Phase.BACKWARD] == 2 * 3 * 16  # the input needs no gradient


def test_the_contracts_function_returns_flops_macs_and_params(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    flops, macs, params = get_model_profile(model, input_shape=(2, 3, 8, 8), as_string=False, print_profile=False)
    expected = 2 * (2 * 4 * 36 * 27 + 2 * 144 * 10)
    assert (flops, macs, params) == (expected, expected // 2, sum(p.numel() for p in model.parameters()))
    assert capsys.readouterr().out == ""
    assert not model.training
    strings = deepspeed.profiling.flops_profiler.get_model_profile(model, (2, 3, 8, 8), top_modules=2, module_depth=1)
    assert strings == ("21.31 KFLOPs", "10.66 KMACs", "1.562 K")
    text = capsys.readouterr().out
    for words in ("operations of forward:", "depth 1:", "(0) Conv2d(3, 4,", "utilisation in forward"):
        assert words in text
    assert get_model_profile(gpt(), args=[tokens()], as_string=False, print_profile=False)[0] == FORWARD
    assert get_model_profile(gpt(), kwargs={"x": tokens()}, as_string=False, print_profile=False)[0] == FORWARD


def test_generate_is_profiled_on_demand() -> None:
    prompt = tokens()[:, :1]
    kwargs = {"prompt": prompt, "num_tokens": 3}
    flops, _, _ = get_model_profile(gpt(), kwargs=kwargs, mode="generate", as_string=False, print_profile=False)
    per_token = 2 * B * (12 * L * C * C + V * C)
    assert flops == sum(per_token * n + 4 * B * n * n * C * L for n in (1, 2, 3))


def test_modules_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Conv1d(1, 1, 1)))
    flops, _, params = get_model_profile(
        model, (1, 8), ignore_modules=[nn.Conv1d], as_string=False, print_profile=False
    )
    assert (flops, params) == (2 * 64, 72)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "no input"),
        ({"input_shape": 5}, "not a tuple of sizes"),
        ({"input_shape": (1, 8), "mode": "train"}, '"forward" or "generate"'),
        ({"model": 3, "input_shape": (1,)}, "not an nn.Module"),
    ],
)
def test_bad_arguments_say_what_is_wrong(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        get_model_profile(**{"model": nn.Linear(8, 8), **kwargs})


class Sleeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return x * 1.0


def test_times_are_those_of_the_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Sleeps(), nn.Sequential(Sleeps(), nn.Linear(4, 4)))
    root = profile_of(model, torch.randn(2, 4)).profile.root
    assert root.forward_s >= 0.06
    assert root.children[1].forward_s >= 0.03
    assert root.children[2].forward_s >= root.children[2].children[0].forward_s >= 0.03
    assert root.children[0].forward_s < 0.03


def test_files_are_written_as_text_json_and_a_flame_chart(tmp_path: Path) -> None:
    profiler = profile_of(gpt(), tokens(), tokens())
    profiler.print_model_profile(output_file=tmp_path / "deep" / "profile.txt")
    text = (tmp_path / "deep" / "profile.txt").read_text()
    assert "Gpt, step 1" in text
    data = json.loads((tmp_path / "deep" / "profile.json").read_text())
    assert data["model"]["flops"] == {"forward": FORWARD, "backward": 2 * FORWARD, "recompute": SCORES, "update": 0}
    assert data["step_flops"] == 3 * FORWARD + SCORES
    html = (tmp_path / "deep" / "profile.html").read_text()
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(|https?://", html)
    if not BROWSER:
        pytest.skip("no chromium or google-chrome on this machine")
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--dump-dom"]
    page = f"file://{tmp_path}/deep/profile.html"
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=60)
    bars = re.search(r'data-drawn="(\d+)"', done.stdout)
    assert bars, done.stderr[-2000:]
    assert int(bars[1]) == 1 + 1 + L + 3 * L + 2 * L + 1  # model, list, blocks, what multiplies in them, head
    shutil.rmtree(tmp_path / "browser", ignore_errors=True)


def test_without_a_backward_the_step_is_estimated() -> None:
    model, x = gpt(), tokens()
    profiler = FlopsProfiler(model, recompute_fwd_factor=1.0)
    profiler.start_profile()
    model(x)
    profiler.stop_profile()
    assert profiler.profile.step_flops == 4 * FORWARD
