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


class ChatServer:
    """Answers by ``respond``; ``billed`` counts the answers made to each distinct body."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.billed: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        self.models: Response = Response(body='{"data": [{"id": "seer"}, {"id": "teller:latest"}]}')
        self.lock = threading.Lock()
        self.ended = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.keys.append(self.headers["Authorization"])
                owner.send(self, owner.models)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                owner.keys.append(self.headers["Authorization"])
                owner.answer(self, raw.decode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, raw: str) -> None:
        body = json.loads(raw)
        with self.lock:
            turn = self.seen[raw]
            self.seen[raw] += 1
            self.bodies.append(body)
        if handler.path != "/v1/chat/completions":
            self.send(handler, Response(status=404))
            return
        response = self.respond(body, turn)
        if response.status == 200 and response.body is None and response.cut is None:
            with self.lock:
                self.billed[raw] += 1
        self.send(handler, response)

    def send(self, handler: BaseHTTPRequestHandler, response: Response) -> None:
        self.ended.wait(response.delay)
        data = response.encoded()
        with contextlib.suppress(OSError):
            if response.cut == 0:
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            handler.send_response(response.status)
            for name, value in (*response.headers, ("Content-Length", str(len(data)))):
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data[: response.cut])
            if response.cut is not None:
                handler.connection.shutdown(socket.SHUT_RDWR)

    @property
    def bill(self) -> int:
        return sum(self.billed.values())


@contextlib.contextmanager
def serving(respond: Respond) -> Iterator[ChatServer]:
    """A server for as long as it is needed."""
    server = ChatServer(respond)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
