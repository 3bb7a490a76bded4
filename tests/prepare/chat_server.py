"""A server on loopback that speaks OpenAI's chat protocol, does wrong as told, and bills."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[Mapping[str, Any], int], "Response"]
"""What to do with a request (its body) that comes for the so-many-th time, from 0."""


@dataclasses.dataclass(frozen=True)
class Response:
    """What the server does with one request."""

    text: str | None = "a caption."
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | bytes | None = None
    """In place of the protocol's."""
    finish: str = "stop"
    refusal: str | None = None
    delay: float = 0.0
    cut: int | None = None
    """Bytes of the body after which the connection breaks; 0 sends no headers either."""

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body if isinstance(self.body, bytes) else self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": f"no, {self.status}"}}).encode()
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        return json.dumps({"choices": [choice], "usage": usage}).encode()


def words(body: Mapping[str, Any]) -> str:
    """The text of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: ChatServer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.send(self.server.models)

    def do_POST(self) -> None:
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(raw)
        with server.lock:
            turn = server.seen[raw]
            server.seen[raw] += 1
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
        known = self.path == "/v1/chat/completions"
        response = server.respond(body, turn) if known else Response(status=404)
        if response.status == 200 and response.body is None and response.cut is None:
            with server.lock:
                server.billed[raw] += 1
        self.send(response)

    def send(self, response: Response) -> None:
        self.server.ended.wait(response.delay)
        data = response.encoded()
        with contextlib.suppress(OSError):
            if response.cut != 0:
                self.send_response(response.status)
                for name, value in (*response.headers, ("Content-Length", str(len(data)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: response.cut])
            if response.cut is not None:
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


class ChatServer(ThreadingHTTPServer):
    """Answers by ``respond``; ``billed`` counts the answers made to each distinct body."""

    def __init__(self, respond: Respond) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.url = respond, f"http://127.0.0.1:{self.server_port}"
        self.billed, self.seen = Counter[str](), Counter[str]()
        self.bodies, self.keys = [], []
        self.models = Response(body='{"data": [{"id": "seer"}, {"id": "teller:latest"}]}')
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def bill(self) -> int:
        return sum(self.billed.values())


@contextlib.contextmanager
def serving(respond: Respond) -> Iterator[ChatServer]:
    """A server for as long as it is needed."""
    with ChatServer(respond) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


def client_of(url: str, cache: Any = None, model: str = "seer", **options: Any) -> Any:
    """A client that waits shortly."""
    # Here, for others start the server without a client of this package.
    from dit_jax.prepare.chat import ChatClient, ChatConfig, ChatOptions

    options = ChatOptions(**{"concurrency": 4, "timeout": 0.5, **options})
    return ChatClient(ChatConfig(url, model, options), cache)
