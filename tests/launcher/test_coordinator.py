"""The coordinator and its members over real sockets, in one process: who goes, who is lost, who is to blame."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deepspeed.launcher import control, coordinator
from deepspeed.launcher.agent import Membership, take_part
from deepspeed.launcher.control import Lines, Link, LinkLostError, split_address
from deepspeed.launcher.coordinator import Coordinator, State
from deepspeed.launcher.failure import Blame, Failure
from deepspeed.launcher.job import Job
from deepspeed.utils.errors import DeepSpeedError

TOKEN = "t"
Make = Callable[..., Coordinator]
SAME = {"deepspeed": "1", "torch": "2", "python": "3"}


@pytest.fixture(autouse=True)
def _leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that a link which a test does not serve for a while, on a loaded machine, is not taken for lost."""
    _set_leases(monkeypatch, 30.0)


def _set_leases(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (coordinator, control):
        monkeypatch.setattr(module, "LEASE_S", seconds)
        monkeypatch.setattr(module, "BEAT_S", 0.1)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Coordinator] = []

    def build(names: str = "ab", **more: Any) -> Coordinator:
        made.append(Coordinator([f"node {n}" for n in names], TOKEN, grace_s=0.5, bind=("127.0.0.1", 0), **more))
        made[-1].start()
        return made[-1]

    yield build
    for one in made:
        one.stop("over")
        assert one.done.wait(5)
        one.join(5)


def _join(of: Coordinator, index: int, *, token: str = TOKEN, **hello: Any) -> Link:
    return Link.open(
        f"127.0.0.1:{of.port}", token, {"member": index, "host": f"h{index}", **SAME, **hello}, timeout_s=3
    )


def _failure(who: str = "node a", code: int | None = 1, words: str = "boom") -> Failure:
    return Failure(who=who, host="h", code=code, words=words)


def test_members_go_when_all_are_there_and_meet_where_the_first_says(make: Make) -> None:
    job = make()
    second = _join(job, 1)
    first = _join(job, 0, port=1234, address="10.0.0.1")
    for link in (first, second):
        assert link.expect("go")["go"] == {"master_addr": "10.0.0.1", "master_port": 1234}
        link.send({"ended": 0})
    assert job.done.wait(5) and (job.code, job.summary) == (0, "")


def test_a_failure_stops_all_and_is_the_summary(make: Make) -> None:
    job = make()
    links = [_join(job, index) for index in range(2)]
    links[1].send({"failed": _failure("rank 1", -9).to_json()})
    for link in links:
        assert link.expect("stop")["code"] == 247
        link.send({"ended": 1})
    assert job.done.wait(5) and job.code == 247
    assert "---- rank 1 failed first (host h): exit code -9, SIGKILL" in job.summary


def test_a_member_that_closes_or_falls_silent_is_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_leases(monkeypatch, 1.0)
    for vanish, words in ((True, "ended without a word"), (False, "no sign of life for 1 s")):
        job = make()
        links = [_join(job, index) for index in range(2)]
        if vanish:
            links[1].close()
        deadline = time.monotonic() + 5
        stopped = False
        while not stopped and time.monotonic() < deadline:
            links[0].beat()
            stopped = any("stop" in message for message in links[0].receive())
            time.sleep(0.05)
        assert stopped
        links[0].send({"ended": 1})
        assert job.done.wait(5) and job.code == 1
        assert "node b failed first (host h1): lost ----" in job.summary and words in job.summary
        links[1].close()


def test_a_coordinator_that_is_gone_is_noticed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_leases(monkeypatch, 1.0)
    job = make()
    link = _join(job, 0)
    job.stop("over")
    assert "stop" in link.expect("stop")
    with pytest.raises(
        LinkLostError, match=r"no sign of life from the job's coordinator for 1 s|closed the connection"
    ):
        link.expect("nothing", timeout_s=20)


@pytest.mark.parametrize("wrong", ["token", "index", "twice"])
def test_strangers_are_refused(make: Make, wrong: str) -> None:
    job = make()
    link = _join(job, 0) if wrong == "twice" else None
    with pytest.raises(DeepSpeedError, match="takes part already" if wrong == "twice" else "does not know this member"):
        _join(job, 7 if wrong == "index" else 0, token="other" if wrong == "token" else TOKEN)
    assert job.state is State.GATHERING
    if link:
        link.close()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"{}\n",
        b'{"hello": 3, "mac": 1}\n',
        b"\xff\xfe\n",
        b'{"hello": {"member": Infinity}, "mac": ""}\n',
        b'{"hello": {"member": "\\ud800"}, "mac": "\\ud800"}\n',
        b"[" * 100000 + b"\n",
        b"9" * 10000 + b"\n",
    ],
)
def test_rubbish_on_the_port_changes_nothing(make: Make, rubbish: bytes) -> None:
    job = make()
    with socket.create_connection(("127.0.0.1", job.port), timeout=5) as stranger:
        stranger.sendall(rubbish)
        while stranger.recv(4096):
            """Until it hangs up."""
    assert job.state is State.GATHERING and len(job.missing()) == 2
    assert all("go" in link.expect("go") for link in [_join(job, 0), _join(job, 1)])


