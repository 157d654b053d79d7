"""Rounds, as text: which members are due when which are full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.zero.reduce import Rounds


def rounds_of(names: str) -> Rounds[str]:
    rounds: Rounds[str] = Rounds()
    rounds.add(list(names))
    return rounds


def play(rounds: Rounds[str], script: str) -> str:
    """Fill each named member ("." ends the round with the rest); what was due after each, in words."""
    said = []
    for name in script.split():
        if name == ".":
            said.append("".join(rounds.rest()))
            rounds.end()
        else:
            rounds.fill(name)
            said.append("".join(rounds.due()) or "-")
    return " ".join(said)


def test_a_full_member_waits_for_those_before_it() -> None:
    assert play(rounds_of("abcd"), "b a d .") == "- ab - cd"


def test_every_round_begins_at_the_front() -> None:
    assert play(rounds_of("abc"), "a . b a .") == "a bc - ab c"


def test_a_member_had_its_turn_when_it_was_full_or_due() -> None:
    rounds = rounds_of("abc")
    assert not rounds.has_begun
    play(rounds, "b")
    assert [rounds.had_turn(name) for name in "abc"] == [False, True, False] and rounds.has_begun
    play(rounds, "a .")
    assert not any(rounds.had_turn(name) for name in "abc") and not rounds.has_begun


def test_the_order_in_which_members_filled_can_be_the_next() -> None:
    rounds = rounds_of("abcd")
    play(rounds, "d b .")
    assert rounds.completion_order() == [3, 1, 0, 2]
    assert rounds.completion_order() == [0, 1, 2, 3], "since the last call none did"
    rounds.set_order([3, 1, 0, 2])
    assert play(rounds, "a b d .") == "- - dba c"


def test_members_that_join_come_last() -> None:
    rounds = rounds_of("ab")
    rounds.set_order([1, 0])
    rounds.add(["c"])
    assert play(rounds, "c .") == "- bac"


def test_what_is_not_an_order_of_all_is_refused() -> None:
    with pytest.raises(AssertionError, match="not an order"):
        rounds_of("abc").set_order([0, 1, 1])


@given(st.permutations("abcdef"), st.integers(0, 6))
def test_each_is_due_once_and_in_order_whatever_fills_first(filled: list[str], num_filled: int) -> None:
    said = play(rounds_of("abcdef"), " ".join([*filled[:num_filled], "."]))
    assert said.replace("-", "").replace(" ", "") == "abcdef"
