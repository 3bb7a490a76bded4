"""The chat client against a server that fails in every way: nothing lost, nothing paid twice."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest

from dit_jax.config import check_types
from dit_jax.prepare.chat import (
    MAX_BYTES,
    Answer,
    AnswerCache,
    ChatClient,
    ChatConfig,
    ChatError,
    ChatOptions,
    Unreachable,
    clean,
    default_cache,
    is_refusal,
    message,
    ordered,
    tell,
    whole_sentences,
)
from tests.prepare.chat_server import Respond, Response, serving, words
from tests.runs import ROOT, free_port

QUICK = ChatOptions(timeout=0.5, concurrency=8)


pytestmark = pytest.mark.usefixtures("slept")


def client_of(url, options=QUICK, cache=None, model="seer"):
    return ChatClient(ChatConfig(url, model, options), cache)


def ask(client: ChatClient, text: str) -> Answer | str:
    return client.ask([message("user", text)])


def faulty(first: Response) -> Respond:
    """Answers the first time with a fault, then with the words that came."""
    return lambda body, turn: first if turn == 0 else Response(f"seen {words(body)}")


FAULTS = {
    "status 429": Response(status=429, headers=(("Retry-After", "7"),)),
    "status 500": Response(status=500),
    "status 503": Response(status=503, body="<html>busy</html>"),
    "status 408": Response(status=408),
    "status 409": Response(status=409),
    "time-out": Response(delay=1.0, body="{}"),
    "malformed answer": Response(body='{"choices": [{"message"'),
    "no choices": Response(body='{"choices": []}'),
    "no object": Response(body="[]"),
    "truncated": Response(cut=40),
    "no connection": Response(cut=0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(fault: str, slept):
    with serving(faulty(FAULTS[fault])) as server:
        client = client_of(server.url)
        answer = ask(client, "x")
    assert answer == Answer("seen x", "stop", False, 10, 3)
    assert server.bill == 1 and sum(server.seen.values()) == 2
    assert client.counts["attempts"] == 2 and not client.failed
    (wait,) = slept
    assert wait == 7 if fault == "status 429" else 0.375 <= wait <= 0.5


def test_it_waits_longer_every_time_and_then_says_why_not(slept):
    with serving(lambda *_: Response(status=500)) as server:
        client = client_of(server.url)
        said = ask(client, "x")
    assert said == "status 500: no, 500"
    assert sum(server.seen.values()) == 6 and client.failed == {"status 500": 1}
    assert len(slept) == 5
    for i, wait in enumerate(slept):
        assert 0.75 <= wait / (0.5 * 2**i) <= 1
    assert len(client.cache) == 0


def test_retry_after_may_be_a_date_and_not_too_far(slept):
    date = formatdate(time.time() + 30, usegmt=True)
    with serving(faulty(Response(status=429, headers=(("Retry-After", date),)))) as server:
        assert isinstance(ask(client_of(server.url), "x"), Answer)
    assert 27 < slept.pop() <= 30
    far = Response(status=429, headers=(("Retry-After", "3600"),))
    with serving(faulty(far)) as server:
        assert ask(client_of(server.url), "x") == "status 429: no, 429" and not slept


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_cannot_pass_is_not_tried_again(status: int, slept):
    respond = lambda body, _: Response() if words(body) == "fine" else Response(status=status)  # noqa: E731
    with serving(respond) as server:
        client = client_of(server.url)
        assert ask(client, "x") == f"status {status}: no, {status}"
        assert sum(server.seen.values()) == 1 and not slept
        # It is this request's fault, and others go on; but where none was ever answered.
        ask(client, "fine")
        assert {ask(client, str(i)) for i in range(30)} == {f"status {status}: no, {status}"}
        assert sum(server.seen.values()) == 32
        client = client_of(server.url)
        said = [str(ask(client, str(i))) for i in range(30)]
        assert said[19:21] == [f"status {status}: no, {status}", said[-1]]
        assert said[-1] == "not sent: 20 requests before it failed in a row"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_server_key_or_model_ends_all_at_once(status: int, monkeypatch, slept):
    with serving(lambda *_: Response(status=status)) as server:
        client = client_of(server.url)
        with pytest.raises(ChatError, match=f"{server.url}.* {status} for 'seer'") as first:
            ask(client, "x")
        assert ("OPENAI_API_KEY" in str(first.value)) == (status != 404) and not slept
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        # The same client asks no more.
        with pytest.raises(ChatError) as again:
            ask(client, "y")
        assert again.value is first.value
        with pytest.raises(ChatError, match="name a model" if status == 404 else "is wrong"):
            ask(client_of(server.url), "x")
    assert server.keys == [None, "Bearer secret"]
    assert sum(server.seen.values()) == 2


def endless_server(first: bytes, ever: bytes, pause: float):
    """A server that sends these bytes to whoever connects, whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    for piece in itertools.chain([first], itertools.repeat(ever)):
                        connection.sendall(piece)
                        time.sleep(pause)

    threading.Thread(target=serve, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


OK, CONTINUE = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
ENDLESS = {  # What comes once, what comes for ever, and the seconds between.
    "headers that drip": (OK, b"X", 0.02),
    "100 Continue": (b"", CONTINUE, 0.02),
    "100 Continue without pause": (b"", CONTINUE * 1000, 0.0),
    "a body that drips": (OK + b"\r\n", b" ", 0.02),
    "a body without end": (OK + b"\r\n", b" " * (1 << 16), 0.0),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_without_end_takes_neither_more_time_nor_more_memory(what: str):
    listener, url = endless_server(*ENDLESS[what])
    with listener:
        client = client_of(url, dataclasses.replace(QUICK, timeout=1.0, retries=0))
        begun = time.monotonic()
        said = str(ask(client, "x"))
        with pytest.raises(Unreachable):
            client.probe()
    assert time.monotonic() - begun < 5
    assert said.startswith("time-out") or f"{MAX_BYTES:,}" in said


DEEP = ("[" * 100_000, '{"a":' * 100_000)
INFINITE = '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}'


@pytest.mark.parametrize("body", [*DEEP, INFINITE])
def test_json_that_is_deep_or_infinite_is_no_answer(body: str):
    with serving(lambda *_: Response(body=body)) as server:
        client = client_of(server.url, dataclasses.replace(QUICK, retries=0))
        assert str(ask(client, "x")).startswith("malformed answer")
        server.models = Response(body=body)
        client.probe()
        server.respond = lambda *_: Response(body=body, status=400)
        assert str(ask(client, "x")).startswith("status 400")


@pytest.mark.parametrize("value", ["nan", "Mon, 01 Jan 99999 00:00:00 GMT", "x"])
def test_a_retry_after_of_nonsense_is_none(value: str, slept):
    with serving(faulty(Response(status=429, headers=(("Retry-After", value),)))) as server:
        client = client_of(server.url)
        assert isinstance(ask(client, "x"), Answer)
    assert 0.375 <= slept[0] <= 0.5


def test_half_a_surrogate_pair_in_an_answer_is_replaced_and_kept(tmp_path: Path):
    body = '{"choices": [{"message": {"content": "a \\ud83d cat"}}]}'
    with serving(lambda *_: Response(body=body)) as server:
        client = client_of(server.url, cache=AnswerCache(tmp_path / "a.sqlite"))
        assert ask(client, "x") == ask(client, "x") == Answer("a \ufffd cat")
        assert sum(server.seen.values()) == 1 and len(client.cache) == 1


@pytest.mark.parametrize("key", ["se\ncret", "secr\u00e9t"])
def test_a_key_that_no_header_may_hold_is_refused_unsaid(key: str, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError) as raised:
        client_of("http://localhost:1")
    assert "OPENAI_API_KEY" in str(raised.value) and "secr" not in str(raised.value)


def test_redirects_are_not_followed():
    moved = Response(status=307, headers=(("Location", "http://elsewhere.test/"),))
    with serving(lambda *_: moved) as server:
        said = str(ask(client_of(server.url), "x"))
    assert said == "status 307: redirected to 'http://elsewhere.test/': name that address"


def test_a_dead_server_is_given_up(slept):
    url = f"http://127.0.0.1:{free_port()}"
    client = client_of(url, dataclasses.replace(QUICK, retries=1, give_up_after=3))
    with pytest.raises(Unreachable, match=f"{url}/v1.*vllm serve seer"):
        client.probe()
    said = [str(ask(client, str(i))) for i in range(5)]
    assert all(one.startswith("no connection: ") for one in said[:3])
    assert said[3:] == ["not sent: 3 requests before it failed in a row"] * 2
    assert client.failed == {"no connection": 3, "not sent": 2} and len(slept) == 3


def test_probe_names_the_models_that_there_are():
    with serving(lambda *_: Response()) as server:
        client_of(server.url).probe()
        client_of(server.url + "/v1/", model="teller").probe()
        with pytest.raises(ChatError, match="no model 'sear'.* seer, teller:latest"):
            client_of(server.url, model="sear").probe()
        for response in (Response(status=404), Response(status=500), Response(body="hello")):
            server.models = response
            client_of(server.url, model="any").probe()
        server.models = Response(status=401)
        with pytest.raises(ChatError, match="OPENAI_API_KEY"):
            client_of(server.url).probe()


def test_addresses():
    addresses = {
        "http://h:8000": "http://h:8000/v1",
        "http://h:8000/v1/": "http://h:8000/v1",
        "http://h:8000/v1/chat/completions": "http://h:8000/v1",
        "http://[::1]:8000/": "http://[::1]:8000/v1",
        "https://h/openai": "https://h/openai/v1",
        "https://h/v1beta/openai/": "https://h/v1beta/openai",
    }
    assert {url: ChatConfig(url, "m").base for url in addresses} == addresses


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ChatConfig("localhost:8000", "m"), "localhost:8000"),
        (lambda: ChatConfig("http://h:x", "m"), "http://h:x"),
        (lambda: ChatConfig("file:///etc/passwd", "m"), "file:"),
        (lambda: ChatConfig("http://me:secret@h", "m"), "OPENAI_API_KEY"),
        (lambda: ChatConfig("http://h/?key=secret", "m"), "OPENAI_API_KEY"),
        (lambda: ChatConfig("http://h", ""), "''"),
        (lambda: ChatConfig("http://h", "caf\udce9"), "udce9"),
        (lambda: check_types(ChatOptions(concurrency=0)), "concurrency is 0"),
        (lambda: check_types(ChatOptions(retries=-1)), "retries is -1"),
        (lambda: check_types(ChatOptions(timeout=0)), "timeout is 0"),
        (lambda: check_types(ChatOptions(temperature=-1.0)), "temperature is -1"),
    ],
)
def test_bad_values_are_refused(build, said: str):
    with pytest.raises(ValueError, match=said) as raised:
        build()
    assert "secret" not in str(raised.value)


