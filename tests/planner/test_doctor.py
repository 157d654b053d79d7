"""The doctor clocks the model where it measures the machine, and draws what it found."""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from deepspeed.planner import doctor
from deepspeed.planner.cost import Parts
from deepspeed.planner.diagnosis import Diagnosis, Finding
from deepspeed.planner.doctor_page import page
from tests.monitor.test_report import BROWSER, FLAGS

MODEL = """
    import torch

    class Slow(torch.nn.Module):
        '''Takes {seconds} s of a processor for a sample, forward.'''

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)
            self.register_buffer("scale", torch.rand(8))

        def forward(self, x, y):
            out = self.layer(x * self.scale)
            if not isinstance(x, torch._subclasses.FakeTensor) and x.device.type != "meta":
                import time
                end = time.thread_time() + {seconds} * len(x)
                while time.thread_time() < end:
                    pass
                if {seconds} == 0:
                    raise ValueError("no samples today")
            return (out - y).square().mean()

    def make():
        return Slow(), (torch.zeros(2, 8, device="meta"), torch.zeros(2, 8, device="meta"))
"""

DS = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam"},
    "activation_checkpointing": {"recompute": "full"},
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "ds.json").write_text(json.dumps(DS))
    return tmp_path


def write_model(folder: Path, seconds: float) -> str:
    (folder / "slow.py").write_text(textwrap.dedent(MODEL).format(seconds=seconds))
    return f"{folder / 'slow.py'}:make"


def test_a_model_that_takes_long_is_told_from_its_operations(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([write_model(made, 0.02), "-c", str(made / "ds.json")]) == 0
    said = capsys.readouterr().out
    assert "The model's forward and backward were clocked here." in said
    milliseconds = float(re.search(r"A step is predicted to take ([\d.]+) ms", said)[1])  # type: ignore[index]
    assert milliseconds > 40, "two samples of 20 ms, whatever their few operations say"


def test_a_model_that_cannot_be_clocked_is_predicted_from_operations_and_it_is_said(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([write_model(made, 0), "-c", str(made / "ds.json")]) == 0
    said = capsys.readouterr()
    assert "operations over rates; the model was not clocked" in said.out
    assert "the model could not be clocked (ValueError: no samples today)" in said.err


def test_a_page_that_cannot_be_written_is_an_error_with_words(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "file").write_text("")
    where = made / "file" / "page.html"
    assert doctor.main([write_model(made, 0.001), "-c", str(made / "ds.json"), "--html", str(where)]) == 2
    assert "Name a file that can be written after --html." in capsys.readouterr().err


def test_a_change_is_not_given_what_its_micro_batch_alone_gains(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where calls are all there is to gain, larger micro-batches gain it, at every stage."""
    device = {"memory_gb": 8, "tflops": 1000, "memory_gb_s": 1e6}
    (made / "cluster.json").write_text(json.dumps({"devices_per_node": 2, "device": device}))
    (made / "ds.json").write_text(json.dumps({**DS, "activation_checkpointing": {"recompute": "none"}}))
    arguments = [write_model(made, 0.001), "-c", str(made / "ds.json"), "-n", "2", "--device", "cpu"]
    assert doctor.main([*arguments, "--cluster", str(made / "cluster.json")]) == 0
    said = capsys.readouterr().out
    assert "The one change that helps most: micro-batch 16" in said
    assert "ZeRO stage" not in said


def diagnosis() -> Diagnosis:
    parts = Parts(compute=0.3, again=0.1, calls=0.03, gather=0.05, reduce=0.05, update=0.01, hidden=0.04)
    finding = Finding(
        "no recomputation, micro-batch 8 <", {"activation_checkpointing.recompute": "none"}, 0.43, 350 << 20
    )
    return Diagnosis(parts, 4.5, 110 << 20, True, 1 << 30, [finding], ["a.key has no effect here"], is_clocked=True)


def test_the_page_tells_what_the_text_tells() -> None:
    text = page(diagnosis(), "llama/", "ds.json", 2)
    for words in ("500.0 ms", "4.5", "+43%", "activation_checkpointing.recompute: &quot;none&quot;", "micro-batch 8 &lt;",
                  "a.key has no effect here", "were clocked here", "recomputation 100.0 ms", "2 ranks"):  # fmt: skip
        assert words in text, words
    shares = [float(share) for share in re.findall(r"<i style=\"width:([\d.]+)%;background:#[^\"]*\" title", text)]
    assert abs(sum(shares) - 100) < 0.1, "the bar of a step's parts is full"
    assert "nothing" in page(Diagnosis(diagnosis().parts, 4.5, 1, False, 1, [], []), "m", "c", 1)


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on this machine")
def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(diagnosis(), "llama/", "ds.json", 2))
    picture = tmp_path / "page.png"
    shot = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=1280,900",
    ]
    subprocess.run([*shot, f"file://{tmp_path}/page.html"], capture_output=True, timeout=60)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
