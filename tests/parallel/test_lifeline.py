"""Connections on loopback, all in one process; in place of ending it, the status is noted."""

import contextlib
import errno
import json
import os
import socket
import threading
import time

import pytest

from dit_jax.parallel import lifeline
from dit_jax.parallel.lifeline import Lifeline


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which processes would have ended; who ends does nothing any more."""
    found = []

    def note(status):
        found.append(status)
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", note)
    monkeypatch.setattr(lifeline, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(lifeline, "VERDICT_SECONDS", 0.05)
    monkeypatch.setattr(lifeline, "FAREWELL_SECONDS", 0.05)
    return found


@pytest.fixture
def said(capfd):
    """Waits for so many processes to have ended, and gives the lines that they said."""
    lines = []

    def wait(exits, count, seconds=5):
        deadline = time.monotonic() + seconds
        while len(exits) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        lines.extend(line for line in capfd.readouterr().err.splitlines() if line)
        return lines

    return wait


def dial(invitation, index, token=None, count=3):
    """A connection as another process makes it, to be closed at will."""
    known = json.loads(invitation)
    line = socket.create_connection(("127.0.0.1", known["port"]))
    hello = json.dumps({"hello": f"process {index} of {count} (host b)"})
    line.sendall(f"{token or known['token']}\n{hello}\n".encode())
    return line


def test_all_learn_who_died(exits, said):
    first, second = Lifeline(0, 3), Lifeline(1, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    dial(invitation, 2).close()
    lines = sorted(said(exits, 2))
    assert exits == [1, 1]
    assert len(lines) == 2
    for line, survivor in zip(lines, (first, second), strict=True):
        assert line.startswith(
            f"{survivor.name}: process 2 of 3 (host b) is gone (its connection closed). Start all "
        )
        assert "training resumes at its newest checkpoint" in line


def test_death_of_process_0_is_noticed(exits, said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = Lifeline(1, 2)
        invitation = {"port": server.getsockname()[1], "token": "x", "name": "process 0 of 2"}
        other.join("127.0.0.1", json.dumps(invitation))
        line, _ = server.accept()
        line.close()
    assert f"{other.name}: process 0 of 2 is gone (its connection closed)" in said(exits, 1)[0]
    assert exits == [1]


def test_silence_is_death(exits, said):
    first, second = Lifeline(0, 3), Lifeline(1, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    with dial(invitation, 2):
        lines = said(exits, 2)
    assert exits == [1, 1]
    assert all("process 2 of 3 (host b) is gone (not heard of for 1 s)" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("rows is 0"), 2), (RuntimeError("no memory\nleft"), 1), (ValueError("a b"), 1)],
)
def test_failure_is_told_with_its_status(exits, said, monkeypatch, error, status):
    # On a busy machine a process may be silent for longer than the short time of these tests.
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 30.0)
    first, second, third = Lifeline(0, 3), Lifeline(1, 3), Lifeline(2, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    third.join("127.0.0.1", invitation)
    threading.Thread(target=second.fail, args=(error, "prog", status == 2), daemon=True).start()
    lines = said(exits, 3)
    assert exits == [status] * 3
    reason = str(error).splitlines()[0]
    text = f"{second.name} failed ({type(error).__name__}: {reason})."
    assert sum(text in line for line in lines) == 2
    assert ("prog: error: rows is 0" in lines) == (status == 2)
    assert any(line == f"{type(error).__name__}: {reason}" for line in lines) == (status == 1)


def test_nothing_happens_while_all_live_and_when_they_end(exits, said):
    first, second = Lifeline(0, 2), Lifeline(1, 2)
    invitation = first.listen()
    second.join("localhost", invitation)
    time.sleep(1.0)  # longer than the silence that counts as death
    second.close()
    first.close()
    assert said(exits, 1, seconds=0.3) == [] and exits == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED])
def test_a_connection_that_cannot_be_accepted_ends_nothing(exits, said, monkeypatch, number):
    first, second = Lifeline(0, 3), Lifeline(1, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    time.sleep(0.1)
    accept, tries, works = socket.socket.accept, [], threading.Event()

    def refuse(server):
        if works.is_set():
            return accept(server)
        tries.append(server)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with dial(invitation, 2):
        time.sleep(1.0)  # longer than the silence that counts as death
        assert exits == []  # the first still listens to the second, and gives signs of life
        assert 2 <= len(tries) <= 12  # and does nothing else in vain
        works.set()
        time.sleep(0.3)
    lines = said(exits, 2)
    assert exits == [1, 1]
    assert all("process 2 of 3 (host b) is gone (its connection closed)" in line for line in lines)


def knock(invitation, data=b""):
    """A connection of someone who knows no token."""
    line = socket.create_connection(("127.0.0.1", json.loads(invitation)["port"]), timeout=5)
    with contextlib.suppress(ConnectionError, TimeoutError):  # cut off while it talks
        line.sendall(data)
    return line


def is_cut_off(line):
    try:
        return line.recv(10) == b""
    except ConnectionError:
        return True


def assert_alive(exits, said, invitation):
    """The watcher of the first still notices the end of another process."""
    assert exits == []
    dial(invitation, 2).close()
    lines = said(exits, 2)
    assert exits == [1, 1]
    assert all("process 2 of 3 (host b) is gone (its connection closed)" in line for line in lines)


@pytest.fixture
def joint(exits):
    """Two processes of three that are joined, and the invitation of the first."""
    first, second = Lifeline(0, 3), Lifeline(1, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    return first, invitation, second


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b"\n",
        b"[" * 200_000,
        b"[" * 200_000 + b"\n",
        b"x" * 20_000_000,
        b'{"token": "guess", "stop": "all", "status": 0}\n',
        b"\xff\xfe\n",
    ],
    ids=["http", "list", "empty", "brackets", "line of brackets", "endless", "stop", "no text"],
)
def test_strangers_are_not_heard(exits, said, joint, data):
    first, invitation, _ = joint
    with knock(invitation, data) as line:
        assert is_cut_off(line)
    with dial(invitation, 1, token="guess") as line:
        assert is_cut_off(line)
    assert sum(len(peer.rest) for peer in first._peers) < 10_000
    assert_alive(exits, said, invitation)


def test_who_says_nothing_or_little_is_cut_off(exits, said, joint, monkeypatch):
    monkeypatch.setattr(lifeline, "STRANGER_SECONDS", 0.3)
    _, invitation, _ = joint
    with knock(invitation) as silent, knock(invitation, b"a") as slow:
        clock = time.monotonic()
        while time.monotonic() - clock < 0.6:  # a byte now and then gives no more time
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"a")
            time.sleep(0.1)
        assert is_cut_off(silent) and is_cut_off(slow)
    assert_alive(exits, said, invitation)


def test_many_connections_use_nothing_up_and_keep_nobody_out(exits, said, joint):
    first, invitation, _ = joint
    idle = [knock(invitation) for _ in range(300)]
    time.sleep(0.3)
    assert len(first._peers) <= 17
    with dial(invitation, 2):
        time.sleep(0.2)
        assert [peer.name for peer in first._peers if peer.name][-1] == "process 2 of 3 (host b)"
        assert exits == []
    assert said(exits, 2) and exits == [1, 1]
    for line in idle:
        line.close()


@pytest.mark.parametrize("text", ["[" * 2000, "[]", "{}", '{"stop": 3, "status": []}', "x" * 9000])
def test_nonsense_of_a_member_ends_nothing(exits, said, joint, text):
    _, invitation, _ = joint
    with dial(invitation, 3) as line:
        line.sendall(f"{text}\n".encode())
        time.sleep(0.2)
        assert exits == []
        line.sendall(b'{"end": true}\n')
        time.sleep(0.1)
    assert_alive(exits, said, invitation)


def test_strangers_are_told_nothing(exits, said, joint):
    _, invitation, _ = joint
    with knock(invitation) as line:
        dial(invitation, 2).close()
        said(exits, 2)
        line.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            assert line.recv(1000) == b""
