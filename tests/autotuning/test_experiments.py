"""Searches with real processes, of a script that only pretends to train: crashes, hangs, kills, and what is left of them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspeed.autotuning import experiment
from deepspeed.autotuning.stopped import Stopped, postponed
from deepspeed.launcher import runner
from deepspeed.utils.errors import DeepSpeedError

PRETENDER = Path(__file__).parent / "pretender.py"
SECTION = {"enabled": True, "max_train_micro_batch_size_per_gpu": 32, "trial_timeout": 60}


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def config_file(tmp_path: Path, section: dict[str, Any] | None = None, **config: Any) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**config, "autotuning": {**SECTION, **(section or {})}}))
    return str(path)


def tune(config: str, *arguments: str, ranks: int = 1, word: str = "tune") -> int:
    flags = ["--num_gpus", str(ranks), "--autotuning", word, "--log_level", "error", "--grace_period", "1"]
    return runner.main([*flags, str(PRETENDER), *arguments, "--deepspeed_config", config])


def alive(log: Path) -> list[int]:
    """Processes of trials that still run: neither those that wait to be reaped, nor others that were given an old number."""
    found = []
    for line in log.read_text().splitlines():
        process = Path("/proc", line.split()[1])
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and str(log).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def test_a_search_in_which_trials_crash_hang_and_are_killed_finds_the_best_and_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "trials.log"
    crashing = [f"z{stage}_gas1_tmbspg{m}" for stage in (0, 3) for m in (2, 8, 16)]
    began_s = time.monotonic()
    misbehaving = ["--log", str(log), "--crash", *crashing, "--hang", "z1_gas1_tmbspg16", "--kill", "z2_gas1_tmbspg16"]
    assert (
        tune(
            config_file(
                tmp_path,
                {"tuner_early_stopping": 20, "trial_timeout": 15},
                train_micro_batch_size_per_gpu=[2, 8, 16, 32],
            ),
            *misbehaving,
        )
        == 0
    )
    assert time.monotonic() - began_s < 200, "the one that hangs would take 600"
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    assert (best["zero_optimization"]["stage"], best["train_micro_batch_size_per_gpu"]) == (2, 8)
    assert "autotuning" not in best
    state = json.loads((tmp_path / "autotuning_results/state.json").read_text())
    assert {"failed", "measured"} <= {done["state"] for done in state["outcomes"].values()}
    assert not [name for name in state["outcomes"] if name.endswith("tmbspg32")], "they are predicted not to fit"
    assert not alive(log)
    summary = (tmp_path / "autotuning_results/summary.txt").read_text()
    assert "| z2 " in summary and "| global " in summary and "Tuning took" in summary
    page = (tmp_path / "autotuning_results/report.html").read_text()
    assert "z2_gas1_tmbspg8" in page and "does not fit" in page.replace("too large", "does not fit")
    for name in ("cmd.txt", "exp.json", "ds_config.json", "metrics.json", "stdout.log", "stderr.log"):
        assert (tmp_path / "autotuning_results/z2_gas1_tmbspg8" / name).is_file()
    assert (tmp_path / "autotuning_exps/z2_gas1_tmbspg8.json").is_file()
    assert "z2_gas1_tmbspg8" not in (tmp_path / "autotuning_results/cmd_optimal.txt").read_text()


LEAVES = """
import subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN if %r else signal.SIG_DFL); print(flush=True); time.sleep(600)"
left = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
left.stdout.readline()
open(sys.argv[1], "w").write(str(left.pid))
"""


@pytest.mark.parametrize("is_deaf", [False, True])
def test_what_a_trial_left_in_a_session_of_its_own_is_ended(
    tmp_path: Path, is_deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "end_marked", functools.partial(experiment.end_marked, grace_s=0.5))
    said = tmp_path / "pid"
    command = [sys.executable, "-c", LEAVES % is_deaf, str(said)]
    ended = experiment.run(command, tmp_path, tmp_path / "metrics.json", experiment.Limits(60, 60), dict(os.environ))
    assert ended.code == 0
    left = Path("/proc", said.read_text())
    assert not left.exists() or (left / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_each_metric_has_its_own_best_and_run_trains_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"zero_optimization": {"stage": [1, 2]}, "train_micro_batch_size_per_gpu": [2, 8]}
    metrics = {"metric": "latency", "tuner_type": "gridsearch", "overwrite": True, "model_info": {"num_params": 5}}
    assert tune(config_file(tmp_path, metrics, **stages)) == 0
    assert "model_info is not taken over" in capsys.readouterr().out
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    assert (best["zero_optimization"]["stage"], best["train_micro_batch_size_per_gpu"]) == (2, 2)
    # `run` starts the script with the result; the pretender needs a section, and without one ends badly.
    code = tune(config_file(tmp_path, {**metrics, "metric": "flops"}, **stages), word="run")
    assert code != 0
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] == 8


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """Programs that a shell starts in the background ignore SIGINT, and so do those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_that_something_dropped_ends_the_search_before_the_next_trial() -> None:
    with Stopped() as stopped:
        stopped.check()
        with contextlib.suppress(KeyboardInterrupt):  # as the import of a C extension does
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stopped.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("slow", ["z2_gas1_tmbspg8", ""])
def test_a_trial_that_is_slower_than_others_explain_is_run_again_and_the_faster_run_counts(
    tmp_path: Path, slow: str
) -> None:
    log = tmp_path / "trials.log"
    space = {"zero_optimization": {"stage": [1, 2]}, "train_micro_batch_size_per_gpu": [2, 4, 8]}
    config = config_file(tmp_path, {"tuner_type": "gridsearch", "tuner_early_stopping": 20}, **space)
    assert tune(config, "--log", str(log), "--slow-once", slow) == 0
    tried = [line.split()[0] for line in log.read_text().splitlines()]
    assert {name: tried.count(name) for name in tried if tried.count(name) > 1} == ({slow: 2} if slow else {})
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    assert (best["zero_optimization"]["stage"], best["train_micro_batch_size_per_gpu"]) == (2, 8)
    page = (tmp_path / "autotuning_results/report.html").read_text()
    assert ("run twice: 0.3 s per step were not foreseen, then 0.1 s" in page) == bool(slow)


