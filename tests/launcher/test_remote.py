"""Programs that start nodes and fail to: what is said of it. The programs are shell scripts; the real ones: tests/cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = """
import os, sys
from deepspeed.launcher.coordinator import Coordinator
from deepspeed.launcher.remote import RemoteRun
from deepspeed.launcher.starters import Plan, Start
from deepspeed.launcher.starters.pdsh import Pdsh
from deepspeed.utils.errors import LaunchError

class Local(Pdsh.__bases__[0]):
    name, members_are_ranks, failed_host = "pdsh", False, Pdsh.failed_host

    def detect(self):
        return "sh"

    def command(self, plan):
        return [Start(argv=["sh", "-c", plan.script], environ=os.environ)]

plan = Plan(world={"a": [0], "b": [0]}, script=eval(sys.argv[1]), script_args=(), flags=[],
            variables={"SMALL": "1", "BIG": "x" * 1000}, environ=os.environ, cwd="/", control="h:1")
coordinator = Coordinator(["node a", "node b"], "token", grace_s=1, bind=("127.0.0.1", 0))
try:
    sys.exit(RemoteRun(plan, Local(), coordinator).run())
except LaunchError as error:
    print(error, file=sys.stderr)
"""


def _run(script: str) -> tuple[int, str]:
    """Exit code and stderr of a job that is started by a shell script, which is given as a Python expression."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, script], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    return done.returncode, done.stderr


def test_the_node_that_failed_is_named_with_its_own_words() -> None:
    lines = ["b: cannot see the coordinator", "a: something else", "pdsh@h: b: ssh exited with exit code 2"]
    code, written = _run(repr(f"printf '%s\\n' {' '.join(map(repr, lines))} >&2; sleep 0.5; exit 2"))
    assert code == 2
    assert written.endswith(
        "---- node b failed first (host b): its launcher did not start (exit code 2) ----\ncannot see the coordinator\n"
    )


def test_where_python_cannot_start_the_cure_is_what_has_to_work_there() -> None:
    _, written = _run(repr("echo 'pdsh@h: a: ssh exited with exit code 127' >&2; sleep 0.5; exit 127"))
    assert "node a failed first (host a): its launcher did not start (exit code 127: command not found)" in written
    assert f"On a, this has to work:  cd / && {sys.executable} -c 'import deepspeed'" in written


def test_a_command_line_that_is_too_long_names_the_longest_variable() -> None:
    _, written = _run("'x' * 1000000")
    assert "sh cannot be started: Argument list too long.\n  The 2 variables for the nodes have 1009 bytes" in written
    assert "(BIG has 1000); with the script's arguments a command may have 128 KiB" in written
