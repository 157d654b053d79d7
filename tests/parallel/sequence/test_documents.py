"""Documents of a batch, from position ids and padding masks."""

from __future__ import annotations

import torch

from deepspeed.parallel.sequence.documents import documents_of


def ids(*rows: str) -> torch.Tensor:
    """Digits as a tensor."""
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def test_a_document_begins_where_position_ids_do_not_count_on() -> None:
    assert documents_of(ids("012012", "012345"), None).rows == (((0, 3), (3, 6)), ((0, 6),))


def test_one_document_per_row_is_the_plain_case() -> None:
    assert documents_of(ids("0123", "0123"), None).are_whole_rows


def test_padding_before_a_sample_is_blank_and_behind_a_document_of_its_own() -> None:
    found = documents_of(ids("0123", "0123"), ids("0011", "1110"))
    assert found.rows == (((0, 2), (2, 4)), ((0, 3), (3, 4)))
    assert [found.is_blank(0, (0, 2)), found.is_blank(0, (2, 4)), found.is_blank(1, (3, 4))] == [True, False, False]
    assert found.ids(torch.device("cpu")).tolist() == [[-1, -1, 1, 1], [0, 0, 0, 1]]


def test_a_mask_with_holes_stays_a_mask() -> None:
    found = documents_of(ids("0123"), ids("1011"))
    assert found.visible is not None
    assert found.visible.tolist() == [[True, False, True, True]]
    assert not found.are_whole_rows