LASTS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""


def test_what_runs_in_a_commands_place_gets_its_signals_and_ends_with_it() -> None:
    program = f"import sys; from deepspeed.autotuning.experiment import become; sys.exit(become([sys.executable, '-c', {LASTS!r}]))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 7
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        assert process.stdout.read() == b"", "its end: what ran in its place is gone"


def test_a_signal_that_comes_while_a_trial_is_ended_waits_until_it_is() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Stopped() as stopped:
        with postponed():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            done.append("ended")
        done.append("not reached")
    assert done == ["ended"] and (stopped.name, stopped.exit_code) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_search_whose_output_nobody_reads_goes_on() -> None:
    program = "import time; from deepspeed.autotuning.progress import say; say('one'); time.sleep(1); say('two'); say('three'); print(4)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (0, b"")


@pytest.mark.quick("2")
@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_search_that_was_ended_goes_on_where_it_stopped(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "trials.log"
    config = config_file(tmp_path, {"tuner_type": "gridsearch", "trial_timeout": 600}, zero_optimization={"stage": [1, 2]},
                         train_micro_batch_size_per_gpu=[2, 4])  # fmt: skip
    hanging = ["--log", str(log), "--hang", "z2_gas1_tmbspg2"]
    flags = ["--num_gpus", "1", "--autotuning", "tune", "-q", str(PRETENDER), *hanging, "--deepspeed_config", config]
    first = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.runner", *flags], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        until_s = time.monotonic() + 60
        while "z2_gas1_tmbspg2" not in (log.read_text() if log.is_file() else "") and time.monotonic() < until_s:
            time.sleep(0.05)
    finally:
        first.send_signal(number)
        said = first.communicate(timeout=60)[1]
    if number is not signal.SIGKILL:
        assert first.returncode == 128 + number and f"stopped by {number.name}" in said and "same command again" in said
        assert "it was stopped" in (tmp_path / "autotuning_results/report.html").read_text()
    until_s = time.monotonic() + 10
    while alive(log) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not alive(log), "a tuner that is ended takes its trial along"
    before = log.read_text().split()
    assert before.count("z1_gas1_tmbspg2") == 1
    (tmp_path / "go").touch()
    arguments = [str(PRETENDER), *hanging, "--deepspeed_config", config]
    state = json.loads((tmp_path / "autotuning_results/state.json").read_text())
    assert set(state["outcomes"]) == {"z1_gas1_tmbspg2", "z1_gas1_tmbspg4"}
    # The one that hangs is skipped by its time limit now.
    patched = json.loads(Path(config).read_text())
    assert patched["autotuning"]["trial_timeout"] == 600
    from deepspeed.autotuning import resources

    least, resources.LEAST_S = resources.LEAST_S, 2.0
    try:
        assert runner.main(["--num_gpus", "1", "--autotuning", "tune", "-q", *arguments]) == 0
    finally:
        resources.LEAST_S = least
    after = log.read_text().split()
    assert after.count("z1_gas1_tmbspg2") == 1 and after.count("profile_model_info") == 1, "not run again"
    assert "z2_gas1_tmbspg4" in after


@pytest.mark.parametrize(
    ("mode", "timeout_s", "words"),
    [
        ("silent", 60, "never built an engine from the configuration"),
        ("never", 2, "no engine was built within 2 s"),
    ],
)
def test_a_script_that_does_nothing_or_never_ends_says_what_to_do(
    tmp_path: Path, mode: str, timeout_s: int, words: str
) -> None:
    with pytest.raises(DeepSpeedError, match=words) as caught:
        tune(config_file(tmp_path, {"trial_timeout": timeout_s}), "--mode", mode)
    assert "--deepspeed_config" in str(caught.value)


def test_results_of_another_search_are_replaced_in_words_or_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}
    kept = {"overwrite": False}
    assert tune(config_file(tmp_path, **space)) == 0
    state = (tmp_path / "autotuning_results/state.json").read_text()
    with pytest.raises(DeepSpeedError, match="has the results of another search, and autotuning.overwrite = false"):
        tune(config_file(tmp_path, kept, **space), "--refuse", "nothing")
    assert (tmp_path / "autotuning_results/state.json").read_text() == state
    capsys.readouterr()
    assert tune(config_file(tmp_path, **space), "--refuse", "nothing") == 0
    assert "the results of another search in" in capsys.readouterr().out


