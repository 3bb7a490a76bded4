"""Prompt upsampling: what is changed is told, what is not is told louder, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_jax.config import check_types
from dit_jax.prepare.upsample import UpsampleConfig, Upsampled, main, upsample
from dit_jax.sampling.request import read_prompts
from tests.prepare.chat_server import Response, client_of, serving, words
from tests.runs import free_port

pytestmark = pytest.mark.usefixtures("slept")
CAT, SNOW = "A grey cat sleeps. The sun shines.", "雪が降る夜の町。"
ANSWERS = {
    "a cat": Response(f'"{CAT}"'),
    "a dog": Response("I'm sorry, I can't help with that."),
    "a cow": Response(status=500),
    "a fox": Response("a fox"),
    "雪": Response(SNOW),
}


def respond(body, turn):
    return ANSWERS[words(body)]


def test_every_prompt_comes_back_in_order_with_its_reason():
    prompts = ["a cat", "a dog", "a cow", "a fox", "雪", "a cat"]
    with serving(respond) as server:
        client = client_of(server.url, retries=1)
        found = upsample(prompts, client)
        assert upsample(prompts, client)[0] == found[0]
    refused = "refused by the model: \"I'm sorry, I can't help with that.\""
    assert found == [
        Upsampled("a cat", CAT),
        Upsampled("a dog", "a dog", refused),
        Upsampled("a cow", "a cow", "status 500: no, 500"),
        Upsampled("a fox", "a fox"),
        Upsampled("雪", SNOW),
        Upsampled("a cat", CAT),
    ]
    # Equal prompts are asked for once, and what failed again.
    assert server.bill == 4 and server.seen.total() == 4 + 2 * 2
    system = server.bodies[0]["messages"][0]
    assert system["role"] == "system" and "at most 100 words" in system["content"]


def test_no_server_is_told_for_every_prompt_that_was_never_answered():
    with serving(respond) as server:
        answered = client_of(server.url)
        (before,) = upsample(["a cat"], answered)
    client = client_of(server.url, answered.cache)
    cat, *others = upsample(["a cat", "a fox", "a dog"], client)
    assert cat == before and not cat.error
    assert [one.text for one in others] == ["a fox", "a dog"]
    assert all(server.url in one.error for one in others)
    # And it is not tried for minutes.
    assert client.failed == {"not sent": 2} and client.counts["attempts"] == 1


def test_what_the_text_encoder_cannot_read_is_cut_at_sentences_or_not_used():
    with serving(respond) as server:
        client = client_of(server.url)
        for limit, text in (34, CAT), (33, "A grey cat sleeps."), (18, "A grey cat sleeps."):
            assert upsample(["a cat"], client, limit=limit) == [Upsampled("a cat", text)]
        cat, snow = upsample(["a cat", "雪"], client, limit=17)
        asked = server.bodies[-1]["messages"][0]["content"]
        assert "at most 3 words" in asked
        (short,) = upsample(["雪"], client, UpsampleConfig(words=9), limit=8, length=len)
    for one, length in ((cat, 34), (snow, 24)):
        assert one.text == one.original and f"{length} where the text encoder reads 17" in one.error
    assert short.text == SNOW
    with pytest.raises(ValueError, match="words is 0"):
        check_types(UpsampleConfig(words=0))


def test_the_command_tells_what_it_changed_and_what_not(tmp_path: Path, capfd):
    output = tmp_path / "prompts.json"
    with serving(respond) as server:
        words = ["--prompt", "a cat", "a dog", "--prompt", "雪", "--output", str(output)]
        words += ["--server", server.url, "--model", "seer", "--cache", str(tmp_path / "a.sqlite")]
        assert main(words) == 0
        out, err = capfd.readouterr()
        assert main(words) == 0
        assert server.bill == 3 and "3 cached" in capfd.readouterr().out
    assert f"'a cat'\n  -> {CAT!r}\n'雪'\n  -> {SNOW!r}" in out and "30 prompt tokens" in out
    assert "1 of 3 prompts" in err and "'a dog': refused by the model" in err
    assert read_prompts(output) == [CAT, "a dog", SNOW]
    first, second, _ = json.loads(output.read_text())
    assert first == {"prompt": CAT, "original": "a cat", "upsampled_by": "seer"}
    assert second["original"] == "a dog" and second["error"].startswith("refused")


def test_the_command_goes_on_without_a_server_and_refuses_a_wrong_model(tmp_path: Path, capfd):
    output = tmp_path / "prompts.json"
    words = ["--prompt", "a cat", "--output", str(output), "--cache", str(tmp_path / "a.sqlite")]
    absent = ["--server", f"http://127.0.0.1:{free_port()}", "--model", "seer"]
    assert main([*words, *absent]) == 0 and read_prompts(output) == ["a cat"]
    assert absent[1] in capfd.readouterr().err
    output.unlink()
    with serving(respond) as server:
        assert main([*words, "--server", server.url, "--model", "m"]) == 2
    assert "'m'" in capfd.readouterr().err
    assert main([*words, "--server", "h", "--model", "m"]) == 2 and not output.exists()
