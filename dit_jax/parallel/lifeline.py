"""A process that dies takes the others with it, and they say which it was.

Every process holds a TCP connection to process 0. The kernel closes it when a process dies, however it
dies; a host that vanishes is noticed by its silence. Who learns of a death tells the others, says it on
stderr and ends at once, without waiting for collectives or saves that cannot end any more: a
collective on a TPU waits for ever for a process that is gone.

JAX's coordination service has heartbeats too. They remain as a second line: they take a minute or more,
name no host, and end a process by SIGABRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
REMEDY = (
    "Start all processes again with the same command: training resumes at its newest checkpoint."
)


@dataclasses.dataclass
class Peer:
    """The other end of a connection."""

    line: socket.socket
    name: str = ""
    """Such as "process 1 of 4 (host b)"; empty until it has shown that it belongs to the run."""
    heard: float = dataclasses.field(default_factory=time.monotonic)
    rest: bytes = b""
    """The beginning of a message whose end has not come yet."""


class Lifeline:
    """A process's connections to the others: process 0 has one to each, the others one to it."""

    def __init__(self, index: int, count: int) -> None:
        self.name = f"process {index} of {count} (host {socket.gethostname()})"
        self._peers: list[Peer] = []
        self._server: socket.socket | None = None
        self._token = secrets.token_hex(8)
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
        self._peers.append(Peer(line, known["name"]))
        self._tell({"hello": self.name, "token": known["token"]})
        self._start()

    def close(self) -> None:
        """Tells the others that this process has ended well. Call it when all have come to the end."""
        self._closing = True
        self._tell({"end": True})

    def fail(self, error: BaseException, prog: str) -> NoReturn:
        """Ends this process, and with it the others, because of an error in this one.

        Where the error only follows from another's death, that ends this process meanwhile.
        """
        if not isinstance(error, ValueError):
            time.sleep(VERDICT_SECONDS)
            traceback.print_exception(error)
        self._closing = True
        status = 2 if isinstance(error, ValueError) else 1
        reason = (str(error).strip().splitlines() or [""])[0]
        text = f"{self.name} failed ({type(error).__name__}: {reason[:300]})."
        self._tell({"stop": text, "status": status})
        if isinstance(error, ValueError):
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
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        self._peers.remove(key.data)
                        key.data.line.close()
                now = time.monotonic()
                if now - beaten >= BEAT_SECONDS:
                    beaten = now
                    self._tell({})
                for peer in self._peers:
                    if peer.name and now - peer.heard > SILENCE_SECONDS:
                        self._lost(peer, f"not heard of for {SILENCE_SECONDS:.0f} s")

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
        peer.heard = time.monotonic()
        *messages, peer.rest = (peer.rest + data).split(b"\n")
        for message in messages:
            try:
                said = json.loads(message)
                if not peer.name and said["token"] == self._token:
                    peer.name = said["hello"]
            except (ValueError, LookupError, TypeError):
                said = {}
            if not peer.name:
                return False  # a stranger
            if "stop" in said:
                self._stop(said["stop"], said["status"], peer)
            if "end" in said:
                return False
        return True

    def _lost(self, peer: Peer, how: str) -> None:
        self._stop(f"{peer.name} is gone ({how}).", 1, peer)

    def _stop(self, text: str, status: int, source: Peer) -> None:
        """Ends this process for what happened to another, after the rest have been told."""
        if self._closing:
            return
        _say(f"\n{self.name}: {text} {REMEDY}")
        self._tell({"stop": text, "status": status}, besides=source)
        if self._server:
            # The others lose JAX's coordination service with this process.
            time.sleep(FAREWELL_SECONDS)
        os._exit(status)

    def _tell(self, message: dict[str, Any], besides: Peer | None = None) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in list(self._peers):
                if peer is not besides:
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
