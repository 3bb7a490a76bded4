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
import errno
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
import openai

from dit_jax.files import SURROGATES, InputError, as_path, checking_input, is_remote, refuse_if
from dit_jax.prepare.tables import encodable
from dit_jax.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# Statuses that say that the server, key or model is wrong: no other request would fare better.
FATAL = (401, 403, 404, 405)
PROBE_TIMEOUT = 10.0
MAX_BYTES = 1 << 22  # Of a response. A caption has some hundred bytes.
# What reading a value that is not of the protocol may raise; deep JSON is a RecursionError.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
Message = Mapping[str, Any]
A = TypeVar("A")
B = TypeVar("B")


class ChatError(InputError):
    """The server cannot be used as it was named: says what to change."""


class Unreachable(ChatError):
    """Nobody answers there."""


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a server is asked."""

    # The environment variable with the key, which is sent to the server if it is set.
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: PositiveInt = 8  # Requests under way at once.
    timeout: PositiveFloat = 120.0  # Seconds for an answer to come, all of it.
    retries: NonNegativeInt = 5  # Further attempts after one that failed and may pass.
    # After so many requests in a row that failed, each with all its attempts, no more are sent.
    give_up_after: PositiveInt = 20
    max_tokens: PositiveInt = 1024  # Of an answer.
    # What the server calls that limit: OpenAI's newer models want the second.
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: NonNegativeFloat | None = 0.0  # Of sampling; None leaves it to the server.
    seed: int | None = 0  # None leaves it to the server.


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A model on a server, ``http://localhost:8000``, with or without ``/v1``."""

    url: str
    model: str
    options: ChatOptions = ChatOptions()

    def __post_init__(self) -> None:
        address = re.sub(r"//.*@|[?#].*", "...", self.url)  # Without what may be a key.
        host = r"(\[[\da-f:.]+\]|[^\s/:@?#\[\]]+)(:[1-9]\d*)?"
        http = re.fullmatch(rf"https?://{host}(/[^\s?#@]*)?", self.url, re.IGNORECASE)
        remedy = f"give http://HOST:PORT, and a key in {self.options.api_key_variable}"
        refuse_if([(http is None, f"the server's address is {address!r}: {remedy}.")])
        unnamed = not self.model or SURROGATES.search(self.model) is not None
        refuse_if([(unnamed, f"the model of {address!r} is {self.model!r}: name one it serves.")])

    @property
    def base(self) -> str:
        """The address with its version, ``http://localhost:8000/v1``."""
        base = self.url.rstrip("/").removesuffix("/chat/completions")
        path = urllib.parse.urlsplit(base).path
        return base if re.search(r"/v\d\w*(/|$)", path) else f"{base}/v1"

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The body of a request, which is also what an answer is kept under."""
        options = self.options
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        body |= {options.max_tokens_name: options.max_tokens, "temperature": options.temperature}
        body["seed"] = options.seed
        return {name: value for name, value in body.items() if value is not None}


def message(role: str, text: str, images: Sequence[bytes] = ()) -> Message:
    """A message of ``system``, ``user`` or ``assistant``, with JPEG or PNG images before its text."""
    content: list[dict[str, Any]] = []
    for image in images:
        kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": role, "content": [*content, {"type": "text", "text": text}] if images else text}


# Answers, and where they are kept


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said, and the tokens that the server counts (0 if it does not)."""

    text: str
    finish_reason: str = "stop"  # Or "length" (cut at the limit), "content_filter", or another.
    refusal: bool = False  # The server marked the message as a refusal.
    prompt_tokens: int = 0
    completion_tokens: int = 0


def parse_answer(raw: bytes | bytearray) -> Answer:
    """The answer in a response; one of ``MALFORMED`` if it is none, as when a server broke off."""
    value = json.loads(raw)
    choice, usage = value["choices"][0], value.get("usage") or {}
    content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    reason = str(choice.get("finish_reason") or "stop")
    return Answer(encodable(content or refusal or ""), reason, bool(refusal), *tokens)


