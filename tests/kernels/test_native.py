"""The library of compiled kernels: it is there in this checkout, and its absence is explained and survived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspeed.kernels import native
from deepspeed.utils.errors import DeepSpeedError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for anew, in the test and after it."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_this_checkout_has_its_library() -> None:
    assert native.library() is not None, f"{native.why_missing()}: run `make native`"
    assert native.why_missing() is None
    assert native.isas()[-1] == "portable"


def test_a_missing_library_says_why(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "PATH", tmp_path / "gone.so")
    assert native.library() is None
    assert native.why_missing() == (
        f"{tmp_path / 'gone.so'} does not exist: the package was built where no C++ compiler was found"
    )
    assert native.isas() == []
    native.use_isa()


def test_a_file_that_is_no_library_says_why(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setattr(native, "PATH", tmp_path / "text.so")
    assert native.library() is None
    assert "cannot be loaded (" in str(native.why_missing())


def test_a_library_of_another_version_is_not_called(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.library() is None
    assert f"was built from other sources (version {native.ABI - 1}, this package needs {native.ABI})" in str(
        native.why_missing()
    )


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    with pytest.raises(DeepSpeedError, match=r"instruction set 'mmx' is not one of .*portable"):
        native.use_isa("mmx")


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_building_without_a_compiler_succeeds_without_the_library(compiler: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "deepspeed"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)  # type: ignore[operator]
    shutil.rmtree(tmp_path / "deepspeed" / "lib", ignore_errors=True)
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, "CC": compiler, "CXX": compiler}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert 'building extension "deepspeed.lib.libdeepspeed_native" failed' in built.stderr
    assert not list((tmp_path / "deepspeed").rglob("*.so"))


def test_a_wheel_installs_and_imports_where_there_is_no_compiler(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "deepspeed"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)  # type: ignore[operator]
    env = {**os.environ, "CC": "/no/such/compiler", "CXX": "/no/such/compiler"}
    for command in (
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "."],
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", ".", "--target",
         str(target), "deepspeed"],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    assert "-py3-none-" in wheel.name
    code = "import deepspeed, deepspeed.accelerator; print(deepspeed.__file__)"
    env = {**os.environ, "PATH": "/no/such/folder", "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(str(target)), done.stderr
