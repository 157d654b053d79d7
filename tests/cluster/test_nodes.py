"""The cluster itself leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import until
from tests.cluster.nodes import REPOSITORY

BUILDER = """
import pathlib, sys, time
from tests.cluster.nodes import cluster
with cluster(pathlib.Path(sys.argv[1]), ("a",)) as nodes:
    for node in nodes.nodes.values():
        node.start("setsid", "sleep", sys.argv[2])
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_ends_with_the_process_that_built_it(number: signal.Signals, tmp_path: Path) -> None:
    seconds = f"600.{number.value}"  # tells this sleep from any other
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(tmp_path), seconds], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert builder.stdout is not None and builder.stdout.readline() == "up\n"
    assert until(lambda: len(_of(seconds)) >= 2, 10)
    builder.send_signal(number)
    builder.communicate()
    assert until(lambda: not _of(str(tmp_path)) and not _of(seconds), 10), (_of(str(tmp_path)), _of(seconds))


def _of(word: str) -> list[str]:
    """The commands that run on this machine and have this in them."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if word in line and "pytest" not in line and "-c" not in line.split()]
