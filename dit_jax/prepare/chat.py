"""A client for servers that speak OpenAI's chat protocol: vLLM, Ollama, llama.cpp, SGLang, OpenAI.

Every request either gets an answer or a reason why not; answers are kept (``answer_cache``), so that
nothing is paid twice. What may pass is tried again, later and later, as the server asks for
(``Retry-After``); what cannot pass is said at once. Answers that a time-out cut off may have been paid
without having arrived: give servers that are slow a long one.

Standard library only. It does not stream, and follows no redirects: they would carry the key away.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import email.utils
import http.client
import io
import json
import math
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from dit_jax.files import SURROGATES
from dit_jax.prepare.answer_cache import Answer, AnswerCache, request_key
from dit_jax.prepare.summary import Summary
from dit_jax.prepare.tables import encodable

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
FATAL = frozenset({401, 403, 404, 405})
"""Statuses that say that the server, key or model is wrong: no other request would fare better."""
PROBE_TIMEOUT = 10.0
MAX_BYTES = 1 << 22
"""Of a response, its headers included. A caption has some hundred bytes."""
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a value that is not of the protocol may raise; deep JSON is a ``RecursionError``."""
Message = Mapping[str, Any]


class ChatError(ValueError):
    """The server cannot be used as it was named: says what to change."""


class Unreachable(ChatError):
    """Nobody answers there."""


class Failed(Exception):
    """One attempt that gave no answer."""

    def __init__(self, reason: str, detail: str, again: bool, wait: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.again, self.wait = reason, again, wait


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a server is asked."""

    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key, which is sent to the server; none is sent where it is
    not set."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds for an answer to come."""
    retries: int = 5
    """Further attempts after one that failed and may pass."""
    backoff: float = 1.0
    """Seconds before the second attempt; every further one waits twice as long, less up to half of it
    at random."""
    max_wait: float = 120.0
    """Seconds to wait at most; a request that the server tells to wait longer fails."""
    give_up_after: int = 20
    """After so many requests in a row that failed, each with all its attempts, no more are sent."""
    max_tokens: int = 1024
    """Of an answer."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit: OpenAI's newer models want the second."""
    temperature: float | None = 0.0
    """Of what the model draws; None leaves it to the server."""
    seed: int | None = 0
    """None leaves it to the server."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "give_up_after", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"chat.{name} is {getattr(self, name)}: it is at least 1.")
        for name in ("retries", "backoff", "max_wait", "temperature"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"chat.{name} is {getattr(self, name)}: it is at least 0.")
        if not self.timeout > 0:
            raise ValueError(f"chat.timeout is {self.timeout}: give seconds above 0.")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A model on a server."""

    url: str
    """The server, ``http://localhost:8000``; with or without ``/v1``."""
    model: str
    options: ChatOptions = ChatOptions()

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError
        except ValueError:
            message = f"the server's address is {self.url!r}: give http://HOST:PORT."
            raise ChatError(message) from None
        if parts.username or parts.query or parts.fragment:
            raise ChatError(
                f"the server's address has more than host and path: give "
                f"{parts.scheme}://{parts.hostname}..., and a key in {self.options.api_key_variable}."
            )
        if not self.model or SURROGATES.search(self.model):
            raise ChatError(
                f"no model of {self.url!r} is named ({self.model!r}): give the name it is served under."
            )

    @property
    def base(self) -> str:
        """The address with its version, ``http://localhost:8000/v1``."""
        base = re.sub(r"/chat/completions$", "", self.url.rstrip("/"))
        path = urllib.parse.urlsplit(base).path
        return base if re.search(r"/v\d\w*(/|$)", path) else f"{base}/v1"

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The body of a request, which is also what an answer is kept under."""
        options = self.options
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        body[options.max_tokens_name] = options.max_tokens
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if options.seed is not None:
            body["seed"] = options.seed
        return body


def message(role: str, text: str, images: Sequence[bytes] = ()) -> Message:
    """A message of ``system``, ``user`` or ``assistant``, with encoded JPEG or PNG images before its
    text."""
    if not images:
        return {"role": role, "content": text}
    content: list[dict[str, Any]] = []
    for image in images:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


class _Bounded(io.RawIOBase):
    """What a server sends, up to ``MAX_BYTES`` and a deadline.

    The time-out of a socket begins anew with every piece, so that dripped headers, a slow body or
    ``100 Continue`` without end would never run into it.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._file, self._sock = sock.makefile("rb", buffering=0), sock
        self._left, self._end = MAX_BYTES, time.monotonic() + timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._sock.settimeout(seconds)
        count = self._file.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise http.client.HTTPException(f"the answer has more than {MAX_BYTES:,} bytes")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Bounded(sock, sock.gettimeout() or PROBE_TIMEOUT))


