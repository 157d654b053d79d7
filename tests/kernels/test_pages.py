"""Weights in large pages: the same values, and never for longer than they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.kernels import pages


def test_gathering_changes_no_value_and_takes_each_storage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = torch.arange(3 << 20, dtype=torch.int32)
    ask = pages._madvise()

    def count(start: Any, length: Any, advice: int) -> int:
        asked.append(length.value)
        return -1 if ask is None else ask(start, length, advice)

    monkeypatch.setattr(pages, "_madvise", lambda: count)
    done = pages.gather_in_large_pages([whole, whole[5:], torch.ones(3), torch.empty(9 << 20, device="meta")])
    assert (8 << 20) <= sum(asked) <= whole.nbytes and done <= sum(asked)
    assert torch.equal(whole, torch.arange(3 << 20, dtype=torch.int32))


def test_where_linux_is_slow_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(pages.time, "thread_time", lambda: float(next(clock)))
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *_: pytest.fail("asked after a second"))
    assert pages.gather_in_large_pages([torch.ones(8 << 20)]) == 0


def test_memory_that_is_refused_or_shared_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=2 << 20)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *_: -1)
    assert pages.gather_in_large_pages([torch.ones(2 << 20), torch.ones(2 << 20).share_memory_(), mapped]) == 0
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.gather_in_large_pages([torch.ones(2 << 20)]) == 0


def test_rows_of_a_cache_begin_at_multiples_of_their_bytes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for like in (torch.ones(2, 3), torch.ones(2, 3, device="meta")):
            made = pages.empty_rows((2, 3, 5, 128), like, dtype)
            assert made.shape == (2, 3, 5, 128) and made.is_contiguous() and made.dtype is dtype
            assert made.device == like.device and made.data_ptr() % 256 == 0