def test_different_versions_are_named(make: Make) -> None:
    job = make()
    first = _join(job, 0)
    _join(job, 1, torch="9")
    assert "stop" in first.expect("stop")
    first.send({"ended": 1})
    assert job.done.wait(5)
    assert "node b failed first (host h1): packages differ between nodes" in job.summary
    assert "torch is 2 on h0 and 9 on h1" in job.summary
    allowed = make(check_versions=False)
    links = [_join(allowed, 0), _join(allowed, 1, torch="9")]
    assert "go" in links[0].expect("go")


def test_nodes_that_never_come_are_named(make: Make) -> None:
    job = make(start_s=0.5)
    link = _join(job, 0)
    assert "node b did not report within 0 s" in link.expect("stop")["stop"]
    link.send({"ended": 1})
    assert job.done.wait(5) and job.code == 1


def test_a_job_that_queues_counts_from_its_first_member(make: Make) -> None:
    job = make(start_s=0.5, may_queue=True)
    time.sleep(1.2)
    assert job.state is State.GATHERING
    assert "node b did not report within 0 s" in _join(job, 0).expect("stop")["stop"]


def test_a_member_waits_as_long_as_the_coordinator_does_and_says_why_it_stops(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make(start_s=1.5)
    mine = Job(world={"a": [0], "b": [0]}, master_addr="", master_port=1, script="x")
    for tells, seen in ((True, "---- node a did not report within 2 s"), (False, "")):
        member = Membership(
            address=f"127.0.0.1:{job.port}", token=TOKEN, index=1, name="node b", connect_s=3, tells=tells
        )
        assert take_part(member, lambda: mine, lambda job, link: 0) == 1
        assert seen in (written := capfd.readouterr().err) and bool(written) == tells
        job = make(start_s=1.5)


def test_an_elastic_job_survives_a_loss_and_takes_the_node_back(make: Make) -> None:
    job = make(min_members=1, master=("m", 1))
    links = [_join(job, 0), _join(job, 1)]
    assert all(link.expect("go")["go"]["master_addr"] == "m" for link in links)
    links[1].close()
    assert links[0].expect("lost")["lost"] == "node b"
    again = _join(job, 1)
    assert "go" in again.expect("go")
    for link in (links[0], again):
        link.send({"ended": 0})
    assert job.done.wait(5) and job.code == 0


def test_an_elastic_job_below_its_least_ends(make: Make) -> None:
    job = make(min_members=2, master=("m", 1))
    links = [_join(job, 0), _join(job, 1)]
    assert "go" in links[0].expect("go")
    links[1].close()
    assert "fewer than --min_elastic_nodes 2" in links[0].expect("stop")["stop"]
    links[0].send({"ended": 1})
    assert job.done.wait(5) and job.code == 1


@pytest.mark.parametrize("master", ["a", "127.0.0.1"])
def test_an_elastic_job_that_loses_its_meeting_point_says_how_to_go_on(make: Make, master: str) -> None:
    job = make(min_members=1, master=(master, 1))
    links = [_join(job, 0), _join(job, 1)]
    assert "go" in links[1].expect("go")
    links[0].close()
    text = links[1].expect("stop")["stop"]
    assert "---- node a failed first" in text
    assert f"meet at --master_addr {master}; without that node it cannot go on" in text
    assert "Start it again with --master_addr of a node that runs" in text
    links[1].send({"ended": 1})
    assert job.done.wait(5) and job.code == 1


def test_the_cause_is_blamed_even_if_a_consequence_is_told_first() -> None:
    blame = Blame(settle_s=2.0)
    consequence = _failure("rank 0", 1, "RuntimeError: Connection closed by peer [10.0.0.1]:1")
    blame.add(consequence, 10.0)
    assert (blame.first, blame.stop_at_s) == (consequence, 12.0)
    cause = _failure("rank 1", 1, "ValueError: boom")
    blame.add(cause, 10.5)
    assert (blame.first, blame.stop_at_s) == (cause, 10.5)
    assert "rank 1 failed first" in blame.summary() and "failed after it: rank 0 (h)" in blame.summary()


def test_failures_travel_as_they_are() -> None:
    failure = Failure(who="rank 1", host="h", code=-9, words="ü", pid=3, log="/l", what="w")
    assert Failure.from_json(failure.to_json()) == failure


def test_lines_may_come_in_pieces_and_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    assert lines.feed(b'{"a"') == [] and lines.feed(b': 1}\n{"b": 2}\n') == [{"a": 1}, {"b": 2}]
    monkeypatch.setattr(control, "MAX_LINE_NBYTES", 10)
    with pytest.raises(ValueError, match="too long"):
        lines.feed(b"x" * 11)


def test_addresses() -> None:
    assert split_address("h:1") == ("h", 1) and split_address("[::1]:2") == ("::1", 2)
    with pytest.raises(DeepSpeedError, match="is not an address"):
        split_address("h")
