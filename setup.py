"""Compiles csrc/*.cpp into deepspeed/lib/libdeepspeed_native.so while the package is built; all else is in pyproject.toml.

A plain shared library behind a C interface: it fits every Python and every torch. Where it cannot be compiled the
package is built without it, and says at run time what is slower.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The flags after -O3 keep each operation as IEEE wrote it, whatever CFLAGS says, and let square roots be vectorised.
FLAGS = "-O3 -std=c++17 -g0 -pthread -fvisibility=hidden -fno-fast-math -ffp-contract=off -fno-math-errno -fno-trapping-math"


class BuildNative(build_ext):
    """Gives the library its one name, without the suffix of a Python version. `optional` makes an error a warning."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file of an extension, below the build folder or the source tree."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None beside those marked in the sources: this is no Python module."""
        return []

    def copy_extensions_to_source(self) -> None:
        """Put the library where an editable install reads it; the folder is not in the repository."""
        Path("deepspeed/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """The wheel is for this platform, and for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "deepspeed.lib.libdeepspeed_native",
            sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").glob(pattern)),
            extra_compile_args=FLAGS.split(),
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
