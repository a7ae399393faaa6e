"""A rank that dies or hangs is named, and ends all ranks; a signal is obeyed while a rank waits."""

import contextlib
import dataclasses
import errno
import io
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.train import watchdog
from sinklm.train.hangs import Mark, RankState, describe_hang, find_hang
from sinklm.train.peers import SIGNAL, Address, Line, Peers

from .processes import Ranks
from .tiny import wait_for_step
from .worker import run_calls

LONG = ["train.num_steps=100000", "validation.every_steps=null", "checkpoint.every_steps=null"]
LIMIT = 600.0

ranks_states = st.lists(
    st.builds(
        lambda count, idle, silent, extra: RankState(
            Address(0, "host", "machine", 1), Mark(count, 3, "reading samples", extra), idle, silent
        ),
        st.integers(0, 5),
        st.floats(0, 1000),
        st.one_of(st.just(0.0), st.floats(0, 1000)),
        st.sampled_from([0.0, 300.0]),
    ),
    min_size=1,
    max_size=8,
)


@given(ranks_states)
def test_no_rank_is_behind_before_one_is_late(states):
    is_any_late = any(s.idle > LIMIT + s.mark.extra_seconds or s.silent > LIMIT for s in states)
    assert bool(find_hang(states, LIMIT)) == is_any_late


@given(ranks_states)
def test_those_that_are_silent_or_else_those_with_the_fewest_marks_are_behind(states):
    behind = find_hang(states, LIMIT)
    if behind and all(s.silent == 0 for s in states):
        assert {s.mark.count for s in behind} == {min(s.mark.count for s in states)}
    if behind and any(s.silent > LIMIT for s in states):
        assert all(s.silent > 0 for s in behind)


def test_a_rank_that_could_not_connect_is_not_behind():
    apart = RankState(Address(1, "host", "machine", 1), idle=1e6, silent=1e6, is_connected=False)
    present = RankState(Address(0, "host", "machine", 1), idle=1.0)
    assert find_hang([apart, present], LIMIT) == []


def test_a_rank_that_has_left_is_not_behind():
    left = RankState(Address(1, "host", "machine", 1), idle=1e6, silent=1e6, has_left=True)
    present = RankState(Address(0, "host", "machine", 1), idle=1.0)
    assert find_hang([left, present], LIMIT) == []


@pytest.mark.parametrize(
    ("state", "num_ranks", "message"),
    [
        (
            RankState(Address(3, "gpu7", "", 42), Mark(5, 120, "reading samples"), 601.0, 0.0, "  a frame\n"),
            8,
            "rank 3 (host gpu7, process 42) has made no progress for 10 minutes (train.hang_timeout_minutes is 10). It "
            "was reading samples (step 120). Its Python stack:\n  a frame\nAll ranks have ended; run the same command "
            "again",
        ),
        (
            RankState(Address(3, "gpu7", "", 42), Mark(5, 0, "opening the data"), 601.0, 599.0),
            8,
            "rank 3 (host gpu7, process 42) has not answered for 599 s: it is stopped, or its host cannot be reached. "
            "It was last seen opening the data. All others have ended. End it if it still runs; run the same command",
        ),
    ],
)
def test_the_message_names_the_rank(state, num_ranks, message):
    assert describe_hang([state], num_ranks, LIMIT).startswith(message)


def test_the_message_has_the_time_without_progress_where_steps_are_slow():
    state = RankState(Address(0, "gpu1", "", 7), Mark(5, 2, "computing a step"), idle=4000.0)
    assert "made no progress for 66.7 minutes (train.hang_timeout_minutes is 10)" in describe_hang([state], 1, LIMIT)


@pytest.fixture
def pair():
    """The connections of rank 0 and rank 1, made while rank 0 waits for messages."""
    peers = [Peers(0, 2), Peers(1, 2)]
    connecting = threading.Thread(target=peers[1].connect, args=(peers[0].address(),))
    connecting.start()
    while connecting.is_alive():
        assert peers[0].wait(0.05) == []
    yield peers
    for one in peers:
        one.close()


def receive(peers: Peers, seconds: float = 60.0) -> list:
    deadline = time.monotonic() + seconds
    found: list = []
    while not found and time.monotonic() < deadline:
        found = peers.wait(0.05)
    return found


def test_messages_go_both_ways_and_a_closed_connection_is_noticed(pair):
    main, other = pair
    other.send({"idle": 1.5})
    main.send({"ask": "stack"})
    assert receive(main) == [(1, {"idle": 1.5})]
    assert receive(other) == [(0, {"ask": "stack"})]
    other.lines[0].connection.close()
    other.lines.clear()
    assert receive(main) == [(1, None)]


@pytest.mark.parametrize(
    "hello", [b'{"token": "0000", "rank": 1}\n', b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"", b"{}\n"]
)
def test_a_stranger_is_not_a_rank(hello):
    main = Peers(0, 2)
    with socket.create_connection(("127.0.0.1", main.address().port)) as stranger:
        stranger.sendall(hello)
        stranger.shutdown(socket.SHUT_WR)
        assert main.wait(0.2) == main.wait(0.2) == []
        assert main.lines == {}
        with pytest.raises(EOFError):
            Line(stranger).receive()
    main.close()


