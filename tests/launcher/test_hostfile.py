"""Hostfiles, filters and world info."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspeed.launcher.hostfile import decode_world, encode_world, first, parse_hostfile, read_hostfile, select
from deepspeed.utils.errors import DeepSpeedError

POOL = {"a": 4, "b": 4, "c": 2}


def _text(world: dict[str, list[int]]) -> str:
    return " ".join(f"{host}:{','.join(map(str, slots))}" for host, slots in world.items())


def test_a_hostfile_gives_hosts_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# a comment\n\n  b  slots=4 \na\tslots=2 max=9\n")
    assert list(read_hostfile(path).items()) == [("b", 4), ("a", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\nb slot=2", r"^hosts, line 2: 'b slot=2' is not a host"),
        ("a slots=", r"line 1"),
        ("a slots=2\n\na slots=3", r"^hosts, line 3: host a is listed twice"),
        ("# nothing\n", r"^hosts lists no host"),
        ("a slots=0\nb slots=0\n", r"^hosts gives no host a slot"),
    ],
)
def test_a_malformed_hostfile_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        parse_hostfile(text, "hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", "a:0,1,2,3 b:0,1,2,3 c:0,1"),
        ("c@a:0,2", "", "a:0,2 c:0,1"),
        ("b:3,1,1@b:0", "", "b:0,1,3"),
        ("b@b:1", "", "b:1"),
        ("", "b", "a:0,1,2,3 c:0,1"),
        ("", "a:0,1,2,3@c:1", "b:0,1,2,3 c:0"),
    ],
)
def test_filters_keep_the_order_of_the_hostfile(include: str, exclude: str, left: str) -> None:
    assert _text(select(POOL, include, exclude)) == left


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("a", "b", "--include 'a' and --exclude 'b' exclude each other"),
        ("d", "", "--include 'd': no host 'd'.\n  There are a, b, c"),
        ("c:2", "", "c has no slot 2.\n  It has c:0,1"),
        ("a:0-3", "", "'0-3' is not a slot number.\n.*Ranges are not supported"),
        ("a:", "", "'' is not a slot number"),
        ("", "a@b@c", "--exclude 'a@b@c' leaves no slot"),
    ],
)
def test_impossible_filters_say_what_there_is(include: str, exclude: str, words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        select(POOL, include, exclude)


def test_counts_take_the_first_hosts_and_slots() -> None:
    world = select(POOL)
    assert _text(first(world, num_nodes=2, num_slots=1)) == "a:0 b:0"
    assert _text(first(world, num_slots=3)) == "a:0,1,2 b:0,1,2 c:0,1,2"
    assert first(world) == world
    with pytest.raises(DeepSpeedError, match=r"--num_nodes 4: there are 3 hosts \(a, b, c\)"):
        first(world, num_nodes=4)


def test_world_info_round_trips_in_order() -> None:
    world = {"b": [1, 3], "a": [0]}
    assert list(decode_world(encode_world(world)).items()) == list(world.items())


@pytest.mark.parametrize("text", ["%%%", "W10=", "e30x", encode_world({"a": 3})])  # type: ignore[dict-item]
def test_world_info_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DeepSpeedError, match="is not a world"):
        decode_world(text)
