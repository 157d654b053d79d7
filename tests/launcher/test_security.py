"""Hostfile, environment file and arguments are data: nothing in them runs, becomes a flag, or appears in a log.

The corpus has every hole that was known of the original at 0.19. Lines are given to a real shell, with programs in front
of it that would leave a mark.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.launcher import runner
from deepspeed.launcher.hostfile import parse_hostfile
from deepspeed.launcher.starters import STARTERS, Plan
from deepspeed.launcher.starters.base import remote_line
from deepspeed.launcher.variables import exported, parse_env_file, shown, shown_command
from deepspeed.utils.errors import DeepSpeedError

VALUES = [
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a\ntouch pwned\n",
    "a && touch pwned",
    "${IFS}touch${IFS}pwned",
    "%h %n %% %u",
    "-oProxyCommand=touch pwned",
    "ünï \\ * ? ~ ! #",
    "",
    "\x1b]0;title\x07 \x01 \x7f",
    "a\rtouch pwned\r",
    "\u2028touch pwned\x85touch pwned",
    "\\",
    "\\'; touch pwned; '",
    "!!; !touch",
    "{a,b} [a-z] <(touch pwned) >pwned",
    "~ ~root $'\\x41' $((1))",
    "\udcff invalid bytes",
    "--help",
    "@file",
]
HOSTS = [
    "-oProxyCommand=touch${IFS}pwned",
    "a;touch${IFS}pwned",
    "$(touch${IFS}pwned)",
    "`touch`",
    "a|b",
    "a&b",
    "../a",
    "a/b",
    "^/etc/passwd",
    "a,b",
    "[1-3]",
    "user@a",
    "fe80::1%$(id)",
    "-w",
    "a" * 300,
    "hôte",
    "a\\b",
    "a'b",
    'a"b',
    "a>b",
    "a\x1bb",
    "a%h",
    "a=b",
    "@a",
    "a:22",
    "ssh://a",
    "~a",
    "*",
    "-",
    "a-",
    ".a",
    "::1%lo;id",
    "[::1]",
    "١٢",
]


def _plan(*args: str, **variables: str) -> Plan:
    return Plan(
        world={"a": [0], "b": [0]},
        script="train.py",
        script_args=args,
        flags=[],
        variables=variables,
        environ=dict(os.environ),
        cwd="/a folder; touch pwned",
        control="h:1",
        python="show",
    )


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_no_host_goes_no_further(host: str) -> None:
    with pytest.raises(DeepSpeedError, match=r"hosts, line 2: .* is no host name and no IP address"):
        parse_hostfile(f"good slots=1\n{host} slots=1\n", "hosts")


@pytest.mark.parametrize("host", ["a", "node-1.example.org", "node_1", "10.0.0.1", "fe80::1", "1a"])
def test_hosts_are_hosts(host: str) -> None:
    assert parse_hostfile(f"{host} slots=2", "hosts") == {host: 2}


def test_slots_that_no_machine_has_are_refused() -> None:
    with pytest.raises(DeepSpeedError, match="slots=99999999999999999999 is more than 4096"):
        parse_hostfile("a slots=99999999999999999999", "hosts")


@pytest.mark.parametrize("value", VALUES)
def test_values_and_arguments_reach_a_node_as_they_are(value: str, tmp_path: Path) -> None:
    """The remote string in a real shell: `show` reports what it was given."""
    (tmp_path / "a folder; touch pwned").mkdir()
    show = tmp_path / "show"
    show.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[-1], os.environ['VALUE']]))\n"
    )
    show.chmod(0o755)
    line = remote_line(_plan(value, VALUE=value), 0).replace("/a folder", f"{tmp_path}/a folder")
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=30)
    assert json.loads(done.stdout) == [value, value], done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["it's; touch pwned", "$(touch pwned)", "missing"])
def test_a_script_to_source_is_sourced_or_missed(name: str, tmp_path: Path) -> None:
    if name != "missing":
        (tmp_path / name).write_text("echo sourced; exit 0\n")
    line = remote_line(dataclasses.replace(_plan(), venv_script=str(tmp_path / name)), 0)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stdout) == ((2, "") if name == "missing" else (0, "sourced\n"))
    assert ("--venv_script" in done.stderr) == (name == "missing")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("value", VALUES)
def test_pdsh_expands_nothing_of_ours_but_the_node_number(value: str) -> None:
    [start] = STARTERS["pdsh"].command(_plan(value, VALUE=value))
    as_pdsh_does = start.argv[-1].replace("%%", "\0").replace("%n", "1").replace("\0", "%")
    assert as_pdsh_does == remote_line(_plan(value, VALUE=value), 1)


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "impi", "mvapich", "slurm"])
def test_mpi_and_slurm_get_words_and_no_values(launcher: str) -> None:
    [start] = STARTERS[launcher].command(_plan("$(touch pwned)", WANDB_API_KEY="s3cr3t, with a comma"))
    assert start.argv[-1] == "$(touch pwned)"
    assert start.environ["WANDB_API_KEY"] == "s3cr3t, with a comma"
    assert not any("s3cr3t" in word for word in start.argv)


def test_ssh_ends_its_options_before_the_host() -> None:
    for start in STARTERS["ssh"].command(_plan()):
        assert start.argv[-3] == "--" and start.argv[-2] == start.host


@pytest.mark.parametrize(
    "line", ["A;touch pwned=1", "1A=x", "$(touch pwned)=x", "A B=x", "A", "=x", "A-B=x", "export A=x", "Ä=x"]
)
def test_a_bad_line_of_an_environment_file_names_file_and_line(line: str) -> None:
    with pytest.raises(DeepSpeedError, match=r"\.deepspeed_env, line 3: .* is no variable"):
        list(parse_env_file(f"# ours\n\n{line}\n", ".deepspeed_env"))


def test_a_bad_line_with_a_secret_is_not_shown() -> None:
    with pytest.raises(DeepSpeedError) as caught:
        list(parse_env_file("MY-TOKEN=abc", "f"))
    assert "abc" not in str(caught.value)


def test_an_environment_file_is_literal_and_loses_one_pair_of_quotes() -> None:
    text = "A=$(id) `id` $HOME\nB = \"x y\" \nC='it''s'\nD=a=b"
    assert dict(parse_env_file(text, "f")) == {"A": "$(id) `id` $HOME", "B": "x y", "C": "it''s", "D": "a=b"}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("FROM_HOME=1\nBOTH=home\n")
    (here / ".deepspeed_env").write_text("LD_PRELOAD=/evil.so\nBOTH=here\nMINE=x\n")
    return home, here


def test_the_file_in_the_current_directory_is_used_only_when_asked_for(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = folders
    monkeypatch.setattr(logging.getLogger("DeepSpeed.launcher"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    unasked = exported({}, None, here, home)
    assert unasked["FROM_HOME"] == "1" and unasked["BOTH"] == "home" and "LD_PRELOAD" not in unasked
    assert "is not used: BOTH, LD_PRELOAD, MINE. Set DS_ENV_FILE=.deepspeed_env" in caplog.text
    for asked in (
        exported({"DS_ENV_FILE": ".deepspeed_env"}, None, here, home),
        exported({}, None, here, home, ".deepspeed_env"),
    ):
        assert asked["LD_PRELOAD"] == "/evil.so" and asked["BOTH"] == "here" and asked["FROM_HOME"] == "1"


def test_lines_that_repeat_the_callers_environment_select_it(folders: tuple[Path, Path]) -> None:
    """So does Accelerate, which writes its own variables to the file before it starts the command."""
    home, here = folders
    sent = exported({"MINE": "x", "LD_PRELOAD": "/own.so"}, None, here, home)
    assert sent["MINE"] == "x" and "LD_PRELOAD" not in sent


def test_a_file_that_is_asked_for_must_exist(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DeepSpeedError, match="--env_file nothing does not exist"):
        exported({}, None, folders[1], folders[0], "nothing")


def test_the_callers_variables_that_go_along(tmp_path: Path) -> None:
    environ = {
        "NCCL_DEBUG": "1",
        "PYTHONPATH": "/lib",
        "MLFLOW_X": "1",
        "UCX_TLS": "tcp",
        "HOME": "/h",
        "UCX_NET_DEVICES": "e",
    }
    from deepspeed.accelerator.platforms import PLATFORMS

    sent = exported({**environ, "DS_CONTROL_TOKEN": "t"}, PLATFORMS["cuda"], tmp_path, tmp_path)
    assert sent == {
        "NCCL_DEBUG": "1",
        "PYTHONPATH": f"{tmp_path}:/lib",
        "MLFLOW_X": "1",
        "UCX_TLS": "tcp",
        "UCX_NET_DEVICES": "e",
    }
    assert "UCX_NET_DEVICES" not in exported({**environ, "AISC_JOB_NAME": "j"}, None, tmp_path, tmp_path)


def test_secrets_are_redacted_in_logs() -> None:
    assert shown("WANDB_API_KEY", "abc") == "WANDB_API_KEY=***"
    assert shown("PROXY", "http://me:pw@host/") == "PROXY=http://***@host/"
    assert shown("NCCL_DEBUG", "INFO") == "NCCL_DEBUG=INFO"
    line = remote_line(_plan(HF_TOKEN="abc$x", PLAIN="abd"), 0)
    logged = " ".join(shown_command([line], {"HF_TOKEN": "abc$x"}))
    assert "abc" not in logged and "abd" in logged


def test_the_commands_log_has_no_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run with a pretended ssh that answers nothing."""
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_SOME_SECRET", "hush")
    monkeypatch.setattr(logging.getLogger("DeepSpeed.launcher"), "handlers", [])
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    flags = ["-H", str(tmp_path / "hosts"), "--launcher", "ssh", "--no_ssh_check", "--log_level", "debug"]
    assert runner.main([*flags, "train.py"]) == 3
    written = capfd.readouterr().err
    assert "DS_CONTROL_TOKEN=***" in written and "hush" not in written
    assert "failed first (host 127.0.0." in written and "its launcher did not start (exit code 3)" in written
