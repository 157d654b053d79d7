"""One after the other, the instruction sets that compiled loops are tested with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepspeed.kernels import native


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in native.isas():
        pytest.skip(f"this processor has no {request.param}")
    native.use_isa(request.param)
    yield str(request.param)
    native.use_isa()
