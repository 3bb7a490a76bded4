"""The chat client against a server that fails in every way: nothing lost, nothing paid twice."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
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
    is_refusal,
    message,
    ordered,
    tell,
    whole_sentences,
)
from tests.prepare.chat_server import Respond, Response, client_of, serving, words
from tests.runs import free_port

pytestmark = pytest.mark.usefixtures("slept")


def ask(client: ChatClient, text: str) -> Answer | str:
    return client.ask([message("user", text)])


def always(response: Response) -> Respond:
    return lambda *_: response


def echo(body, turn=0) -> Response:
    return Response(f"seen {words(body)}")


def faulty(first: Response) -> Respond:
    """Answers the first time with a fault, then with the words that came."""
    return lambda body, turn: first if turn == 0 else echo(body)


def test_it_waits_longer_every_time_and_then_says_why_not(slept):
    with serving(always(Response(status=500))) as server:
        client = client_of(server.url)
        assert ask(client, "x") == "status 500: no, 500"
    assert sum(server.seen.values()) == 6 and client.failed == {"status 500": 1}
    assert len(slept) == 5 and len(client.cache) == 0
    assert all(0.75 <= wait / (0.5 * 2**i) <= 1 for i, wait in enumerate(slept))


def test_retry_after_is_seconds_a_date_nonsense_or_too_far(slept):
    date = formatdate(time.time() + 30, usegmt=True)
    for value, least, most in (
        ("7", 7, 7),
        (date, 27, 30),
        ("nan", 0.375, 0.5),
        ("Mon, 01 Jan 99999 00:00:00 GMT", 0.375, 0.5),
    ):
        with serving(faulty(Response(status=429, headers=(("Retry-After", value),)))) as server:
            assert ask(client_of(server.url), "x") == Answer("seen x", "stop", False, 10, 3)
        assert least <= slept.pop() <= most, value
    with serving(faulty(Response(status=429, headers=(("Retry-After", "3600"),)))) as server:
        assert ask(client_of(server.url), "x") == "status 429: no, 429" and not slept


def test_what_cannot_pass_is_not_tried_again(slept):
    said = "status 413: no, 413"
    respond = lambda body, _: Response() if words(body) == "fine" else Response(status=413)  # noqa: E731
    with serving(respond) as server:
        client = client_of(server.url)
        assert ask(client, "x") == said
        assert sum(server.seen.values()) == 1 and not slept
        # It is this request's fault, and others go on; but where none was ever answered.
        ask(client, "fine")
        assert {ask(client, str(i)) for i in range(30)} == {said}
        client = client_of(server.url)
        told = [str(ask(client, str(i))) for i in range(30)]
    assert told == [said] * 20 + ["not sent: 20 requests before it failed in a row"] * 10


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_server_key_or_model_ends_all_at_once(status: int, monkeypatch, slept):
    with serving(always(Response(status=status))) as server:
        client = client_of(server.url)
        with pytest.raises(ChatError, match=f"{server.url}.* {status} for 'seer'") as first:
            ask(client, "x")
        assert ("OPENAI_API_KEY" in str(first.value)) == (status != 404) and not slept
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        # The same client asks no more.
        with pytest.raises(ChatError) as again:
            ask(client, "y")
        assert again.value is first.value
        with pytest.raises(ChatError):
            ask(client_of(server.url), "x")
    assert server.keys == [None, "Bearer secret"]
    assert sum(server.seen.values()) == 2


OK, CONTINUE = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("once", "ever", "pause"),
    [
        (OK, b"X", 0.02),  # Headers that drip.
        (b"", CONTINUE * 1000, 0.0),
        (OK + b"\r\n", b" ", 0.02),  # A body that drips.
        (OK + b"\r\n", b" " * (1 << 16), 0.0),
    ],
)
def test_an_answer_without_end_takes_neither_more_time_nor_more_memory(once, ever, pause):
    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    for piece in itertools.chain([once], itertools.repeat(ever)):
                        connection.sendall(piece)
                        time.sleep(pause)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        client = client_of(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0)
        begun = time.monotonic()
        said = str(ask(client, "x"))
        with pytest.raises(Unreachable):
            client.probe()
    assert time.monotonic() - begun < 5
    assert said.startswith("time-out") or f"{MAX_BYTES:,}" in said


@pytest.mark.parametrize("key", ["se\ncret", "secr\u00e9t"])
def test_a_key_that_no_header_may_hold_is_refused_unsaid(key: str, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as raised:
        client_of("http://localhost:1")
    assert "secr" not in str(raised.value)


def test_redirects_are_not_followed():
    moved = Response(status=307, headers=(("Location", "http://elsewhere.test/"),))
    with serving(always(moved)) as server:
        said = str(ask(client_of(server.url), "x"))
    assert said.startswith("status 307: ") and "'http://elsewhere.test/'" in said


def test_a_dead_server_is_given_up(slept):
    url = f"http://127.0.0.1:{free_port()}"
    client = client_of(url, retries=1, give_up_after=3)
    with pytest.raises(Unreachable, match=f"{url}/v1.*vllm serve seer"):
        client.probe()
    said = [str(ask(client, str(i))) for i in range(5)]
    assert all(one.startswith("no connection: ") for one in said[:3])
    assert said[3:] == ["not sent: 3 requests before it failed in a row"] * 2
    assert client.failed == {"no connection": 3, "not sent": 2} and len(slept) == 3


def test_probe_names_the_models_that_there_are():
    with serving(always(Response())) as server:
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
        (lambda: ChatConfig("http://me:secret@h", "m"), "OPENAI_API_KEY"),
        (lambda: ChatConfig("http://h/?key=secret", "m"), "OPENAI_API_KEY"),
        (lambda: ChatConfig("http://h", "caf\udce9"), "udce9"),
        (lambda: check_types(ChatOptions(concurrency=0)), "concurrency is 0"),
        (lambda: check_types(ChatOptions(temperature=-1.0)), "temperature is -1"),
    ],
)
def test_bad_values_are_refused(build, said: str):
    with pytest.raises(ValueError, match=said) as raised:
        build()
    assert "secret" not in str(raised.value)


def test_requests_say_what_the_options_say():
    with serving(always(Response())) as server:
        plain = {"temperature": None, "seed": None, "max_tokens_name": "max_completion_tokens"}
        picture = message("user", "what?", [b"\x89PNG...", b"\xff\xd8..."])
        client_of(server.url, **plain).ask([message("system", "s"), picture])
        ask(client_of(server.url), "x")
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


def test_content_in_parts_packed_and_without_usage_is_read_and_repaired():
    body = {
        "choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"text": "\ud83d"}]}}]
    }
    packed, header = gzip.compress(json.dumps(body).encode()), ("Content-Encoding", "gzip")
    with serving(always(Response(body=packed, headers=(header,)))) as server:
        assert ask(client_of(server.url), "x") == Answer("a\ufffd")


def test_every_request_is_answered_and_paid_once_under_faults(tmp_path: Path):
    """Sixteen threads of two clients, each of which makes a hundred requests; two of three meet a fault
    first. What one has stored the other reads at once: it outlives a process that is killed."""
    faults = [
        *(Response(status=status) for status in (408, 409, 429, 500)),
        Response(status=503, body="<html>busy</html>"),
        Response(delay=1.0, body="{}"),
        *(Response(body=body) for body in ('{"choices": [{"message"', '{"choices": []}', "[]")),
        Response(body="[" * 100_000),
        Response(
            body='{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}'
        ),
        Response(cut=40),
        Response(cut=0),
        *[None] * 7,
    ]

    def respond(body, turn):
        fault = faults[int(words(body)) % len(faults)]
        return fault if fault is not None and turn == 0 else echo(body)

    with serving(respond) as server:

        def client():
            return client_of(server.url, AnswerCache(tmp_path / "a.sqlite"), concurrency=8)

        both, asked = [client(), client()], [str(i // 2) for i in range(200)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, itertools.cycle(both), asked))
        assert [getattr(one, "text", one) for one in answers] == [f"seen {i}" for i in asked]
        again = client()
        assert [ask(again, text) for text in asked] == answers
        assert server.bill == 100 and set(server.billed.values()) == {1}
    kinds = ("asked", "answered", "cached", "prompt tokens", "completion tokens")
    total = both[0].counts + both[1].counts
    assert [total[kind] for kind in kinds] == [200, 100, 100, 1000, 300]
    assert [again.counts[kind] for kind in kinds] == [200, 0, 200, 0, 0]
    # Of each twenty requests thirteen meet a fault first; a full backlog may refuse some more.
    assert total["attempts"] >= 165 and not again.counts["attempts"]
    assert not both[0].failed | both[1].failed and "200 asked" in again.summary()


def test_the_same_question_at_once_is_asked_once():
    with serving(always(Response("slow", delay=0.2))) as server:
        client = client_of(server.url)
        with ThreadPoolExecutor(8) as pool:
            answers = set(pool.map(lambda _: ask(client, "x"), range(8)))
        assert answers == {Answer("slow", "stop", False, 10, 3)} and server.bill == 1
        assert (client.counts["answered"], client.counts["cached"]) == (1, 7)
        # Another model, or other parameters, are another question.
        ask(client_of(server.url, client.cache, model="other"), "x")
        ask(client_of(server.url, client.cache, temperature=1.0), "x")
    assert server.bill == 3


def test_the_cache_refuses_what_is_none(tmp_path: Path):
    (tmp_path / "file").write_text("no database, certainly not one " * 100)
    with pytest.raises(ValueError, match="file' .*not a database"):
        AnswerCache(tmp_path / "file")
    with pytest.raises(ValueError, match="/proc/x/a.sqlite"):
        AnswerCache("/proc/x/a.sqlite")


def test_waits_end_when_the_client_is_closed():
    with serving(always(Response(delay=60))) as server:
        client = client_of(server.url, timeout=60)
        threading.Timer(0.2, client.close).start()
        begin = time.monotonic()
        assert ask(client, "x") == "not sent: the client was closed"
    assert time.monotonic() - begin < 10


def test_ordered_keeps_the_order_the_limit_and_errors():
    drawn, running, most, stopped = itertools.count(), set(), [], []

    def work(i):
        running.add(i)
        most.append(len(running))
        time.sleep(0.05 if i == 0 else 0.001)
        running.discard(i)
        if i == 50:
            raise ChatError("stop here")
        return i

    results = ordered(work, drawn, 3, lambda: stopped.append(True))
    assert next(results) == 0
    assert next(drawn) <= 14 and max(most) <= 3
    seen = []
    with pytest.raises(ChatError, match="stop here"):
        seen.extend(results)
    assert seen == [i for i in range(1, 50) if i in seen] and stopped == [True]


REFUSED = """\
I’m sorry, I cannot describe people in this image.
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


def test_answers_are_cleaned_and_cut_at_sentences():
    cleaned = {
        '  "A cat sits."\n': "A cat sits.",
        "**Caption:** A cat sits.": "A cat sits.",
        "Sure! Here is a short caption:\n\n“A cat sits.”": "A cat sits.",
        "Here's the upsampled prompt: A cat.": "A cat.",
        "This image depicts two cats.": "Two cats.",
        "The video shows how to fold paper.": "The video shows how to fold paper.",
        "<think>A cat, surely.</think>\nA cat\nsits.": "A cat sits.",
        "<think>never ends": "",
        '"Go" and "stop"': '"Go" and "stop"',
        "A description: none.": "A description: none.",
    }
    assert {said: clean(said) for said in cleaned} == cleaned
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
    with serving(always(response)) as server:
        client = client_of(server.url)
        for _ in range(2):
            said, reason = tell(client, [message("user", "x")])
            assert said == text and reason.startswith(why) and bool(reason) == bool(why)
        assert server.bill == 1 and client.counts[event] == 2
        assert f"2 {event}" in client.summary()
