"""Connections on loopback, all in one process; in place of ending it, the status is noted."""

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
    hello = {"hello": f"process {index} of {count} (host b)", "token": token or known["token"]}
    line.sendall(json.dumps(hello).encode() + b"\n")
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
    ("error", "status"), [(ValueError("rows is 0"), 2), (RuntimeError("no memory\nleft"), 1)]
)
def test_failure_is_told_with_its_status(exits, said, error, status):
    first, second, third = Lifeline(0, 3), Lifeline(1, 3), Lifeline(2, 3)
    invitation = first.listen()
    second.join("127.0.0.1", invitation)
    third.join("127.0.0.1", invitation)
    threading.Thread(target=second.fail, args=(error, "prog"), daemon=True).start()
    lines = said(exits, 3)
    assert exits == [status] * 3
    reason = str(error).splitlines()[0]
    text = f"{second.name} failed ({type(error).__name__}: {reason})."
    assert sum(text in line for line in lines) == 2
    assert ("prog: error: rows is 0" in lines) == (status == 2)
    assert any("Traceback" in line or "RuntimeError: no memory" == line for line in lines) == (
        status == 1
    )


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


def test_strangers_are_not_heard(exits, said):
    first = Lifeline(0, 2)
    invitation = first.listen()
    with dial(invitation, 1, token="guess") as line:
        assert line.recv(10) == b""  # refused
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n"):
        with socket.create_connection(("127.0.0.1", json.loads(invitation)["port"])) as line:
            line.sendall(text)
            assert line.recv(10) == b""
    assert said(exits, 1, seconds=0.3) == [] and exits == []
