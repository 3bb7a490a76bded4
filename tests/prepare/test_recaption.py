"""Recaptioning against a server that fails in every way: every clip comes back, in order, paid once."""

from __future__ import annotations

import base64
import io
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.data.records import RecordsConfig, RecordsSource
from dit_jax.prepare.captions import Caption, clip_features, clip_texts
from dit_jax.prepare.chat import AnswerCache, ChatClient, ChatConfig, ChatError, ChatOptions
from dit_jax.prepare.recaption import (
    RecaptionConfig,
    encode_image,
    evenly_spaced,
    failures,
    recaption,
)
from dit_jax.prepare.writing import write_records
from tests.prepare.chat_server import Response, serving, words

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clips"

pytestmark = pytest.mark.usefixtures("slept")


def client_of(url: str, cache: AnswerCache | None = None, **options) -> ChatClient:
    options = ChatOptions(**{"concurrency": 4, "timeout": 0.5, **options})
    return ChatClient(ChatConfig(url, "seer", options), cache)


def picture(number: int, h: int = 24, w: int = 32) -> np.ndarray:
    """A picture whose grey level is a clip's number, which its caption tells."""
    return np.full((h, w, 3), 4 * number, np.uint8)


def clip(number: int, frames: int = 3):
    return f"{number}.mp4", lambda: np.stack([picture(number)] * frames)


def texts(one) -> list[str]:
    return [caption.text for caption in one.captions]


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


def test_a_still_image_is_asked_about_as_one():
    with serving(describe) as server:
        list(recaption([clip(3, frames=1)], client_of(server.url)))
    seen, told = map(words, server.bodies)
    assert seen.startswith("You see an image.") and "camera" not in seen
    assert told.startswith("Here is a description of an image:\n\nClip 3 of 1 frames. Grey.\n")


def test_faults_lose_nothing_and_repeat_nothing(tmp_path: Path):
    """Of 36 clips each sort of trouble meets four; what stays without captions is told."""
    hard = ("refused", "bad", "short refused")
    passing = [
        Response(status=429, headers=(("Retry-After", "2"),)),
        Response(status=500),
        Response(delay=1.0, body="{}"),
        Response(body='{"choices": [{"mess'),
        Response(cut=30),
    ]
    kinds = [*hard, *passing, None]

    def respond(body, turn):
        seen, kind = images(body), kinds[seen_number(body) % len(kinds)]
        if kind == "refused" and seen or kind == "short refused" and not seen:
            return Response("I'm sorry, but I can't help with that.")
        if kind == "bad":
            return Response(status=400)
        return kind if isinstance(kind, Response) and turn == 0 else describe(body)

    path = tmp_path / "answers.sqlite"
    with serving(respond) as server:
        client = client_of(server.url, AnswerCache(path))
        results = list(recaption(map(clip, range(36)), client))
        assert [one.name for one in results] == [f"{i}.mp4" for i in range(36)]
        for i, one in enumerate(results):
            kind = kinds[i % len(kinds)]
            of = {"refused": 0, "bad": 0, "short refused": 1}
            assert len(one.captions) == (of[kind] if kind in hard else 2)
            assert bool(one.error) == (kind in hard)
        assert set(server.billed.values()) == {1} and server.bill == 4 + 7 * 8
        again = client_of(server.url, AnswerCache(path))
        assert list(recaption(map(clip, range(36)), again)) == results
        assert server.bill == 60 and again.counts["answered"] == 0 and again.counts["cached"] == 60
    told = failures(results).splitlines()
    assert len(told) == 12
    refused = "refused by the model: \"I'm sorry, but I can't help with that.\""
    assert told[:3] == [
        f"  0.mp4: no descriptive caption: {refused}",
        "  1.mp4: no descriptive caption: status 400: no, 400",
        f"  2.mp4: no short caption: {refused}",
    ]
    said = client.summary()
    assert "60 answered" in said and "4 x status 400" in said and "8 refused" in said
    assert "600 prompt tokens" in said and "180 completion tokens" in said


def test_clips_that_cannot_be_read_keep_their_captions():
    def broken():
        raise ValueError("no moov atom")

    clips = [
        ("a", broken),
        ("b", lambda: []),
        ("c", lambda: np.zeros((2, 8, 8, 3))),
        clip(4),
    ]
    with serving(describe) as server:
        results = list(recaption(clips, client_of(server.url)))
    said = ["no moov atom", "there are none", "a frame is float64 [8, 8, 3]", ""]
    for one, why in zip(results, said, strict=True):
        assert why in one.error and len(one.captions) == (0 if why else 2)
    assert server.bill == 2