def test_a_welcome_and_what_follows_may_arrive_together():
    main, other = Peers(0, 2), Peers(1, 2)
    answered = threading.Event()

    def answer() -> None:
        while not main.lines:
            main.wait(0.05)
        main.send({"idle": 1.0})  # a heartbeat, right behind the welcome
        answered.set()

    thread = threading.Thread(target=answer)
    thread.start()
    address = main.address()
    receive_one = Line.receive

    def late(line: Line) -> list:
        assert answered.wait(60)
        return receive_one(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Line, "receive", lambda line: late(line) if line.rank == 0 else receive_one(line))
        other.connect(address)
    thread.join()
    other.send({"idle": 2.0})
    assert receive(main) == [(1, {"idle": 2.0})]
    main.close()
    other.close()


def test_a_rank_that_connects_again_is_not_dead():
    main = Peers(0, 2)
    address = main.address()
    first, second = Peers(1, 2), Peers(1, 2)
    for peers in (first, second):
        connecting = threading.Thread(target=peers.connect, args=(address,))
        connecting.start()
        while connecting.is_alive():
            assert main.wait(0.05) == []
    first.close()
    assert main.wait(0.2) == main.wait(0.2) == []
    second.send({"idle": 2.0})
    assert receive(main) == [(1, {"idle": 2.0})]
    second.close()
    assert receive(main) == [(1, None)]
    main.close()


def test_a_rank_0_that_cannot_be_reached_is_an_error():
    main, other = Peers(0, 2), Peers(1, 2)
    address = main.address()
    main.close()
    with pytest.raises(ConnectionError, match=rf"rank 1 cannot connect to rank 0 at .*, port {address.port}"):
        other.connect(dataclasses.replace(address, hosts=("127.0.0.1",)))
    other.close()


def test_a_signal_arrives_as_a_message(pair):
    before = signal.set_wakeup_fd(pair[0].signal_fd)
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, old)
    assert receive(pair[0]) == [(SIGNAL, signal.SIGUSR1)]


def test_a_watchdog_ends_at_once(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK", 1000.0)
    watching = watchdog.Watchdog(0, 1, hang_timeout=None, exchange=lambda value: [value], warn=pytest.fail)
    watching.close()
    assert not watching._thread.is_alive()


def test_a_watchdog_that_cannot_print_ends_the_process(monkeypatch):
    """The terminal was closed, or the reader of a pipe has ended."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    ended: list[int] = []
    watching = watchdog.Watchdog(0, 1, hang_timeout=None, exchange=lambda value: [value], warn=pytest.fail)
    watching.close()
    with monkeypatch.context() as changed, contextlib.suppress(OSError):
        changed.setattr(watchdog.sys, "stderr", Closed())
        changed.setattr(watchdog.os, "_exit", ended.append)
        watching._exit("error: rank 1 died", status=1)
    assert ended == [1]


def run_two(recipe: str, folder: Path, **events) -> Ranks:
    call = {"recipe": recipe, "overrides": [f"train.run_dir={folder / 'run'}", *LONG, *events.pop("overrides", [])]}
    return Ranks(run_calls, [{**call, **events}], world_size=2)


@pytest.mark.slow
def test_a_hanging_rank_is_named_with_its_stack_and_all_end(recipe, tmp_path):
    hang = {"hang": [1, 4, 1], "watchdog": {"SUSPICION": 2.0, "GRACE": 1.0}}
    ranks = run_two(recipe, tmp_path, **hang, overrides=["train.hang_timeout_minutes=0.05"])
    (status, output), (other_status, other_output) = ranks.wait()
    assert (status, other_status) == (1, 1)
    (error,) = re.findall(r"^error: .*", output, re.MULTILINE)
    assert re.match(
        r"error: rank 1 \(host \S+, process \d+\) has made no progress for 0\.\d+ minutes "
        r"\(train.hang_timeout_minutes is 0.05\). It was reading samples \(step 4\). Its Python stack:",
        error,
    )
    assert "in hanging\n" in output
    assert "error" not in other_output


@pytest.mark.slow
def test_a_signal_is_obeyed_although_the_other_rank_is_stopped(recipe, tmp_path):
    ranks = run_two(recipe, tmp_path, watchdog={"STOP_GRACE": 1.0})
    try:
        wait_for_step(tmp_path / "run", 3)
        ranks.signal(signal.SIGSTOP, rank=1)
        time.sleep(0.5)  # rank 0 is waiting for it
        ranks.signal(signal.SIGTERM, rank=0)
        ranks.processes[0].join(timeout=120)
        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    finally:
        ranks.signal(signal.SIGKILL, rank=1)
    output = ranks.wait()[0][1]
    assert "SIGTERM: finishing the current steps, then saving" in output
    assert "SIGTERM: ended without saving, because the process was blocked" in output
