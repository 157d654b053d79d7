"""Searches whose results can no longer be written: they end soon, say why and what is kept, and go on once there is space."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspeed.autotuning import files, lessons
from deepspeed.autotuning.experiment import Ended
from deepspeed.autotuning.files import ResultsError, check_room, held, write_text
from deepspeed.engine.trial import write_result
from deepspeed.utils import whole_files
from deepspeed.utils.errors import DeepSpeedError
from tests.autotuning.test_experiments import alive, config_file, on_cpus, tune

__all__ = ["on_cpus"]
SPACE: dict[str, Any] = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": [2, 4]}
NAMES = ["z1_gas1_tmbspg2", "z1_gas1_tmbspg4"]
SECTION = {"tuner_type": "gridsearch", "trial_timeout": 600}


def tried(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@contextlib.contextmanager
def failing_from(number: int, code: int) -> Iterator[list[int]]:
    """From its so-manieth call on, every write of the tuner's leaves a part of its file and fails."""
    calls = [0]
    plain = Path.write_text

    def write(path: Path, text: str, **kwargs: Any) -> int:
        calls[0] += 1
        if calls[0] < number:
            return plain(path, text, **kwargs)
        plain(path, text[: len(text) // 2], **kwargs)
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_files.Path, "write_text", write)
        yield calls


@pytest.mark.parametrize(
    ("number", "code", "is_kept"),
    [
        (1, errno.ENOSPC, False),  # the candidates
        (5, errno.EDQUOT, False),  # the state after the first run
        (8, errno.EROFS, True),  # the first trial's configuration
        (10, errno.ENOSPC, True),  # its outcome
        (11, errno.ENOSPC, True),  # the state after it
        (13, errno.EDQUOT, True),
        (16, errno.ENOSPC, True),
        (19, errno.EROFS, True),  # the best configuration
        (21, errno.ENOSPC, True),  # the summary
    ],
)
def test_a_search_that_cannot_write_ends_with_what_is_kept_and_goes_on_later(
    tmp_path: Path, number: int, code: int, is_kept: bool
) -> None:
    log = tmp_path / "trials.log"
    config = config_file(tmp_path, SECTION, **SPACE)
    with failing_from(number, code) as calls, pytest.raises(ResultsError) as caught:
        tune(config, "--log", str(log))
    assert calls[0] >= number
    said = str(caught.value)
    assert ("results cannot be written" if code == errno.EROFS else "no space is left for results") in said
    assert (os.strerror(code) if code == errno.EROFS else "MiB are free on its disk") in said
    state = files.read_json(tmp_path / "autotuning_results/state.json")
    kept = list(state["outcomes"]) if state else []
    assert (state is not None) == is_kept
    assert (f"keeps the first run and {len(kept)} trial" if is_kept else "Nothing of this search is kept") in said
    assert not kept or f"the best so far is {NAMES[len(kept) - 1]}" in said or f"the best so far is {NAMES[1]}" in said
    assert not list(tmp_path.rglob(".*.[0-9]*")), "a half of a file is left"
    before = tried(log)
    assert tune(config, "--log", str(log)) == 0
    again = tried(log)[len(before) :]
    assert ("profile_model_info" not in again) == is_kept
    assert not set(kept) & set(again)
    state = json.loads((tmp_path / "autotuning_results/state.json").read_text())
    assert state["is_finished"] and list(state["outcomes"]) == NAMES


@pytest.mark.parametrize("when", ["profile_model_info", NAMES[0], NAMES[1]])
def test_a_disk_that_fills_while_a_run_works_ends_it_at_once(
    tmp_path: Path, small_disk: Callable[..., Path], when: str
) -> None:
    disk, log = small_disk("12m"), tmp_path / "trials.log"
    section = {**SECTION, "results_dir": str(disk / "results"), "exps_dir": str(disk / "exps")}
    config = config_file(tmp_path, section, **SPACE)
    waiting = ["--waits-for", str(tmp_path / "go"), "--at", when, "--log", str(log)]

    def fill() -> None:
        while when not in tried(log):
            time.sleep(0.05)
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    filling = threading.Thread(target=fill)
    filling.start()
    began_s = time.monotonic()
    with pytest.raises(ResultsError, match="no space is left for results") as caught:
        tune(config, *waiting)
    filling.join()
    assert time.monotonic() - began_s < 60, "its trial would wait for 600 s"
    assert not alive(log)
    assert re.search(r"0\.\d of 12 MiB are free", str(caught.value))
    assert when != NAMES[1] or f"the first run and 1 trial; the best so far is {NAMES[0]}" in str(caught.value)
    (disk / "filler").unlink()
    (tmp_path / "go").touch()
    assert tune(config, *waiting) == 0
    assert [tried(log).count(name) for name in ("profile_model_info", *NAMES)] == [
        1 + (name == when) for name in ("profile_model_info", *NAMES)
    ]


def test_a_disk_that_logs_have_filled_is_told_by_the_largest(tmp_path: Path, small_disk: Callable[..., Path]) -> None:
    folder = small_disk("12m") / "z1"
    folder.mkdir()
    (folder / "stdout.log").write_bytes(bytes(11_600_000))
    with pytest.raises(ResultsError, match=r"0\.\d of 12 MiB are free on its disk; .*z1/stdout.log has 11 MiB"):
        check_room(folder)
    assert [path.name for path in folder.iterdir()] == ["stdout.log"]


def test_a_rank_whose_result_cannot_be_written_says_so_and_its_trial_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    with failing_from(1, errno.ENOSPC), pytest.raises(DeepSpeedError, match="cannot be written: .*No space") as caught:
        write_result(path, {"latency": 1.0})
    assert not list(tmp_path.iterdir())
    found = lessons.outcome_of(Ended(1, 1.0, True, 5, None, ""), None, str(caught.value), last_step=5)
    assert found.state == "killed", "something outside took the space; the configuration is tried once more"


def test_a_file_that_cannot_be_written_anew_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_text(path, "before")
    with failing_from(1, errno.ENOSPC), pytest.raises(ResultsError):
        write_text(path, "after" * 1000)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_two_searches_do_not_share_a_folder(tmp_path: Path) -> None:
    results = tmp_path / "autotuning_results"
    results.mkdir()
    with (
        held(results, results),
        pytest.raises(DeepSpeedError, match="another search works in .*autotuning_results now"),
    ):
        tune(config_file(tmp_path, **SPACE))
    assert not list(results.iterdir())
    with held(results):
        pass


def test_a_damaged_state_is_told_and_the_search_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, SECTION, **{**SPACE, "train_micro_batch_size_per_gpu": 2})
    results = tmp_path / "autotuning_results"
    results.mkdir()
    (results / "state.json").write_text('{"outcomes": {"z1')
    assert tune(config) == 0
    assert "state.json is damaged, so the search begins anew" in capsys.readouterr().out
