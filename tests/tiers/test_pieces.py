"""Cutting transfers: pieces cover, do not overlap, and only whole pages are called so."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.tiers.pieces import PAGE, cut


def as_text(offset: int, nbytes: int, block: int, files: int = 1, stripe: int = 0) -> str:
    return " ".join(
        f"{piece.file_index}:{piece.file_offset}+{piece.nbytes}{'' if piece.is_whole_pages else '~'}"
        for piece in cut(offset, nbytes, block, files, stripe)
    )


@pytest.mark.parametrize(
    ("offset", "nbytes", "text"),
    [
        (0, 0, ""),
        (0, 1, "0:0+1~"),
        (0, 4095, "0:0+4095~"),
        (0, 4096, "0:0+4096"),
        (0, 4097, "0:0+4096 0:4096+1~"),
        (4095, 4098, "0:4095+1~ 0:4096+4096 0:8192+1~"),
        (100, 100, "0:100+100~"),
        (0, 20000, "0:0+8192 0:8192+8192 0:16384+3616~"),
        (4096, 16384, "0:4096+4096 0:8192+8192 0:16384+4096"),
    ],
)
def test_a_transfer_is_whole_pages_within_blocks_and_the_rest(offset: int, nbytes: int, text: str) -> None:
    assert as_text(offset, nbytes, 8192) == text


def test_stripes_go_round_the_files() -> None:
    assert as_text(0, 5 * 4096 + 1, 8192, 2, 4096) == "0:0+4096 1:0+4096 0:4096+4096 1:4096+4096 0:8192+4096 1:8192+1~"


@settings(max_examples=200, deadline=None)
@given(
    offset=st.integers(0, 10 * PAGE),
    nbytes=st.integers(0, 20 * PAGE),
    block=st.integers(1, 4),
    files=st.integers(1, 3),
    stripe=st.integers(1, 4),
)
def test_pieces_cover_the_transfer_once_and_stay_within_blocks_and_stripes(
    offset: int, nbytes: int, block: int, files: int, stripe: int
) -> None:
    block, stripe = block * PAGE, stripe * PAGE
    at = 0
    for piece in cut(offset, nbytes, block, files, stripe):
        assert piece.start == at and piece.nbytes > 0
        place = piece.file_offset
        if files > 1:
            place = (piece.file_offset // stripe * files + piece.file_index) * stripe + piece.file_offset % stripe
            assert piece.file_offset // stripe == (piece.file_offset + piece.nbytes - 1) // stripe
        assert place == offset + at
        if piece.is_whole_pages:
            assert piece.file_offset % PAGE == piece.nbytes % PAGE == 0 and piece.nbytes <= block
        else:
            assert piece.nbytes < PAGE
        at += piece.nbytes
    assert at == nbytes
