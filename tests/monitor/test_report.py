"""The report: what is drawn is what was recorded, and a browser without network draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

from deepspeed.monitor.report import main, page, summarize, thin
from deepspeed.monitor.run_record import RunRecord, RunWriter
from deepspeed.monitor.top import Tail, screen, sparkline
from deepspeed.monitor.top import main as top_main

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()


def write_run(folder: Path, steps: int = 30, name: str = "Gpt") -> None:
    writer = RunWriter(folder)
    writer.add("start", model=name, params=1000, zero_stage=2, ranks=2, dtype="fp32", time=1.7e9)
    for step in range(1, steps + 1):
        writer.add(
            "step", step=step, step_s=0.1, loss=3 - step / 100, lr=[1e-3], grad_norm=1.0, tokens_per_s=100.0 + step,
            mfu=0.4, forward_s=0.02, backward_s=0.05, update_s=0.02, wait_comm_s=0.01, wait_offload_s=0.0,
            memory={"device": 10**9, "device_peak": 2 * 10**9}, comm_nbytes={"zero.all_gather": 4000}, flops=1e9,
            step_tokens=64, step_samples=4, peak_flops=1e11, time=1.7e9 + step,
        )  # fmt: skip
    line = {"count": 30, "avg_latency_ms": 2.0, "waited_ms": 20.0, "hidden": 0.66, "tput_avg_gbps": 1.0,
            "busbw_avg_gbps": 0.5, "msg_size_bytes": 4000}  # fmt: skip
    writer.add("comm", step=steps, hidden=0.66, ops={"zero.all_gather": {"4000": line}})
    writer.close()


def data_of(html: str) -> list[dict]:
    found = re.search(r"const runs = (\[.*\]);\n", html)
    assert found
    return json.loads(found[1])


def test_the_page_holds_the_recorded_values_and_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    html = (tmp_path / "run" / "report.html").read_text()
    (run,) = data_of(html)
    assert run["series"]["loss"]["y"] == pytest.approx([3 - step / 100 for step in range(1, 31)])
    assert [stack["name"] for stack in run["stacks"]["time"]] == [
        "forward",
        "backward",
        "update",
        "data and the script",
    ]
    assert run["stacks"]["time"][3]["y"][0] == pytest.approx(0.01)
    assert run["stacks"]["comm"] == [{"name": "all_gather", "x": list(range(1, 31)), "y": [4000.0] * 30}]
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", html)


def test_names_and_texts_of_a_record_cannot_leave_the_data(tmp_path: Path) -> None:
    record = RunRecord("</script><b>", start={"model": "</script><img>"}, steps=[{"step": 1, "loss": 1.0}])
    html = page([record])
    assert html.count("</script>") == 1
    assert data_of(html)[0]["start"]["model"] == "</script><img>"


def test_a_long_series_is_thinned_to_means_with_their_range() -> None:
    assert thin([(1, 1.0), (2, 3.0), (3, float("nan"))], 10) == {"x": [1, 2, 3], "y": [1.0, 3.0, None]}
    assert thin([(i, float(i)) for i in range(5)], 2) == {
        "x": [2, 4], "y": [1.0, 3.5], "low": [0.0, 3.0], "high": [2.0, 4.0],
    }  # fmt: skip
    assert len(thin([(i, 0.0) for i in range(100_001)])["x"]) <= 600


def test_a_step_that_overflowed_leaves_no_hole_in_a_thinned_series() -> None:
    norms = [1.0, float("inf"), 3.0, float("nan"), float("nan"), float("nan"), 5.0, 7.0]
    assert thin(list(enumerate(norms)), 3) == {
        "x": [2, 5, 7], "y": [2.0, None, 6.0], "low": [1.0, None, 5.0], "high": [3.0, None, 7.0],
    }  # fmt: skip


def test_a_run_that_diverged_says_so() -> None:
    losses = [1.0] * 20 + [float("nan")]
    assert summarize(RunRecord("r", steps=[{"step": i, "loss": loss} for i, loss in enumerate(losses)]))["is_lost"]
    assert not summarize(RunRecord("r", steps=[{"step": 1, "loss": 1.0}]))["is_lost"]


def test_rates_leave_the_warm_up_out() -> None:
    steps = [{"step": i, "step_s": 9.0 if i < 3 else 0.5, "loss": 1.0, "wait_comm_s": 0.1} for i in range(1, 31)]
    summary = summarize(RunRecord("r", steps=steps))
    assert (summary["step_s"], summary["wait_comm"], summary["loss"], summary["mfu"]) == (0.5, 0.2, 1.0, None)


def test_what_cannot_be_reported_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunWriter(tmp_path).add("start")
    assert main([str(tmp_path)]) == 2
    assert "no step is recorded yet" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert top_main([str(tmp_path / "nowhere")]) == 2
    assert "deepspeed top: " in capsys.readouterr().err


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_browser_draws_every_chart(tmp_path: Path, num_runs: int) -> None:
    for i in range(num_runs):
        write_run(tmp_path / "runs" / f"run{i}", steps=200)
    assert main([str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    picture = tmp_path / "report.png"
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/report.html"], capture_output=True, text=True, timeout=60)
    drawn = re.search(r'data-drawn="(\d+)"', done.stdout)
    assert drawn, done.stderr[-2000:]
    assert int(drawn[1]) >= 12 * num_runs
    assert "Uncaught" not in done.stderr
    titles = re.findall(r"<h2>(.*?)</h2>", done.stdout)
    assert {"Loss", "Throughput", "Utilisation", "Waiting", "Communication", "Gradient norm", "Learning rate"} <= set(
        titles
    )
    shot = [arg for arg in command if arg != "--dump-dom"] + [f"--screenshot={picture}", "--window-size=1280,1800"]
    subprocess.run([*shot, f"file://{tmp_path}/report.html"], capture_output=True, timeout=60)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_top_shows_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "mine")
    assert top_main([str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "deepspeed top: mine",
        "Gpt, 1k parameters, ZeRO-2 over 2 ranks",
        "2.7000",
        "640",
        "MFU 10.0%",
        "10%",
    ):
        assert words in shown


def test_top_reads_only_whole_lines_and_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [f'{{"kind":"step","step":{step}}}\n'.encode() for step in (1, 2, 3)]
    path.write_bytes(lines[0] + lines[1][:9])
    tail = Tail(path)

    def seen() -> list[int]:
        return [step["step"] for step in tail.read().steps]

    assert seen() == [1]
    with path.open("ab") as file:
        file.write(lines[1][9:] + lines[2])
    with patch.object(json, "loads", wraps=json.loads) as parsed:
        assert seen() == [1, 2, 3]
    assert parsed.call_count == 2
    path.write_bytes(lines[1])
    assert seen() == [2]
    assert screen(RunRecord("r"), 80, 0.0) is not None


def test_a_sparkline_goes_up_and_down() -> None:
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([], 5) == ""
    assert sparkline([3, 3], 5) == "▁▁"
    assert sparkline([0, float("inf"), float("nan"), 7], 10) == "▁  █"