def test_requests_say_what_the_options_say():
    with serving(lambda *_: Response()) as server:
        plain = ChatOptions(temperature=None, seed=None, max_tokens_name="max_completion_tokens")
        picture = message("user", "what?", [b"\x89PNG...", b"\xff\xd8..."])
        client_of(server.url, plain).ask([message("system", "s"), picture])
        client_of(server.url).ask([message("user", "x")])
    first, second = server.bodies
    assert set(first) == {"model", "messages", "max_completion_tokens"}
    urls = [part["image_url"]["url"][:22] for part in first["messages"][1]["content"][:2]]
    assert urls == ["data:image/png;base64,", "data:image/jpeg;base64"]
    assert second == {
        "model": "seer",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1024,
        "temperature": 0.0,
        "seed": 0,
    }


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_content_in_parts_and_missing_usage_are_read(coding: str):
    body = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}}]}
    raw = json.dumps(body).encode()
    coded = Response(body=gzip.compress(raw), headers=(("Content-Encoding", "gzip"),))
    with serving(lambda *_: coded if coding else Response(body=raw)) as server:
        assert ask(client_of(server.url), "x") == Answer("ab")


def test_every_request_is_answered_and_paid_once_under_faults(tmp_path: Path):
    """A hundred requests, each twice, from sixteen threads; two of three meet a fault first."""
    faults = [*FAULTS.values(), *[None] * 5]

    def respond(body, turn):
        fault = faults[int(words(body)) % len(faults)]
        return fault if fault is not None and turn == 0 else Response(f"seen {words(body)}")

    with serving(respond) as server:
        client = client_of(server.url, cache=AnswerCache(tmp_path / "a.sqlite"))
        asked = [str(i % 100) for i in range(200)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda text: ask(client, text), asked))
        assert [getattr(one, "text", one) for one in answers] == [f"seen {i}" for i in asked]
        assert server.bill == 100 and set(server.billed.values()) == {1}
        again = client_of(server.url, cache=AnswerCache(tmp_path / "a.sqlite"))
        assert [ask(again, text) for text in asked] == answers
        assert server.bill == 100
    kinds = ("asked", "answered", "cached", "prompt tokens", "completion tokens")
    assert [client.counts[kind] for kind in kinds] == [200, 100, 100, 1000, 300]
    assert [again.counts[kind] for kind in kinds] == [200, 0, 200, 0, 0]
    # Of each sixteen requests eleven meet a fault first; a full backlog may refuse some more.
    assert client.counts["attempts"] >= 170 and not again.counts["attempts"]
    assert not client.failed and "100 answered, 200 asked" in client.summary()