def test_a_small_timeout_does_not_end_what_the_first_run_measures(tmp_path: Path) -> None:
    config = config_file(
        tmp_path, {"trial_timeout": 3}, zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=2
    )
    assert tune(config, "--mode", "slow-profile") == 0


def test_a_script_that_never_steps_is_told_so_by_its_first_trial(tmp_path: Path) -> None:
    config = config_file(tmp_path, zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=[1, 2])
    with pytest.raises(DeepSpeedError, match="never made a step of the optimizer") as caught:
        tune(config, "--mode", "no-step")
    assert "engine.step()" in str(caught.value)
    assert len(list((tmp_path / "autotuning_exps").glob("*.json"))) == 1


def test_a_script_that_fails_in_the_first_step_shows_its_error_and_where_it_wrote(tmp_path: Path) -> None:
    config = config_file(tmp_path, zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=[1, 2])
    with pytest.raises(DeepSpeedError, match="none of 2 trials gave a result") as caught:
        tune(config, "--mode", "first-step")
    assert "in the first step" in str(caught.value)
    assert "shapes (3, 4) and (5, 6)" in str(caught.value)
    assert "Run the script once without --autotuning" in str(caught.value)
    page = (tmp_path / "autotuning_results/report.html").read_text()
    assert "nothing is left to try" in page and "under way" not in page


def test_a_script_whose_batches_do_not_follow_is_told_to_name_its_argument(tmp_path: Path) -> None:
    config = config_file(tmp_path, zero_optimization={"stage": 1}, train_micro_batch_size_per_gpu=[2, 8])
    with pytest.raises(DeepSpeedError, match="as large with train_micro_batch_size_per_gpu = 8 as with 1") as caught:
        tune(config, "--mode", "own-batches")
    assert '"arg_mappings": {"train_micro_batch_size_per_gpu": "--batch_size"}' in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--autotuning", "tune", "s.py", "--lr", "3"], "name no DeepSpeed configuration"),
        (["--autotuning", "tune", "s.py", "--deepspeed_config", "no.json"], "neither a file nor base64"),
    ],
)
def test_a_wrong_command_is_refused_with_the_cure(arguments: list[str], words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        runner.main(["--num_gpus", "1", *arguments])


@pytest.mark.parametrize("word", ["tun", "train.py"])
def test_another_word_after_the_flag_shows_the_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--num_gpus", "1", "--autotuning", word, "train.py", "--deepspeed_config", "ds.json"])
    said = capsys.readouterr().err
    assert f"the word after --autotuning is tune or run, not {word}" in said
    assert "deepspeed --autotuning tune train.py" in said


def test_an_unknown_metric_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DeepSpeedError, match='autotuning.metric = "speed"') as caught:
        tune(config_file(tmp_path, {"metric": "speed"}))
    assert '"throughput", "latency"' in str(caught.value)


def test_a_wrong_value_in_a_list_is_told_before_anything_runs(tmp_path: Path) -> None:
    log = tmp_path / "trials.log"
    with pytest.raises(DeepSpeedError, match="train_micro_batch_size_per_gpu = -1 is too small"):
        tune(config_file(tmp_path, train_micro_batch_size_per_gpu=[2, -1]), "--log", str(log))
    assert not log.exists()


@pytest.mark.parametrize("off", [False, "false", 0])
def test_a_section_that_is_switched_off_is_refused(tmp_path: Path, off: object) -> None:
    with pytest.raises(DeepSpeedError, match="autotuning.enabled = false, and --autotuning was asked for"):
        tune(config_file(tmp_path, {"enabled": off}))


def test_no_space_for_results_says_where_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(DeepSpeedError, match="no space is left for results") as caught:
        tune(config_file(tmp_path))
    assert "set autotuning.results_dir" in str(caught.value)


def test_a_results_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DeepSpeedError, match="Set autotuning.results_dir and autotuning.exps_dir to folders"):
        tune(config_file(tmp_path, {"results_dir": str(tmp_path / "taken")}))