def test_a_wrong_key_ends_it_at_once():
    with serving(lambda *_: Response(status=401)) as server:
        client = client_of(server.url)
        with pytest.raises(ChatError, match="OPENAI_API_KEY, which holds the key, is not set"):
            list(recaption(map(clip, range(100)), client))
    assert sum(server.seen.values()) <= 4


def test_few_clips_are_in_memory_and_few_requests_under_way():
    held, most = set(), []

    def watched(number: int):
        def frames() -> np.ndarray:
            held.add(number)
            most.append(len(held))
            return np.stack([picture(number)])

        return number, frames

    lock, under_way, busiest = threading.Lock(), [0], [0]

    def slow(body, turn: int) -> Response:
        # Before the answer is sent: after it the client may have asked again already.
        with lock:
            under_way[0] += 1
            busiest[0] = max(busiest[0], under_way[0])
        time.sleep(0.01)
        with lock:
            under_way[0] -= 1
        return Response(describe(body).text)

    with serving(slow) as server:
        for one in recaption(map(watched, range(40)), client_of(server.url, concurrency=3)):
            held.discard(one.name)
    assert busiest[0] <= 3 and server.bill == 80
    # Four results a thread may wait for an earlier one: their frames are gone, their names count here.
    assert max(most) <= 3 + 4 * 3


def test_evenly_spaced_frames():
    assert evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(0, 8) == []
    assert evenly_spaced(100, 4) == [12, 37, 62, 87]
    assert evenly_spaced(9, 8) == [0, 1, 2, 3, 5, 6, 7, 8]
    for count in range(1, 60):
        chosen = evenly_spaced(count, 7)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(count, 7)
        # As far from the beginning as from the end, but for rounding.
        assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


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


def test_bad_settings_are_refused():
    for changes, said in (
        ({"frames": 0}, "frames is 0"),
        ({"max_side": 8}, "max_side is 8"),
        ({"short": "shorter!"}, "shorter!"),
    ):
        with pytest.raises(ValueError, match=said):
            check_types(RecaptionConfig(**changes))


def test_templates_are_the_users():
    config = RecaptionConfig(frames=2, descriptive="Say {x} of {what}.", short="{caption} {words}!")
    with serving(describe) as server:
        list(recaption([clip(5, frames=9)], client_of(server.url), config))
    seen, told = server.bodies
    assert words(seen) == "Say {x} of 2 frames, in order, of one video clip."
    assert len(images(seen)) == 2
    assert words(told) == "Clip 5 of 2 frames. Grey. 15!"


def test_captions_become_features_of_records(tmp_path: Path):
    with serving(lambda body, turn: describe(body) if images(body) else Response("")) as server:
        results = list(recaption(map(clip, range(3)), client_of(server.url)))
    samples = [
        {
            **clip_texts([Caption(f"given {i}", "sidecar"), *one.captions]),
            "video": np.stack([picture(i)]),
            "fps": 8.0,
        }
        for i, one in enumerate(results)
    ]
    assert samples[1]["caption_origin"] == "caption: sidecar; caption_descriptive: model:seer"
    features = clip_features()
    path = write_records(tmp_path, "clips", {"train": samples}, description="d", texts=features)
    mix = (("caption_descriptive", 0.95), ("caption_short", 0.05))
    source = RecordsSource(RecordsConfig(str(path), caption_mix=mix))
    captions = {"caption_descriptive": "Clip 2 of 3 frames. Grey.", "caption_short": ""}
    assert source[2].get("captions") == captions and source[2]["caption"] == "given 2"
    assert results[2].error == "no short caption: empty answer"


def test_real_clips():
    if not CLIPS.is_dir():
        pytest.skip(f"{CLIPS} is absent: real clips are not in the repository")

    def frames(path: Path) -> list[np.ndarray]:
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    paths = [CLIPS / name for name in ("sam2__01_dog.mp4", "again.mkv")]
    clips = [(path.name, lambda path=path: frames(path)) for path in paths]
    with serving(lambda body, turn: Response(f"It has {len(images(body))}.")) as server:
        results = list(recaption(clips, client_of(server.url, timeout=20)))
        sizes = [image.shape for body in server.bodies for image in images(body)]
    assert [texts(one)[0] for one in results] == ["It has 8."] * 2
    assert len(sizes) == 16 and {max(size) for size in sizes} == {512}
