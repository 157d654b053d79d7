"""The shared library of compiled kernels, loaded at first use: `library()`.

Asked by the CPU optimizers and by asynchronous file I/O, which declare the signatures of their own functions. The
library is `deepspeed/lib/libdeepspeed_native.so`, made from csrc/ while the package is built (setup.py); nothing
is ever compiled at run time. Where it is missing or of another version, callers use their slower path.

Invariant: `library() is None` exactly where `why_missing()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once

PATH = Path(__file__).parent.parent / "lib" / "libdeepspeed_native.so"

ABI = 15
"""The version of the exported functions that this package calls; DS_NATIVE_ABI in csrc/native.h."""


def library() -> ctypes.CDLL | None:
    """The library; None where it cannot be used."""
    return _load()[0]


def why_missing() -> str | None:
    """Why there is no library, as a clause; None where there is one."""
    return _load()[1]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not PATH.is_file():
        return None, f"{PATH} does not exist: the package was built where no C++ compiler was found"
    try:
        found = ctypes.CDLL(str(PATH))
        abi = found.ds_native_abi()
    except (OSError, AttributeError) as error:
        return None, f"{PATH} cannot be loaded ({error})"
    if abi != ABI:
        return None, f"{PATH} was built from other sources (version {abi}, this package needs {ABI})"
    found.ds_isa_name.restype = ctypes.c_char_p
    return found, None


def warn_slower(what: str) -> None:
    """Say once that `what` ("CPU optimizer steps run on torch's kernels") for want of the library, and the cure."""
    warn_once(f"{what}: {why_missing()}.\n  Install a C++ compiler (g++ or clang++) and install deepspeed again.")


def isas() -> list[str]:
    """The instruction sets that the library has loops for and this processor has, best first."""
    found = library()
    if found is None:
        return []
    names = map(found.ds_isa_name, itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)]


def use_isa(name: str | None = None) -> None:
    """Have the loops use one of `isas()`, the best by default; results are the same bit for bit."""
    known = isas()
    if name is not None and name not in known:
        raise DeepSpeedError(
            f"instruction set {name!r} is not one of {', '.join(known) or 'none: ' + str(why_missing())}."
        )
    found = library()
    if found is not None:
        found.ds_isa_choose(known.index(name) if name is not None else 0)