class _HTTP(http.client.HTTPConnection):
    response_class = _Response


class _HTTPS(http.client.HTTPSConnection):
    response_class = _Response


class _Bound(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections whose answers are bounded."""

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_HTTP, req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_HTTPS, req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        del req, fp, code, msg, headers, newurl


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Goes through the proxies of the environment, unless the server is on this machine."""
    here = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    proxies = urllib.request.ProxyHandler({} if here else None)
    return urllib.request.build_opener(_Bound, _NoRedirect, proxies)


class ChatClient:
    """Asks one model; for several threads. ``sleep`` and ``clock`` (seconds) are for tests."""

    def __init__(
        self,
        config: ChatConfig,
        cache: AnswerCache | None = None,
        *,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.options = config, config.options
        self.cache = AnswerCache() if cache is None else cache
        self.summary = Summary(config.model, config.base, clock)
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._clock, self._random = clock, random.Random()
        self._opener, self._refusal = _opener(config.url), None
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._failed_in_a_row, self._answers = 0, False

    def ask(self, messages: Sequence[Message]) -> Answer | str:
        """The answer to a conversation, or, as a text, the reason why there is none.

        Raises:
            ChatError: where the server refuses the key or does not know the model.
        """
        body = self.config.request(messages)
        key = request_key(body)
        self.summary.count("asked")
        with self.cache.asking(key) as known:
            if known is not None:
                self.summary.count("cached")
                return known
            try:
                answer = self._attempts(body)
            except Failed as error:
                self.summary.count("failed", error.reason)
                return str(error)
            self.cache.put(key, self.config.model, answer)
        self.summary.bill(answer)
        return answer

    def _attempts(self, body: Mapping[str, Any]) -> Answer:
        options = self.options
        for attempt in range(options.retries + 1):
            with self._lock:
                pause, dead = self._not_before - self._clock(), self._failed_in_a_row
            if dead >= options.give_up_after:
                raise Failed("not sent", f"{dead} requests before it failed in a row", again=False)
            if pause > 0:
                self._sleep(pause)
            if self._closed.is_set():
                raise Failed("not sent", "the client was closed", again=False)
            if self._refusal is not None:
                raise self._refusal
            try:
                answer = self._once(body)
            except Failed as error:
                if not error.again or attempt == options.retries or error.wait > options.max_wait:
                    self._note(error)
                    raise
                self.summary.count("retried", error.reason)
                self._wait(attempt, error.wait)
            else:
                self._note(None)
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _note(self, error: Failed | None) -> None:
        with self._lock:
            if error is None:
                self._failed_in_a_row, self._answers = 0, True
            elif error.again or not self._answers:
                # A request that is refused says nothing of others, but where none was answered yet.
                self._failed_in_a_row += 1

    def _wait(self, attempt: int, asked_for: float) -> None:
        """Waits before the next attempt; what a server asks for, all threads wait."""
        longest = min(self.options.backoff * 2**attempt, self.options.max_wait)
        if asked_for:
            with self._lock:
                self._not_before = max(self._not_before, self._clock() + asked_for)
        self._sleep(max(asked_for, longest * self._random.uniform(0.5, 1.0)))

    def _once(self, body: Mapping[str, Any]) -> Answer:
        try:
            raw = self._send("chat/completions", body, self.options.timeout)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except TimeoutError as error:
            raise Failed("time-out", f"after {self.options.timeout:g} s", again=True) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Failed("time-out", "no connection", again=True) from error
            raise Failed("no connection", str(reason) or repr(reason), again=True) from error
        return _parse(raw)

    def _send(self, route: str, body: Mapping[str, Any] | None, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self.options.api_key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):  # The client's own error would show it.
                raise ChatError(
                    f"the key in {self.options.api_key_variable} has characters that no header may "
                    "have: give printable ASCII."
                )
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.config.base}/{route}",
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        with self._opener.open(request, timeout=timeout) as response:
            try:
                return response.read()
            except http.client.IncompleteRead as error:
                return error.partial

    def _refused(self, error: urllib.error.HTTPError) -> Failed:
        """What an error status means for this request; raises ``ChatError`` where it is for all."""
        said = _said(error)
        if error.code in FATAL:
            self._refusal = ChatError(self._remedy(error.code, said))
            raise self._refusal from error
        wait = _retry_after(error.headers.get("Retry-After"))
        if error.code in (301, 302, 303, 307, 308):
            said = f"redirected to {error.headers.get('Location')!r}: name that address"
            return Failed("redirected", said, again=False)
        again = error.code in RETRIED
        if wait > self.options.max_wait:
            said = f"{said} (asks to wait {wait:g} s, chat.max_wait is {self.options.max_wait:g})"
        return Failed(f"status {error.code}", said, again, wait)

    def _remedy(self, code: int, said: str) -> str:
        where = (
            f"the server at {self.config.base} answers {code} for {self.config.model!r} ({said})"
        )
        variable = self.options.api_key_variable
        if code in (401, 403):
            state = "is wrong" if os.environ.get(variable) else "is not set"
            return f"{where}: the environment variable {variable}, which holds the key, {state}."
        return f"{where}: name a model that is served there, and the address without /chat/completions."

    def probe(self) -> None:
        """Asks which models there are, before long work begins; a server need not say.

        Raises:
            Unreachable: where nobody answers.
            ChatError: where the key is refused, or the model is not among those there.
        """
        try:
            raw = self._send("models", None, min(PROBE_TIMEOUT, self.options.timeout))
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code in (401, 403):
                raise ChatError(self._remedy(error.code, said)) from error
            return
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(
                f"no server answers at {self.config.base} ({str(reason) or 'time-out'}): start it "
                f"(such as `vllm serve {self.config.model}`), or give another address."
            ) from error
        try:
            names = [str(one["id"]) for one in json.loads(raw)["data"]]
        except MALFORMED:
            return
        model = self.config.model
        if names and model not in names and f"{model}:latest" not in names:
            near = difflib.get_close_matches(model, names, 1, 0.4)
            raise ChatError(
                f"the server at {self.config.base} has no model {model!r}; it has "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
                + (f" Perhaps {near[0]!r} was meant." if near else "")
            )

    def close(self) -> None:
        """Ends all waiting; requests that wait fail."""
        self._closed.set()


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says about an error, in at most a line."""
    try:
        with error:
            text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value) if isinstance(value, dict) else value)
    except MALFORMED:
        pass
    return encodable(" ".join(text.split())[:300] or error.reason)


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks for, given as seconds or as a date; 0 where it says nothing."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except MALFORMED:
            return 0.0
    return 0.0 if math.isnan(seconds) else max(seconds, 0.0)


def _parse(raw: bytes) -> Answer:
    """The answer in a response; ``Failed`` where it is none, as when a server broke off."""
    try:
        value = json.loads(raw)
        choice, usage = value["choices"][0], value.get("usage") or {}
        said = choice["message"]
        content, refusal = said.get("content"), said.get("refusal")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        if not isinstance(content or "", str) or not isinstance(refusal or "", str):
            raise TypeError("the content is no text")
        return Answer(
            encodable(content or refusal or ""),
            str(choice.get("finish_reason") or "stop"),
            bool(refusal),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except MALFORMED as error:
        start = raw[:80].decode("utf-8", "replace")
        raise Failed(
            "malformed answer", f"{type(error).__name__}, {start!r}", again=True
        ) from error
