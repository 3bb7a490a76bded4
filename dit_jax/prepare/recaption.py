"""Recaptioning: a vision model on a server describes sampled frames of every clip.

After Betker et al. 2023, "Improving Image Generation with Better Captions" (DALL-E 3), section 2,
and as Sora does for clips: each gets a *descriptive* caption, of everything that is seen, and a *short*
one, of its main subject. Training draws among them and the caption that was given
(``RecordsConfig.caption_mix``); DALL-E 3 had 95 % synthetic to 5 % given (section 3). Theirs is a
captioner fine-tuned for the purpose; here it is any model that sees, with instructions.

The descriptive caption is asked for with the frames, the short one with the descriptive alone, which
spares sending the frames twice and keeps both to the same facts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import cv2
import numpy as np

from dit_jax.files import refuse_if, write_json
from dit_jax.prepare.captions import Caption
from dit_jax.prepare.chat import ChatClient, message, ordered, tell
from dit_jax.prepare.stages import Add, Examined, Kept, read_clips
from dit_jax.prepare.work import digest, file_name
from dit_jax.prepare.workers import Outcome
from dit_jax.types import PositiveInt, Range

Frames = Sequence[np.ndarray] | np.ndarray
"""The frames of a clip, each uint8 ``[h, w, 3]``."""

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

    frames: PositiveInt = 8  # Of a clip, evenly spaced.
    max_side: Annotated[int, Range(16)] = 512  # Pixels of the longer side; larger ones are shrunk.
    encoding: Literal["jpeg", "png"] = "jpeg"
    descriptive_words: PositiveInt = 120
    short_words: PositiveInt = 15
    # {what} becomes "an image" or "8 frames, in order, of one video clip", {motion} a few words about
    # motion if there is any, {words} the limit.
    descriptive: str = DESCRIPTIVE
    # {caption} becomes the descriptive caption, {medium} "an image" or "a video clip".
    short: str = SHORT

    def __post_init__(self) -> None:
        message = f"recaption.short is {self.short!r}: say by {{caption}} where the description is."
        refuse_if([("{caption}" not in self.short, message)])


class Recaptioned(NamedTuple):
    """The captions of a clip that could be had, and why not both."""

    name: Any
    captions: tuple[Caption, ...]
    error: str


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
    clips: Iterable[tuple[Any, Callable[[], Frames]]],
    client: ChatClient,
    config: RecaptionConfig = RecaptionConfig(),
) -> Iterator[Recaptioned]:
    """Yields the captions of every clip, in order, as they come; a failure is noted and goes on.

    A clip is its name, and a function that reads its frames (those that ``evenly_spaced`` names among
    them): called once, in a thread, when its turn comes, so that as many clips as
    ``client.options.concurrency`` are in memory. Begun again, it asks for what it has no answer to yet.
    A refused key or an unknown model is a ``ChatError``.
    """

    def one(clip: tuple[Any, Callable[[], Frames]]) -> Recaptioned:
        name, read = clip
        try:
            frames = read()
            chosen = [frames[i] for i in evenly_spaced(len(frames), config.frames)]
            refuse_if([(not chosen, "there are none")])
            images = [encode_image(np.asarray(x), config.max_side, config.encoding) for x in chosen]
        except (ValueError, OSError) as error:
            return Recaptioned(name, (), f"its frames cannot be read: {error}")
        many, captions = len(images) > 1, []
        values = {
            "what": f"{len(images)} frames, in order, of one video clip" if many else "an image",
            "motion": ", and how things and the camera move" if many else "",
            "medium": "a video clip" if many else "an image",
        }
        del frames, chosen  # Large, and an answer may take minutes.
        for kind in ("descriptive", "short"):
            template, words = getattr(config, kind), getattr(config, f"{kind}_words")
            # Not str.format: what stands in braces otherwise is the user's. The caption comes last.
            for key, value in {"words": str(words), **values}.items():
                template = template.replace(f"{{{key}}}", value)
            text, why = tell(client, [message("user", template, images)])
            if why:
                return Recaptioned(name, tuple(captions), f"no {kind} caption: {why}")
            captions.append(Caption(text, f"model:{client.config.model}", kind))
            images, values["caption"] = [], text
        return Recaptioned(name, tuple(captions), "")

    return ordered(one, clips, client.options.concurrency, client.close)


def failures(results: Iterable[Recaptioned]) -> str:
    """A line for every clip that keeps its given caption alone, or lacks one of the others."""
    return "\n".join(f"  {one.name}: {one.error}" for one in results if one.error)


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
        self, kept: Iterable[Kept], client: ChatClient, examined: Examined, add: Add
    ) -> list[Recaptioned]:
        """Asks for those of some clips that are missing. Those that failed come back, and are asked for
        next time; a refused key or an unknown model is a ``ChatError``."""
        failed, probe = [], functools.cache(client.probe)

        def missing() -> Iterator[Kept]:
            for one in kept:
                if self.place(one).exists():
                    add(1, 0, 0.0)
                else:
                    probe()
                    yield one

        clips, again = itertools.tee(missing())
        at = functools.partial(evenly_spaced, wanted=self.config.frames)
        frames = (functools.partial(_frames, x) for x in read_clips(again, examined, at))
        pairs = zip(clips, frames, strict=True)
        for one, captions, error in recaption(pairs, client, self.config):
            if error:
                failed.append(Recaptioned(one.name, captions, error))
            else:
                write_json(self.place(one), [dataclasses.asdict(x) for x in captions])
            add(1, 1, one.video_seconds)
        return failed


def _frames(read: Outcome) -> np.ndarray:
    refuse_if([(bool(read.reason), f"{read.reason}: {read.detail}")])
    return read.value
