"""What answers of language models say beside what was asked for: refusals, labels, quotes, thoughts.

The lists are short on purpose, and look at the beginning of an answer only: a caption may well tell of
somebody who says "I'm sorry".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dit_jax.prepare.chat import ChatClient, Message

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

    Raises:
        ChatError: where the server refuses the key or does not know the model.
    """
    answer = client.ask(messages)
    if isinstance(answer, str):
        return "", answer
    filtered = answer.finish_reason == "content_filter"
    if answer.refusal or filtered or is_refusal(answer.text):
        client.summary.count("refused")
        said = " ".join(answer.text.split())[:120]
        return "", f"refused by {'its filter' if filtered else 'the model'}: {said!r}"
    text = clean(answer.text)
    if answer.finish_reason == "length":
        client.summary.count("cut")
        text = whole_sentences(text)
        if not text:
            limit = client.options.max_tokens
            return "", f"cut off at {limit} tokens in its first sentence (raise chat.max_tokens)"
    if not text:
        client.summary.count("empty")
        return "", "empty answer"
    return text, ""
