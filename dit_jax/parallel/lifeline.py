"""A process that dies takes the others with it, and they say which it was.

Every process holds a TCP connection to process 0. The kernel closes it when a process dies, however it
dies; a host that vanishes is noticed by its silence. Who learns of a death tells the others, says it on
stderr and ends at once, without waiting for collectives or saves that cannot end any more: a
collective on a TPU waits for ever for a process that is gone.

The port is open to whoever reaches it. A connection must therefore begin with the run's token, a line
that is compared before anything is parsed. Who does not send it within ``STRANGER_SECONDS``, or sends
anything else, is cut off, and at most ``STRANGERS`` may be silent at a time.

JAX's coordination service has heartbeats too. They remain as a second line: they take a minute or more,
name no host, and end a process by SIGABRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

BEAT_SECONDS = 5.0
"""From one sign of life to the next."""
SILENCE_SECONDS = 40.0
"""A process not heard of for so long is gone. Longer than anything holds Python's lock."""
VERDICT_SECONDS = 5.0
"""How long a process whose step failed waits to hear that another's death was the cause."""
FAREWELL_SECONDS = 1.0
"""How long a process that ends leaves the others to hear why."""
RETRY_SECONDS = 0.1
"""How long process 0 waits after a connection that it could not accept."""
STRANGER_SECONDS = 5.0
"""How long a connection may take to show the token."""
STRANGERS = 16
"""Connections that have not shown the token yet. One more and the oldest goes: the run's own processes
send the token as they connect, so that it is never theirs for long."""
MESSAGE_BYTES = 4096
"""Longer lines are no messages of ours."""
REMEDY = (
    "Start all processes again with the same command: training resumes at its newest checkpoint."
)


@dataclasses.dataclass
class Peer:
    """The other end of a connection."""

    line: socket.socket
    name: str = ""
    """Such as "process 1 of 4 (host b)"; empty until it has said so, after the token."""
    member: bool = False
    """Whether it has shown the token: until then it is a stranger."""
    heard: float = dataclasses.field(default_factory=time.monotonic)
    rest: bytes = b""
    """The beginning of a message whose end has not come yet."""


