"""Recaptioning: a vision model on a server describes sampled frames of every clip.

After Betker et al. 2023, "Improving Image Generation with Better Captions" (DALL-E 3), section 2,
and as Sora does for clips: each gets a *descriptive* caption, of everything that is seen, and a *short*
one, of its main subject. Training draws among them and the caption that was given
(``RecordsConfig.caption_mix``); DALL-E 3 had 95 % synthetic to 5 % given (section 3). Theirs is a
captioner fine-tuned for the purpose; here it is any model that sees, told what to write.

The descriptive caption is asked for with the frames, the short one with the descriptive alone, which
spares sending the frames twice and keeps both to the same facts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import cv2
import numpy as np

from dit_jax.files import refuse_if, write_json
from dit_jax.prepare.captions import Caption, Kind
from dit_jax.prepare.chat import ChatClient, message, tell
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.stages import Kept, read_clips
from dit_jax.prepare.work import Progress, digest, file_name
from dit_jax.prepare.workers import Outcome, WorkersConfig

A = TypeVar("A")
B = TypeVar("B")

DESCRIPTIVE = """\
You see {what}. Describe what is seen in one paragraph of up to {words} words, for somebody who will \
draw it without having seen it. Begin with the main subject and what it does; then its look, the \
surroundings, the background, light and colours, the style of the picture{motion}. Write out text that \
is legible. State only what is visible, in plain present tense; do not mention frames, the viewer or \
that this is a video or an image, do not guess at names, and do not judge."""
SHORT = """\
Here is a description of {medium}:

{caption}

