"""A model on a server that speaks OpenAI's chat protocol (vLLM, Ollama, llama.cpp, SGLang, OpenAI).

``openai`` sends the requests: it tries again what may pass, later and later or as ``Retry-After`` says.
Every request gets an answer or a reason why not. Answers are kept in SQLite as soon as they come, so
that nothing is paid twice. Redirects are not followed: they would carry the key away.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import urllib.parse
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai

from dit_jax.files import SURROGATES, InputError, as_path, is_remote, refuse_if
from dit_jax.prepare.tables import encodable

FATAL = (401, 403, 404, 405)
"""Statuses that say that the server, key or model is wrong: no other request would fare better."""
PROBE_TIMEOUT = 10.0
MAX_BYTES = 1 << 22
"""Of a response. A caption has some hundred bytes."""
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a value that is not of the protocol may raise; deep JSON is a ``RecursionError``."""
Message = Mapping[str, Any]


class ChatError(InputError):
    """The server cannot be used as it was named: says what to change."""


class Unreachable(ChatError):
    """Nobody answers there."""


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a server is asked."""

    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key, which is sent to the server if it is set."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds for an answer to come, all of it."""
    retries: int = 5
    """Further attempts after one that failed and may pass."""
    give_up_after: int = 20
    """After so many requests in a row that failed, each with all its attempts, no more are sent."""
    max_tokens: int = 1024
    """Of an answer."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit: OpenAI's newer models want the second."""
    temperature: float | None = 0.0
    """Of the model's sampling; None leaves it to the server."""
    seed: int | None = 0
    """None leaves it to the server."""

    def __post_init__(self) -> None:
        least = dict(concurrency=1, give_up_after=1, max_tokens=1, retries=0, temperature=0)
        values = {name: getattr(self, name) or 0 for name in least}
        faults = [
            (not values[name] >= bound, f"chat.{name} is {values[name]}: it is at least {bound}.")
            for name, bound in least.items()
        ]
        message = f"chat.timeout is {self.timeout}: give seconds above 0."
        refuse_if([*faults, (not self.timeout > 0, message)])


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A model on a server."""

    url: str
    """The server, ``http://localhost:8000``; with or without ``/v1``."""
    model: str
    options: ChatOptions = ChatOptions()

    def __post_init__(self) -> None:
        parts, port = urllib.parse.urlsplit(""), None
        with contextlib.suppress(ValueError):
            parts, port = urllib.parse.urlsplit(self.url), 0
            port = parts.port  # Raises for what is no number, and leaves 0.
        address = f"{parts.scheme}://{parts.hostname}"
        more = bool(parts.username or parts.query or parts.fragment)
        unnamed = not self.model or SURROGATES.search(self.model) is not None
        http = parts.scheme in ("http", "https") and parts.hostname and port != 0
        refuse_if(
            [
                (not http, f"the server's address is {self.url!r}: give http://HOST:PORT."),
                (
                    more,
                    f"the server's address has more than host and path: give {address}..., and a key "
                    f"in {self.options.api_key_variable}.",
                ),
                (
                    unnamed,
                    f"no model of {self.url!r} is named ({self.model!r}): name one it serves.",
                ),
            ]
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
        optional = {"temperature": options.temperature, "seed": options.seed}
        return {
            "model": self.model,
            "messages": list(messages),
            options.max_tokens_name: options.max_tokens,
            **{name: value for name, value in optional.items() if value is not None},
        }


def message(role: str, text: str, images: Sequence[bytes] = ()) -> Message:
    """A message of ``system``, ``user`` or ``assistant``, with JPEG or PNG images before its text."""
    content: list[dict[str, Any]] = []
    for image in images:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": role, "content": [*content, {"type": "text", "text": text}] if images else text}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    finish_reason: str = "stop"
    """``stop``, ``length`` (cut at the limit of tokens), ``content_filter``, or what else was sent."""
    refusal: bool = False
    """The server marked the message as a refusal."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server counts them; 0 if it does not say."""


def request_key(request: Mapping[str, Any]) -> str:
    """The hash of a request's JSON, whatever the order of its keys; the address is not in it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def default_cache() -> Path:
    """``dit_jax/answers.sqlite`` in the user's cache directory (``XDG_CACHE_HOME``)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dit_jax" / "answers.sqlite"


class AnswerCache:
    """Answers by the hash of their request, in a SQLite file that threads and processes share.

    ``path`` None keeps them for as long as the object lives.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        remote = path is not None and is_remote(path)
        refuse_if([(remote, f"{path!r} cannot keep answers: SQLite needs a local file.")])
        if path is None:
            folder = tempfile.mkdtemp(prefix="dit_jax-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder, "answers")
        self.path = as_path(path)
        self._locks = self.path.with_name(self.path.name + ".locks")
        self._lock = threading.Lock()
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._run(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, answer TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            message = f"cannot keep answers in {str(self.path)!r} ({error}): name another file"
            raise InputError(message) from error

    def _run(self, command: str, *values: Any) -> Any:
        try:
            with self._lock:
                return self._database.execute(command, values).fetchone()
        except sqlite3.Error as error:
            raise OSError(f"answers cannot be kept in {str(self.path)!r}: {error}") from error

    def get(self, key: str) -> Answer | None:
        """The answer to a request, if it was given."""
        row = self._run("SELECT answer FROM answers WHERE key = ?", key)
        return Answer(**json.loads(row[0])) if row else None

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keeps an answer; it is on disk when this returns. ``OSError`` if it cannot be."""
        stored = json.dumps(dataclasses.asdict(answer))
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", key, model, stored)

    @contextlib.contextmanager
    def asking(self, key: str) -> Iterator[Answer | None]:
        """Yields the answer, or None to the one that shall ask now; others wait until it is done."""
        # Held by the open file: threads and processes wait alike, and a killed process lets go.
        with (self._locks / key[:2]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self.get(key)

    def __len__(self) -> int:
        return self._run("SELECT count(*) FROM answers")[0]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="chat", daemon=True).start()
    return loop


class _Bounded(httpx2.AsyncClient):
    """An HTTP client whose responses are bounded in bytes and in time.

    Its own time-outs begin anew with every piece: headers that drip, a slow body or ``100 Continue``
    without end would never run into them.
    """

    def __init__(self, counts: Counter[str], dropped: Sequence[str], **options: Any) -> None:
        """``counts``: of "attempts"; ``dropped``: headers that are not sent."""
        # Connections are not kept: one that is left open when the program ends is a warning.
        super().__init__(limits=httpx2.Limits(max_keepalive_connections=0), **options)
        self._counts, self._dropped = counts, dropped

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        self._counts["attempts"] += 1
        for name in self._dropped:
            request.headers.pop(name, None)
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                response = await super().send(request, **{**options, "stream": True})
                async with contextlib.aclosing(response):
                    data = await self._read(response)
        except TimeoutError as error:
            raise httpx2.ReadTimeout("not all of it came in time", request=request) from error
        if request.method == "POST" and response.status_code == 200:
            try:
                parse_answer(data)
            except MALFORMED as error:  # Tried again, like a connection that broke.
                said = f"malformed answer: {type(error).__name__}, {data[:80]!r}"
                raise httpx2.RemoteProtocolError(said, request=request) from error
        headers = {k: v for k, v in response.headers.items() if k != "content-encoding"}
        return httpx2.Response(response.status_code, headers=headers, content=data, request=request)

    async def _read(self, response: httpx2.Response) -> bytes:
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > MAX_BYTES:
                large = f"the answer has more than {MAX_BYTES:,} bytes"
                raise httpx2.RemoteProtocolError(large, request=response.request)
        return bytes(data)


class ChatClient:
    """Asks one model; for several threads."""

    def __init__(self, config: ChatConfig, cache: AnswerCache | None = None) -> None:
        self.config, self.options = config, config.options
        self.cache = AnswerCache() if cache is None else cache
        self.counts: Counter[str] = Counter()
        """Requests ``asked``, ``answered``, ``cached``; ``attempts``; answers of no use: ``refused``,
        ``cut``, ``empty``; and the tokens of those that were answered."""
        self.failed: Counter[str] = Counter()
        """Requests that were given up, by reason."""
        self._lock = threading.Lock()
        self._under_way: set[concurrent.futures.Future] = set()
        self._closed, self._failed_in_a_row = False, 0
        self._refusal: ChatError | None = None
        key = os.environ.get(self.options.api_key_variable, "").strip()
        # The client's own error would show the key.
        wrong = f"the key in {self.options.api_key_variable} is not printable ASCII: correct it."
        refuse_if([(not (key.isascii() and key.isprintable()), wrong)])
        here = urllib.parse.urlsplit(config.url).hostname in ("localhost", "127.0.0.1", "::1")
        self._client = openai.AsyncOpenAI(
            base_url=config.base,
            api_key=key or "none",
            timeout=self.options.timeout,
            max_retries=self.options.retries,
            http_client=_Bounded(
                self.counts,
                # What the environment says of an account at OpenAI is no other server's business.
                ["OpenAI-Organization", "OpenAI-Project", *([] if key else ["Authorization"])],
                timeout=self.options.timeout,
                trust_env=not here,
                follow_redirects=False,
            ),
        )

    def ask(self, messages: Sequence[Message]) -> Answer | str:
        """The answer to a conversation, or, as a text, why there is none; ``ChatError`` if the server
        refuses the key or does not know the model."""
        body = self.config.request(messages)
        key = request_key(body)
        self.count("asked")
        with self.cache.asking(key) as known:
            if known is not None:
                self.count("cached")
                return known
            answer = self._answer(body)
            if isinstance(answer, str):
                with self._lock:
                    self.failed[answer.partition(":")[0]] += 1
                return answer
            self.cache.put(key, self.config.model, answer)
        self.count("answered")
        self.count("prompt tokens", answer.prompt_tokens)
        self.count("completion tokens", answer.completion_tokens)
        return answer

    def _answer(self, body: Mapping[str, Any]) -> Answer | str:
        if self._refusal is not None:
            raise self._refusal
        if self._failed_in_a_row >= self.options.give_up_after:
            return f"not sent: {self._failed_in_a_row} requests before it failed in a row"
        try:
            raw = self._wait(self._client.chat.completions.with_raw_response.create(**body))
        except concurrent.futures.CancelledError:
            return "not sent: the client was closed"
        except openai.APIStatusError as error:
            status, said = error.status_code, _said(error.response)
            if status in FATAL:
                self._refusal = ChatError(self._remedy(status, said))
                raise self._refusal from error
            if moved := error.response.headers.get("location"):
                said = f"redirected to {moved!r}: name that address"
            # A request that is refused says nothing of others, unless none was answered yet.
            if status >= 500 or status in (408, 409, 429) or not self.counts["answered"]:
                self._failed_in_a_row += 1
            return f"status {status}: {said}"
        except openai.APIConnectionError as error:
            self._failed_in_a_row += 1
            if isinstance(error, openai.APITimeoutError):
                return f"time-out: after {self.options.timeout:g} s"
            why = str(error.__cause__ or error) or repr(error)
            return why if why.startswith("malformed answer") else f"no connection: {why}"
        self._failed_in_a_row = 0
        return parse_answer(raw.content)

    def _wait(self, request: Any) -> Any:
        """The result of a request in the thread of the event loop."""
        future = asyncio.run_coroutine_threadsafe(request, _loop())
        with self._lock:
            self._under_way.add(future)
            if self._closed:
                future.cancel()
        try:
            return future.result()
        finally:
            with self._lock:
                self._under_way.discard(future)

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

        ``Unreachable`` if nobody answers, ``ChatError`` for a refused key or an absent model.
        """
        model = self.config.model
        timeout = min(PROBE_TIMEOUT, self.options.timeout)
        client = self._client.with_options(timeout=timeout, max_retries=0)
        try:
            raw = self._wait(client.models.with_raw_response.list())
            names = [str(one["id"]) for one in json.loads(raw.content)["data"]]
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise ChatError(self._remedy(error.status_code, _said(error.response))) from error
            return
        except openai.APIConnectionError as error:
            raise Unreachable(
                f"no server answers at {self.config.base} ({error.__cause__ or error}): start it "
                f"(such as `vllm serve {model}`), or give another address."
            ) from error
        except MALFORMED:
            return
        near = difflib.get_close_matches(model, names, 1, 0.4)
        message = (
            f"the server at {self.config.base} has no model {model!r}; it has "
            f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
            + (f" Perhaps {near[0]!r} was meant." if near else "")
        )
        if names and model not in names and f"{model}:latest" not in names:
            raise ChatError(message)

    def count(self, event: str, by: int = 1) -> None:
        """Adds to ``counts``."""
        with self._lock:
            self.counts[event] += by

    def summary(self) -> str:
        """What became of the requests and what they cost, in some lines."""
        counts, failed = self.counts, self.failed
        useless = {name: counts[name] for name in ("refused", "cut", "empty") if counts[name]}
        lines = [
            f"{self.config.model} at {self.config.base}: {counts['asked']} asked: {counts['answered']} "
            f"answered, {counts['cached']} from cache, {failed.total()} failed",
            f"  billed: {counts['prompt tokens']} + {counts['completion tokens']} tokens, in "
            f"{counts['attempts']} attempts",
        ]
        for name, reasons in (("failed", failed), ("of no use", useless)):
            if reasons:
                lines.append(
                    f"  {name}: " + ", ".join(f"{n} x {why}" for why, n in reasons.items())
                )
        return "\n".join(lines)

    def close(self) -> None:
        """Ends what is under way; no more is sent."""
        with self._lock:
            self._closed = True
            for future in self._under_way:
                future.cancel()


def _said(response: Any) -> str:
    """What a server says about an error, in at most a line."""
    text = response.text
    with contextlib.suppress(*MALFORMED):
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value) if isinstance(value, dict) else value)
    return encodable(" ".join(text.split())[:300] or response.reason_phrase)


def parse_answer(raw: bytes) -> Answer:
    """The answer in a response; one of ``MALFORMED`` if it is none, as when a server broke off."""
    value = json.loads(raw)
    choice, usage = value["choices"][0], value.get("usage") or {}
    content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return Answer(
        encodable(content or refusal or ""),
        str(choice.get("finish_reason") or "stop"),
        bool(refusal),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


# What answers say beside what was asked for: refusals, labels, quotes, thoughts. The lists are short on
# purpose and look at the beginning alone: a caption may tell of somebody who says "I'm sorry".

REFUSALS = (
    r"(i'?m |i am |we'?re |we are )?(very |so |really )?sorry\b"
    r".*\b(can'?t|cannot|unable|not able|won'?t|but)\b",
    r"(i )?apologi[sz]e\b.*\b(can'?t|cannot|unable|not able|won'?t|but)\b",
    r"(unfortunately, )?i (can'?t|cannot|can not|won'?t|will not|am unable to|am not able to)\b",
    r"(unfortunately, )?i'?m (unable|not able|not comfortable|not allowed)\b",
    r"as an? (ai|artificial intelligence|(large )?language model)\b",
    r"no (images?|videos?|frames?) (was|were|has been|have been|is|are) (provided|attached|given)",
    r"(很|非常)?抱歉|对不起，我(不能|无法)|我(不能|无法)",
)
"""Regular expressions that a refusal begins with, whatever the case, ``’`` read as ``'``."""

_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in REFUSALS), re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(
    r"(sure|certainly|of course|okay|ok)[,!.:]?\s+(?=here)|"
    r"here('s| is| are) [^:\n]{0,60}:\s*|"
    r"(short |long |detailed |descriptive |video |image |upsampled |improved )?"
    r"(caption|description|prompt|answer|summary)\s*:\s*",
    re.IGNORECASE,
)
_SHOWS = re.compile(
    r"(the|this) (short |brief )?(video|clip|footage|image|picture|photo|frame|scene|video clip)s? "
    r"(shows|depicts|features|presents|displays|captures) "
    r"(?=(an?|the|one|two|three|four|five|several|some|many|various)\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "`": "`"}
_SENTENCE_END = re.compile(r"[.!?…](?=[\"'”’)]*(\s|$))[\"'”’)]*|[。！？]")


def is_refusal(text: str) -> bool:
    """Whether an answer begins as one of ``REFUSALS``."""
    return (
        _REFUSAL.match(_THOUGHT.sub("", text).replace("’", "'").lstrip(" \t\r\n\"'*")) is not None
    )


def clean(text: str) -> str:
    """An answer as one line without what is around it.

    Removed are the thoughts of reasoning models (``<think>``), bold marks around a label or the whole,
    a first label ("Caption:", "Here is a short caption:"), quotes around the whole, and a first "The
    video shows" before an article or a number word. All else stays as it was said.
    """
    text = " ".join(_THOUGHT.sub("", text).split())
    for _ in range(20):  # An answer made of labels alone would take minutes.
        before = text
        if text.startswith("**") and text.count("**") == 2:
            text = text.replace("**", "").strip()
        if label := _LABEL.match(text):
            text = text[label.end() :].strip()
        closing = _QUOTES.get(text[:1])
        if closing and text.endswith(closing) and closing not in text[1:-1] and len(text) > 1:
            text = text[1:-1].strip()
        if shows := _SHOWS.match(text):
            text = text[shows.end() :]
            text = text[:1].upper() + text[1:]
        if text == before:
            break
    return text


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty where none ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def tell(client: ChatClient, messages: Sequence[Message]) -> tuple[str, str]:
    """What a model says, cleaned, and no reason; or nothing, and the reason why it is of no use.

    An answer that was cut at the limit of tokens loses its last, broken sentence.
    """
    answer = client.ask(messages)
    if isinstance(answer, str):
        return "", answer
    filtered = answer.finish_reason == "content_filter"
    if answer.refusal or filtered or is_refusal(answer.text):
        client.count("refused")
        said = " ".join(answer.text.split())[:120]
        return "", f"refused by {'its filter' if filtered else 'the model'}: {said!r}"
    text = clean(answer.text)
    if answer.finish_reason == "length":
        client.count("cut")
        limit, text = client.options.max_tokens, whole_sentences(text)
        why = f"cut off at {limit} tokens in its first sentence (raise chat.max_tokens)"
        return (text, "") if text else ("", why)
    if not text:
        client.count("empty")
        return "", "empty answer"
    return text, ""
