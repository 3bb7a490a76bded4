"""Recaptioning against a server that fails in every way: every clip comes back, in order, paid once."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.prepare.captions import Caption
from dit_jax.prepare.chat import AnswerCache
from dit_jax.prepare.recaption import (
    RecaptionConfig,
    encode_image,
    evenly_spaced,
    failures,
    recaption,
)
from tests.prepare.chat_server import Response, client_of, serving, words

pytestmark = pytest.mark.usefixtures("slept")


def clip(number: int, frames: int = 3):
    """Frames whose grey level is the clip's number, which its caption tells."""
    return f"{number}.mp4", lambda: np.full((frames, 24, 32, 3), 4 * number, np.uint8)


def decoded(image: bytes) -> np.ndarray:
    with av.open(io.BytesIO(image)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def images(body) -> list[np.ndarray]:
    """The pictures in a request's last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return []
    urls = [part["image_url"]["url"] for part in content[:-1]]
    return [decoded(base64.b64decode(url.split(",")[1])) for url in urls]


def seen_number(body) -> int:
    """The number of the clip that a request is about."""
    if seen := images(body):
        return round(seen[0].mean() / 4)
    return int(words(body).split("Clip ")[1].split()[0])


def describe(body, turn=0) -> Response:
    """Tells the number that it sees; shortens what it is told."""
    number = seen_number(body)
    if seen := images(body):
        return Response(f'Caption: "Clip {number} of {len(seen)} frames. Grey."')
    return Response(f"Short {number}.")


def test_every_clip_gets_both_captions_in_order():
    with serving(describe) as server:
        results = list(recaption(map(clip, range(20)), client_of(server.url + "/v1")))
    for i, one in enumerate(results):
        short = Caption(f"Short {i}.", "model:seer", "short")
        descriptive = Caption(f"Clip {i} of 3 frames. Grey.", "model:seer", "descriptive")
        assert one == (f"{i}.mp4", (descriptive, short), "")
    assert len(results) == 20 and server.bill == 40 and failures(results) == ""
    asked = [words(body) for body in server.bodies if images(body)]
    assert "3 frames, in order, of one video clip" in asked[0] and "up to 120 words" in asked[0]
    assert "how things and the camera move" in asked[0] and "{" not in asked[0]


def test_faults_lose_nothing_and_repeat_nothing(tmp_path):
    """Of 20 clips each sort of trouble meets four; what stays without captions is told."""
    hard, busy = ("refused", "bad", "short refused"), Response(status=500)
    kinds = [*hard, busy, None]

    def respond(body, turn):
        seen, kind = images(body), kinds[seen_number(body) % len(kinds)]
        if kind == "refused" and seen or kind == "short refused" and not seen:
            return Response("I'm sorry, but I can't help with that.")
        if kind == "bad":
            return Response(status=400)
        return busy if kind is busy and turn == 0 else describe(body)

    path = tmp_path / "answers.sqlite"
    with serving(respond) as server:
        client = client_of(server.url, AnswerCache(path), timeout=10)
        results = list(recaption(map(clip, range(20)), client))
        assert [one.name for one in results] == [f"{i}.mp4" for i in range(20)]
        for i, one in enumerate(results):
            kind = kinds[i % len(kinds)]
            of = {"refused": 0, "bad": 0, "short refused": 1}
            assert len(one.captions) == (of[kind] if kind in hard else 2)
            assert bool(one.error) == (kind in hard)
        assert set(server.billed.values()) == {1} and server.bill == 28
        again = client_of(server.url, AnswerCache(path), timeout=10)
        assert list(recaption(map(clip, range(20)), again)) == results
        assert server.bill == 28 == again.counts["cached"] and again.counts["answered"] == 0
    assert len(failures(results).splitlines()) == 12
    assert results[1].error == "no descriptive caption: status 400: no, 400"
    assert results[2].error.startswith("no short caption: refused by the model: ")


def test_clips_that_cannot_be_read_keep_their_captions():
    def broken():
        raise ValueError("no moov atom")

    clips = [("a", broken), ("b", lambda: []), ("c", lambda: np.zeros((2, 8, 8, 3))), clip(4)]
    with serving(describe) as server:
        results = list(recaption(clips, client_of(server.url)))
    said = ["no moov atom", "there are none", "a frame is float64 [8, 8, 3]", ""]
    for one, why in zip(results, said, strict=True):
        assert why in one.error and len(one.captions) == (0 if why else 2)
    assert server.bill == 2


def test_evenly_spaced_frames():
    assert evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(0, 8) == []
    assert evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert evenly_spaced(9, 8) == [0, 1, 2, 3, 5, 6, 7, 8]
    # As far from the beginning as from the end, but for rounding.
    assert evenly_spaced(58, 7) == [4, 12, 20, 29, 37, 45, 53]


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_images_are_shrunk_and_encoded(encoding):
    y, x = np.mgrid[0:90, 0:121]
    smooth = np.stack([2 * x, 2 * y, 255 - x - y], -1).astype(np.uint8)
    raw = encode_image(smooth, 512, encoding)
    assert raw.startswith(b"\x89PNG" if encoding == "png" else b"\xff\xd8\xff")
    error = np.abs(decoded(raw).astype(int) - smooth)
    # JPEG at this quality, colours at half the resolution; full range, no shift of levels.
    assert error.max() == 0 if encoding == "png" else error.mean() < 2
    assert encode_image(smooth, 512, encoding) == raw
    white = decoded(encode_image(np.full((16, 16, 3), 255, np.uint8), 512, encoding))
    assert white.min() >= 252  # 235 of the range of television, less what is rounded
    shrunk = decoded(encode_image(smooth, 60, encoding))
    assert shrunk.shape == (45, 60, 3) and np.abs(shrunk[0, 0].astype(int) - smooth[0, 0]).max() < 8
    line = np.zeros((1, 1000, 3), np.uint8)
    assert decoded(encode_image(line, 100, "png")).shape == (1, 100, 3)


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"max_side": 8}, {"short": "shorter!"}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        check_types(RecaptionConfig(**wrong))


def test_templates_are_the_users_and_images_are_asked_about_as_one():
    config = RecaptionConfig(frames=2, descriptive="Say {x} of {what}.", short="{caption} {words}!")
    with serving(describe) as server:
        list(recaption([clip(5, frames=9)], client_of(server.url), config))
        list(recaption([clip(3, frames=1)], client_of(server.url)))
    seen, told, image, described = map(words, server.bodies)
    assert seen == "Say {x} of 2 frames, in order, of one video clip."
    assert len(images(server.bodies[0])) == 2 and told == "Clip 5 of 2 frames. Grey. 15!"
    assert image.startswith("You see an image.") and "camera" not in image
    assert described.startswith("Here is a description of an image:\n\nClip 3 of 1 frames. Grey.\n")
