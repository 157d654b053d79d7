"""For every test: the pools of `harness.py` end with the session, and the test process leaks no environment variable."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import harness, long

# Before any process imports huggingface_hub, which reads them once: no test reaches for the network, and no thread reports.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave variants to the long targets."""
    if not long.IS_LONG and not config.getoption("--matrix", default=False):
        long.skip_variants(items, is_whole=not any("::" in arg for arg in config.args))


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    leaked = harness.changed_environment(before)
    for name in leaked:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in leaked if name in before})
    assert not leaked, f"the test left environment variables changed: {', '.join(leaked)}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of its own, of that size: `small_disk("1m", "ro")`; `kind` ramfs has no direct I/O."""
    mounted: list[Path] = []

    def mount(nbytes: str, *options: str, kind: str = "tmpfs") -> Path:
        at = tmp_path / f"disk{len(mounted)}"
        at.mkdir()
        command = ["mount", "-t", kind, "-o", ",".join((f"size={nbytes}", *options)), kind, str(at)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            pytest.skip("this machine has no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(at)
        return at

    yield mount
    for at in mounted:
        subprocess.run(["umount", "-l", str(at)], capture_output=True, timeout=30)


def pytest_sessionfinish() -> None:
    """End the worker processes."""
    harness.close_pools()