def user_cache() -> Path:
    """The folder ``dit_jax`` in the user's cache directory (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_jax"


def default_cache() -> Path:
    """Where answers are kept, unless the user says otherwise."""
    return user_cache() / "answers.sqlite"


class AnswerCache:
    """Answers by the hash of their request, in a SQLite file that threads and processes share; without
    a ``path`` they are kept for as long as the object lives."""

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        remote = path is not None and is_remote(path)
        refuse_if([(remote, f"{path!r} cannot keep answers: SQLite needs a local file.")])
        if path is None:
            folder = tempfile.mkdtemp(prefix="dit_jax-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder, "answers")
        self.path = as_path(path)
        self._locks = self.path.with_name(self.path.name + ".locks")
        columns, name = "key TEXT PRIMARY KEY, model TEXT, answer TEXT", repr(str(self.path))
        with checking_input(f"answers cannot be kept in {name}", "name another file"):
            self._locks.mkdir(parents=True, exist_ok=True)
            self._run(f"CREATE TABLE IF NOT EXISTS answers ({columns})")

    def _run(self, command: str, *values: Any) -> Any:
        # A connection for each statement: threads and processes then wait for one another alike.
        try:
            opened = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            with contextlib.closing(opened) as database:
                return database.execute(command, values).fetchone()
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"SQLite: {error}", str(self.path)) from error

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
            row = self._run("SELECT answer FROM answers WHERE key = ?", key)
            yield Answer(**json.loads(row[0])) if row else None

    def __len__(self) -> int:
        return self._run("SELECT count(*) FROM answers")[0]


# The client


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="chat", daemon=True).start()
    return loop


class _Bounded(httpx2.AsyncClient):
    """An HTTP client whose responses are bounded in bytes and in time."""

    # Its own time-outs begin anew with every piece: headers that drip, a slow body or "100 Continue"
    # without end would never run into them.
    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        data = bytearray()
        try:
            async with asyncio.timeout(request.extensions["timeout"]["read"]):
                response = await super().send(request, **{**options, "stream": True})
                async with contextlib.aclosing(response):
                    async for piece in response.aiter_bytes():
                        data += piece
                        if len(data) > MAX_BYTES:
                            large = f"the answer has more than {MAX_BYTES:,} bytes"
                            raise httpx2.RemoteProtocolError(large, request=request)
        except TimeoutError as error:
            raise httpx2.ReadTimeout("not all of it came in time", request=request) from error
        if request.method == "POST" and response.status_code == 200:
            try:
                parse_answer(data)
            except MALFORMED as error:  # Tried again, like a connection that broke.
                said = f"malformed answer: {type(error).__name__}, {bytes(data[:80])!r}"
                raise httpx2.RemoteProtocolError(said, request=request) from error
        # What was read is decoded already.
        headers = {k: v for k, v in response.headers.items() if k != "content-encoding"}
        whole: dict[str, Any] = {"headers": headers, "content": bytes(data), "request": request}
        return httpx2.Response(response.status_code, **whole)


class ChatClient:
    """Asks one model; for several threads."""

    def __init__(self, config: ChatConfig, cache: AnswerCache | None = None) -> None:
        self.config, self.options = config, config.options
        self.cache = AnswerCache() if cache is None else cache
        # Requests asked, answered, cached; attempts; answers that were refused, cut, empty; tokens.
        self.counts: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # Requests that were given up, by reason.
        self._lock = threading.Lock()
        self._under_way: set[concurrent.futures.Future] = set()
        self._closed, self._failed_in_a_row = False, 0
        self._refusal: ChatError | None = None
        key = os.environ.get(self.options.api_key_variable, "").strip()
        # The client's own error would show the key.
        wrong = f"the key in {self.options.api_key_variable} is not printable ASCII: correct it."
        refuse_if([(not (key.isascii() and key.isprintable()), wrong)])
        # What the environment says of an account at OpenAI is no other server's business.
        unsent = ["OpenAI-Organization", "OpenAI-Project", *([] if key else ["Authorization"])]

        async def prepare(request: httpx2.Request) -> None:
            self.count(["attempts"])
            for name in unsent:
                request.headers.pop(name, None)

        here = urllib.parse.urlsplit(config.url).hostname in ("localhost", "127.0.0.1", "::1")
        http = _Bounded(
            trust_env=not here,
            follow_redirects=False,
            event_hooks={"request": [prepare]},
            # Connections are not kept: one that is left open when the program ends is a warning.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        self._client = openai.AsyncOpenAI(
            base_url=config.base,
            api_key=key or "none",
            timeout=self.options.timeout,
            max_retries=self.options.retries,
            http_client=http,
        )

    def ask(self, messages: Sequence[Message]) -> Answer | str:
        """The answer to a conversation, or, as a text, why there is none; ``ChatError`` if the server
        refuses the key or does not know the model."""
        body = self.config.request(messages)
        # Of all that the answer depends on, whatever the order; the address is not in it.
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.count(["asked"])
        with self.cache.asking(key) as known:
            if known is not None:
                self.count(["cached"])
                return known
            answer = self._answer(body)
            if isinstance(answer, Answer):
                self.cache.put(key, self.config.model, answer)
        if isinstance(answer, str):
            with self._lock:
                self.failed[answer.partition(":")[0]] += 1
        else:
            tokens = {"prompt tokens": answer.prompt_tokens}
            tokens["completion tokens"] = answer.completion_tokens
            self.count({"answered": 1, **tokens})
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
                self._refusal = self._remedy(status, said)
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
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        if self._closed:
            future.cancel()
        return future.result()

    def _remedy(self, code: int, said: str) -> ChatError:
        variable = self.options.api_key_variable
        remedy = "name a model that is served there, and the address without /chat/completions"
        if code in (401, 403):
            state = "is wrong" if os.environ.get(variable) else "is not set"
            remedy = f"the environment variable {variable}, which holds the key, {state}"
        where = f"the server at {self.config.base} answers {code} for {self.config.model!r}"
        return ChatError(f"{where} ({said}): {remedy}.")

    def probe(self) -> None:
        """Asks which models there are, before long work begins; a server need not say.

        ``Unreachable`` if nobody answers, ``ChatError`` for a refused key or an absent model.
        """
        model, where = self.config.model, f"the server at {self.config.base}"
        timeout, names = min(PROBE_TIMEOUT, self.options.timeout), []
        client = self._client.with_options(timeout=timeout, max_retries=0)
        try:
            raw = self._wait(client.models.with_raw_response.list())
            names = [str(one["id"]) for one in json.loads(raw.content)["data"]]
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._remedy(error.status_code, _said(error.response)) from error
        except openai.APIConnectionError as error:
            why = (
                f"{where} is not there ({error.__cause__ or error}): start it (such as `vllm serve "
            )
            raise Unreachable(f"{why}{model}`), or give another address.") from error
        except MALFORMED:
            pass
        near = ", ".join(difflib.get_close_matches(model, names, 20, 0.0))
        absent = bool(names) and model not in names and f"{model}:latest" not in names
        if absent:
            raise ChatError(f"{where} has no model {model!r}: name one it has, such as {near}.")

    def count(self, events: Iterable[str] | Mapping[str, int]) -> None:
        """Adds to ``counts``, one of each event or as many as a mapping says."""
        with self._lock:
            self.counts.update(events)

    def summary(self) -> str:
        """What became of the requests and what they cost, in some lines."""
        counts = ", ".join(f"{count} {event}" for event, count in sorted(self.counts.items()))
        failed = [f"\n  failed: {count} x {why}" for why, count in self.failed.items()]
        return f"{self.config.model} at {self.config.base}: {counts}" + "".join(failed)

    def close(self) -> None:
        """Ends what is under way; no more is sent."""
        self._closed = True
        for future in list(self._under_way):
            future.cancel()


def _said(response: Any) -> str:
    """What a server says about an error, in at most a line."""
    text = response.text
    with contextlib.suppress(*MALFORMED):
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value) if isinstance(value, dict) else value)
    return encodable(" ".join(text.split())[:300] or response.reason_phrase)


def ordered(
    function: Callable[[A], B],
    items: Iterable[A],
    threads: int,
    stop: Callable[[], object] = lambda: None,
    ahead: int | None = None,
) -> Iterator[B]:
    """``function`` of every item, as soon as those before it are done; items are drawn as needed.

    At most ``ahead`` results, by default four a thread, wait for an earlier one. If something goes
    wrong (an error in ``function``, a keyboard interrupt) no further items begin, ``stop`` is called,
    and what had begun is waited for.
    """
    waiting: deque[concurrent.futures.Future[B]] = deque()
    most = 4 * threads if ahead is None else ahead
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                while waiting and (len(waiting) > most or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# What answers say beside what was asked for: refusals, labels, quotes, thoughts. The lists are short on
# purpose and look at the beginning alone: a caption may tell of somebody who says "I'm sorry".

REFUSALS = (  # What a refusal begins with, whatever the case, ’ read as '.
    r"(i'?m |i am |we'?re |we are )?(very |so |really )?sorry\b"
    r".*\b(can'?t|cannot|unable|not able|won'?t|but)\b",
    r"(i )?apologi[sz]e\b.*\b(can'?t|cannot|unable|not able|won'?t|but)\b",
    r"(unfortunately, )?i (can'?t|cannot|can not|won'?t|will not|am unable to|am not able to)\b",
    r"(unfortunately, )?i'?m (unable|not able|not comfortable|not allowed)\b",
    r"as an? (ai|artificial intelligence|(large )?language model)\b",
    r"no (images?|videos?|frames?) (was|were|has been|have been|is|are) (provided|attached|given)",
    r"(很|非常)?抱歉|对不起，我(不能|无法)|我(不能|无法)",
)
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
    text = _THOUGHT.sub("", text).replace("’", "'").lstrip(" \t\r\n\"'*")
    return _REFUSAL.match(text) is not None


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
        client.count(["refused"])
        said = " ".join(answer.text.split())[:120]
        return "", f"refused by {'its filter' if filtered else 'the model'}: {said!r}"
    text = clean(answer.text)
    if answer.finish_reason == "length":
        client.count(["cut"])
        limit, text = client.options.max_tokens, whole_sentences(text)
        why = f"cut off at {limit} tokens in its first sentence (raise chat.max_tokens)"
        return text, "" if text else why
    if not text:
        client.count(["empty"])
        return "", "empty answer"
    return text, ""