class Lifeline:
    """A process's connections to the others: process 0 has one to each, the others one to it."""

    def __init__(self, index: int, count: int) -> None:
        self.name = f"process {index} of {count} (host {socket.gethostname()})"
        self._peers: list[Peer] = []
        self._server: socket.socket | None = None
        self._token = secrets.token_hex(16)
        self._closing = False
        self._lock = threading.Lock()

    def listen(self) -> str:
        """Waits for the others; returns what they need to ``join``. For process 0."""
        try:
            self._server = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
        except (OSError, ValueError):  # a host without IPv6
            self._server = socket.create_server(("", 0), backlog=1024)
        self._start()
        port = self._server.getsockname()[1]
        return json.dumps({"port": port, "token": self._token, "name": self.name})

    def join(self, host: str, invitation: str) -> None:
        """Connects to process 0 on ``host``. For the other processes."""
        known = json.loads(invitation)
        line = socket.create_connection((host.strip("[]"), known["port"]), timeout=30)
        line.sendall(known["token"].encode() + b"\n")
        self._peers.append(Peer(line, known["name"], member=True))
        self._tell({"hello": self.name})
        self._start()

    def close(self) -> None:
        """Tells the others that this process has ended well. Call it when all have come to the end."""
        self._closing = True
        self._tell({"end": True})

    def fail(self, error: BaseException, prog: str, user_error: bool) -> NoReturn:
        """Ends this process, and with it the others, because of an error in this one.

        An error of the user ends them with status 2 and one line, any other with status 1 and its
        traceback. If such an error only follows from another's death, that ends this process meanwhile.
        """
        if not user_error:
            time.sleep(VERDICT_SECONDS)
            traceback.print_exception(error)
        self._closing = True
        status = 2 if user_error else 1
        reason = (str(error).strip().splitlines() or [""])[0]
        text = f"{self.name} failed ({type(error).__name__}: {reason[:300]})."
        self._tell({"stop": text, "status": status})
        if user_error:
            _say(f"{prog}: error: {error}")
        time.sleep(FAREWELL_SECONDS)
        os._exit(status)

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        """Listens and gives signs of life, as long as the process lives."""
        with selectors.DefaultSelector() as selector:
            if self._server:
                selector.register(self._server, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.line, selectors.EVENT_READ, peer)
            beaten = time.monotonic()
            while True:
                for key, _ in selector.select(BEAT_SECONDS):
                    if key.data is None:
                        self._accept(selector)
                    elif key.data in self._peers and not self._hear(key.data):
                        self._drop(selector, key.data)
                now = time.monotonic()
                if now - beaten >= BEAT_SECONDS:
                    beaten = now
                    self._tell({})
                for peer in list(self._peers):
                    if peer.name and now - peer.heard > SILENCE_SECONDS:
                        self._lost(peer, f"not heard of for {SILENCE_SECONDS:.0f} s")
                    elif not peer.name and now - peer.heard > STRANGER_SECONDS:
                        self._drop(selector, peer)

    def _drop(self, selector: selectors.BaseSelector, peer: Peer) -> None:
        selector.unregister(peer.line)
        self._peers.remove(peer)
        peer.line.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        """Takes a connection, if that is possible.

        Where it is not (no file descriptors are left, or the other end has given up), those that there
        are must be heard all the same. One that still waits is tried again.
        """
        assert self._server is not None
        try:
            line, _ = self._server.accept()
        except OSError:
            time.sleep(RETRY_SECONDS)  # select() returns at once while a connection waits
            return
        line.settimeout(BEAT_SECONDS)
        if len(strangers := [peer for peer in self._peers if not peer.name]) >= STRANGERS:
            self._drop(selector, strangers[0])
        peer = Peer(line)
        self._peers.append(peer)
        selector.register(line, selectors.EVENT_READ, peer)

    def _hear(self, peer: Peer) -> bool:
        """Takes what a peer has to say; False if it says no more."""
        try:
            data = peer.line.recv(65536)
        except OSError:
            data = b""
        if not data:
            if peer.name:
                self._lost(peer, "its connection closed")
            return False
        *messages, peer.rest = (peer.rest + data).split(b"\n")
        if not peer.member:
            # Compared as bytes, in constant time, and nothing of it is parsed.
            token = self._token.encode()
            if not messages and len(peer.rest) <= len(token):
                return True  # the end of its line has not come yet
            peer.member = bool(messages) and hmac.compare_digest(messages.pop(0), token)
            if not peer.member:
                return False
        if peer.name:
            peer.heard = time.monotonic()
        peer.rest = peer.rest[:MESSAGE_BYTES]
        return all(self._take(peer, message) for message in messages)

    def _take(self, peer: Peer, message: bytes) -> bool:
        """Does what a message says; False if its sender says no more."""
        try:
            said = json.loads(message[:MESSAGE_BYTES])
            if not peer.name:
                peer.name, peer.heard = str(said["hello"]), time.monotonic()
            stop, status, end = said.get("stop"), int(said.get("status", 1)), "end" in said
        except Exception:  # Whatever it is, this thread goes on.
            return bool(peer.name)
        if stop:
            self._stop(str(stop), status, peer)
        return not end

    def _lost(self, peer: Peer, how: str) -> None:
        self._stop(f"{peer.name} is gone ({how}).", 1, peer)

    def _stop(self, text: str, status: int, source: Peer) -> None:
        """Ends this process for what happened to another, after the rest have been told."""
        if self._closing:
            return
        remedy = "" if status == 2 else f" {REMEDY}"  # Wrong input stays wrong.
        _say(f"\n{self.name}: {text}{remedy}")
        self._tell({"stop": text, "status": status}, besides=source)
        if self._server:
            # The others lose JAX's coordination service with this process.
            time.sleep(FAREWELL_SECONDS)
        os._exit(status)

    def _tell(self, message: dict[str, Any], besides: Peer | None = None) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in list(self._peers):
                if peer.name and peer is not besides:
                    with contextlib.suppress(OSError):  # listening to it will tell
                        peer.line.sendall(data)


def _say(text: str) -> None:
    """Writes lines to stderr at once: several that end together do not write into each other's."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def delay_aborts() -> None:
    """Makes ``abort()`` wait six seconds, so that there is time to say who died.

    JAX's client aborts the process from a thread of its own as soon as process 0, and with it the
    coordination service, is gone; no callback of Python's can take its place (jaxlib fails to convert
    the status that it is to be called with). As the handler of SIGABRT, C's ``sleep`` is called with
    the signal's number: 6. The thread that aborts sleeps, the lifeline speaks and ends the process.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), libc.sleep)