def test_the_same_question_at_once_is_asked_once():
    with serving(lambda *_: Response("slow", delay=0.2)) as server:
        client = client_of(server.url)
        with ThreadPoolExecutor(8) as pool:
            answers = set(pool.map(lambda _: ask(client, "x"), range(8)))
        assert answers == {Answer("slow", "stop", False, 10, 3)} and server.bill == 1
        assert (client.counts["answered"], client.counts["cached"]) == (1, 7)
        # Another model, or other parameters, are another question.
        ask(client_of(server.url, model="other", cache=client.cache), "x")
        hot = dataclasses.replace(QUICK, temperature=1.0)
        ask(client_of(server.url, hot, client.cache), "x")
    assert server.bill == 3


CHILD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dit_jax.prepare.chat import AnswerCache, ChatClient, ChatConfig, ChatOptions, message

config = ChatConfig(sys.argv[1], "seer", ChatOptions(concurrency=4))
client = ChatClient(config, AnswerCache(sys.argv[2]))
def ask(i):
    return client.ask([message("user", str(i))]).text
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(ask, range(40)), flush=True)
"""


def child(url: str, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, url, str(cache)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=cache.parent)


def test_killed_and_restarted_it_pays_nothing_twice(tmp_path: Path):
    """What was on its way when the process died may have been made twice: four at most."""
    half, release, numbers = threading.Event(), threading.Event(), itertools.count()

    def respond(body, turn):
        if next(numbers) >= 20:
            half.set()
            release.wait(30)  # the process is killed while these are under way
        return Response(f"seen {words(body)}")

    with serving(respond) as server:
        first = child(server.url, tmp_path / "a.sqlite")
        assert half.wait(60)
        cache, end = AnswerCache(tmp_path / "a.sqlite"), time.monotonic() + 30
        while len(cache) < 20 and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        assert first.communicate()[0] == "" and first.returncode == -signal.SIGKILL
        paid = set(server.billed)
        assert len(cache) == len(paid) == 20
        server.billed.clear()
        server.respond = lambda body, turn: Response(f"seen {words(body)}")
        release.set()
        second = child(server.url, tmp_path / "a.sqlite")
        assert second.communicate()[0].split("seen ")[1:] == [f"{i} " for i in range(39)] + ["39\n"]
    again = {raw: n for raw, n in server.billed.items() if raw in paid}
    assert not again and len(server.billed) == 20


def test_two_processes_share_a_bill(tmp_path: Path):
    with serving(lambda body, turn: Response(f"seen {words(body)}", delay=0.02)) as server:
        both = [child(server.url, tmp_path / "a.sqlite") for _ in range(2)]
        said = [one.communicate()[0] for one in both]
    assert said[0] == said[1] and said[0].count("seen") == 40
    assert server.bill == 40 and set(server.billed.values()) == {1}


def test_the_cache_refuses_what_is_none(tmp_path: Path):
    (tmp_path / "file").write_text("no database, certainly not one " * 100)
    with pytest.raises(ValueError, match="file' .*not a database"):
        AnswerCache(tmp_path / "file")
    with pytest.raises(ValueError, match="/proc/x/a.sqlite"):
        AnswerCache("/proc/x/a.sqlite")


def test_answers_of_a_user_are_in_the_cache_directory(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dit_jax" / "answers.sqlite"


def test_waits_end_when_the_client_is_closed():
    with serving(lambda *_: Response(delay=60)) as server:
        client = client_of(server.url, ChatOptions())
        threading.Timer(0.2, client.close).start()
        begin = time.monotonic()
        assert ask(client, "x") == "not sent: the client was closed"
    assert time.monotonic() - begin < 10


def test_ordered_keeps_the_order_the_limit_and_errors():
    drawn, running, most, stopped = [], set(), [], []

    def draw():
        for i in range(60):
            drawn.append(i)
            yield i

    def work(i):
        running.add(i)
        most.append(len(running))
        time.sleep(0.05 if i == 0 else 0.001)
        running.discard(i)
        if i == 50:
            raise ChatError("stop here")
        return i

    results = ordered(work, draw(), 3, lambda: stopped.append(True))
    assert next(results) == 0
    assert len(drawn) <= 14 and max(most) <= 3
    seen = []
    with pytest.raises(ChatError, match="stop here"):
        for one in results:
            seen.append(one)
    assert seen == list(range(1, 50)) and stopped == [True]


REFUSED = """\
I'm sorry, but I can't help with that.
I’m sorry, I cannot describe people in this image.
Sorry, I can't assist with that request.
I apologize, but I am unable to view videos.
I cannot create content like this.
Unfortunately, I can't see the images.
As an AI language model, I do not have eyes.
No images were provided.
<think>hm, a person</think>I'm unable to identify people.
抱歉，我无法描述这个视频。"""
TOLD = """\
A woman says 'I'm sorry, I can't' to a man in the rain.
A sign reads: I cannot come in.
No people are on the street; an icy wind moves the flags.
A sorry-looking dog that cannot walk waits.
一只猫无法跳上墙。"""


def test_refusals_are_told_from_captions():
    assert [text for text in REFUSED.splitlines() if not is_refusal(text)] == []
    assert [text for text in TOLD.splitlines() if is_refusal(text)] == []


CLEANED = {
    '  "A cat sits."\n': "A cat sits.",
    "Caption: A cat sits.": "A cat sits.",
    "**Caption:** A cat sits.": "A cat sits.",
    "Sure! Here is a short caption:\n\n“A cat sits.”": "A cat sits.",
    "Here's the upsampled prompt: A cat.": "A cat.",
    "The video shows a cat that sits.": "A cat that sits.",
    "This image depicts two cats.": "Two cats.",
    "The video shows how to fold paper.": "The video shows how to fold paper.",
    "<think>A cat, surely.</think>\nA cat\nsits.": "A cat sits.",
    "<think>never ends": "",
    '"Go" and "stop"': '"Go" and "stop"',
    "A description: none.": "A description: none.",
    "一只猫": "一只猫",
}


def test_answers_are_cleaned():
    assert {said: clean(said) for said in CLEANED} == CLEANED


def test_whole_sentences():
    assert whole_sentences("One 1.5 m cat. Two dogs! Thr") == "One 1.5 m cat. Two dogs!"
    assert whole_sentences('It says "no." And') == 'It says "no."'
    assert whole_sentences("猫が座る。犬が") == "猫が座る。"
    assert whole_sentences("one without end") == ""


@pytest.mark.parametrize(
    ("response", "text", "why", "event"),
    [
        (Response("Sorry, I can't do that."), "", 'refused by the model: "Sorry', "refused"),
        (Response(None, refusal="Nothing on this."), "", "refused by the model: 'Noth", "refused"),
        (Response("A", finish="content_filter"), "", "refused by its filter: 'A'", "refused"),
        (Response("  "), "", "empty answer", "empty"),
        (Response(None), "", "empty answer", "empty"),
        (Response("A cat. Its tail is", finish="length"), "A cat.", "", "cut"),
        (Response("A cat whose", finish="length"), "", "cut off at 1024 tokens", "cut"),
    ],
)
def test_answers_of_no_use_are_told_counted_and_paid_once(response, text, why, event):
    with serving(lambda *_: response) as server:
        client = client_of(server.url)
        for _ in range(2):
            said, reason = tell(client, [message("user", "x")])
            assert said == text and reason.startswith(why) and bool(reason) == bool(why)
        assert server.bill == 1 and client.counts[event] == 2
        assert f"2 {event}" in client.summary()