Say in one sentence of at most {words} words what its main subject is and does. Answer with that \
sentence alone."""


@dataclasses.dataclass(frozen=True)
class RecaptionConfig:
    """What is shown, and what is asked."""

    frames: int = 8
    """Of a clip, evenly spaced."""
    max_side: int = 512
    """Pixels of the longer side; larger frames are shrunk."""
    encoding: Literal["jpeg", "png"] = "jpeg"
    descriptive_words: int = 120
    short_words: int = 15
    descriptive: str = DESCRIPTIVE
    """``{what}`` becomes "an image" or "8 frames, in order, of one video clip", ``{motion}`` a few
    words about motion where there is any, ``{words}`` the limit."""
    short: str = SHORT
    """``{caption}`` becomes the descriptive caption, ``{medium}`` "an image" or "a video clip"."""

    def __post_init__(self) -> None:
        least = {"frames": 1, "descriptive_words": 1, "short_words": 1, "max_side": 16}
        for name, bound in least.items():
            value = getattr(self, name)
            refuse_if([(value < bound, f"recaption.{name} is {value}: it is at least {bound}.")])
        message = "recaption.short has no {caption}: say where the description stands."
        refuse_if([("{caption}" not in self.short, message)])


@dataclasses.dataclass(frozen=True)
class ClipFrames:
    """What is to be described."""

    name: str
    given: str
    """The caption it has; empty where there is none."""
    frames: Callable[[], Sequence[np.ndarray] | np.ndarray]
    """Reads its frames, each uint8 ``[h, w, 3]``: called once, in a thread, when its turn comes. Frames
    that ``evenly_spaced`` does not name need not be among them."""


@dataclasses.dataclass(frozen=True)
class Recaptioned:
    """The captions of a clip; those that could not be had are empty, and ``error`` says why."""

    name: str
    given: str
    short: str
    descriptive: str
    origin: str
    """``model:NAME``, of the short and the descriptive one."""
    error: str = ""

    def captions(self) -> tuple[Caption, ...]:
        """Those that were made; ``record_texts`` puts them beside those that were given."""
        made: tuple[tuple[str, Kind], ...] = (
            (self.short, "short"),
            (self.descriptive, "descriptive"),
        )
        return tuple(Caption(text, self.origin, kind) for text, kind in made if text)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """The middles of ``wanted`` equal parts of ``count`` frames; where there are no more, all."""
    if count <= wanted:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def encode_image(image: np.ndarray, max_side: int, encoding: Literal["jpeg", "png"]) -> bytes:
    """A frame uint8 ``[h, w, 3]`` as a JPEG or PNG file, shrunk to ``max_side`` if it is larger."""
    sound = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.size
    message = f"a frame is {image.dtype} {list(image.shape)}: frames are uint8 [h, w, 3], not empty"
    refuse_if([(not sound, message)])
    h, w = image.shape[:2]
    if max(h, w) > max_side:
        size = (max(round(side * max_side / max(h, w)), 1) for side in (w, h))
        image = cv2.resize(image, tuple(size), interpolation=cv2.INTER_AREA)
    flags = [cv2.IMWRITE_JPEG_QUALITY, 90] if encoding == "jpeg" else []
    return cv2.imencode(f".{encoding}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)[1].tobytes()


def recaption(
    clips: Iterable[ClipFrames], client: ChatClient, config: RecaptionConfig | None = None
) -> Iterator[Recaptioned]:
    """Yields the captions of every clip, in order, as they come; a failure is told and goes on.

    As many clips as ``client.options.concurrency`` are in memory. Begun again, it asks for what it has
    no answer to yet. ``client.summary`` tells what it took.

    A refused key or an unknown model is a ``ChatError``.
    """
    one = partial(_recaption, client=client, config=config or RecaptionConfig())
    return ordered(one, clips, client.options.concurrency, client.close)


def _recaption(clip: ClipFrames, client: ChatClient, config: RecaptionConfig) -> Recaptioned:
    result = Recaptioned(clip.name, clip.given, "", "", f"model:{client.config.model}")
    try:
        frames = clip.frames()
        chosen = [np.asarray(frames[i]) for i in evenly_spaced(len(frames), config.frames)]
        images = [encode_image(frame, config.max_side, config.encoding) for frame in chosen]
        if not images:
            raise ValueError("there are none")
    except (ValueError, OSError) as error:
        return dataclasses.replace(result, error=f"its frames cannot be read: {error}")
    del frames, chosen
    many = len(images) > 1
    what = f"{len(images)} frames, in order, of one video clip" if many else "an image"
    asked = _filled(
        config.descriptive,
        what=what,
        words=config.descriptive_words,
        motion=", and how things and the camera move" if many else "",
    )
    descriptive, why = tell(client, [message("user", asked, images)])
    if why:
        return dataclasses.replace(result, error=f"no descriptive caption: {why}")
    medium = "a video clip" if many else "an image"
    asked = _filled(config.short, words=config.short_words, medium=medium, caption=descriptive)
    short, why = tell(client, [message("user", asked)])
    error = f"no short caption: {why}" if why else ""
    return dataclasses.replace(result, short=short, descriptive=descriptive, error=error)


def _filled(template: str, **values: object) -> str:
    # Not str.format: what stands in braces otherwise is the user's. The caption comes last.
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", str(value))
    return template


def failures(results: Iterable[Recaptioned]) -> str:
    """A line for every clip that keeps its given caption alone, or lacks one of the others."""
    return "\n".join(f"  {one.name}: {one.error}" for one in results if one.error)


def ordered(
    function: Callable[[A], B], items: Iterable[A], threads: int, stop: Callable[[], object]
) -> Iterator[B]:
    """``function`` of every item, as soon as those before it are done; items are drawn as needed.

    At most four results a thread wait for an earlier one. Where something goes wrong (an error in
    ``function``, a keyboard interrupt) no further items begin, ``stop`` is called, and what had begun
    is waited for.
    """
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (len(waiting) > 4 * threads or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (Exception, KeyboardInterrupt):
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Models:
    """The captions of a model, in a folder with a file for each clip that it answered for."""

    def __init__(self, work: Path, model: str, config: RecaptionConfig):
        self.config = config
        self.folder = work / "captions" / digest(model, config)

    def place(self, one: Kept) -> Path:
        """Where a clip's captions are, or will be."""
        key = digest(one.item.key, one.clip.start, one.clip.frames)
        return self.folder / file_name(one.name, key, ".json")

    def captions(self, one: Kept) -> tuple[Caption, ...]:
        """Those that there are."""
        if not self.place(one).exists():
            return ()
        return tuple(Caption(**values) for values in json.loads(self.place(one).read_bytes()))

    def ask(
        self,
        kept: Iterable[Kept],
        total: int,
        client: ChatClient,
        decoding: DecodingConfig,
        workers: WorkersConfig,
        progress: Progress,
    ) -> list[Recaptioned]:
        """Asks for those that are missing, of ``total`` clips. Those that failed come back, and are
        asked for next time; a refused key or an unknown model is a ``ChatError``."""
        failed, probed = [], False
        waiting: deque[Kept] = deque()
        with progress.stage("captions", total, "clips") as add:

            def missing() -> Iterator[Kept]:
                nonlocal probed
                for one in kept:
                    if self.place(one).exists():
                        add(1, 0, 0.0)
                        continue
                    if not probed:
                        client.probe()
                        probed = True
                    waiting.append(one)
                    yield one

            for told in recaption(self._clips(missing(), decoding, workers), client, self.config):
                one = waiting.popleft()
                if told.error:
                    failed.append(told)
                else:
                    made = [dataclasses.asdict(caption) for caption in told.captions()]
                    write_json(self.place(one), made)
                add(1, 1, one.video_seconds)
        return failed

    def _clips(
        self, wanted: Iterable[Kept], decoding: DecodingConfig, workers: WorkersConfig
    ) -> Iterator[ClipFrames]:
        at = partial(evenly_spaced, wanted=self.config.frames)
        names, clips = itertools.tee(wanted)
        for read in read_clips(clips, decoding, workers, at):
            yield ClipFrames(next(names).name, "", partial(_frames, read))


def _frames(read: Outcome) -> np.ndarray:
    refuse_if([(bool(read.reason), f"{read.reason}: {read.detail}")])
    return read.value
