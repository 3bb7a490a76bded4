"""The frozen networks around a model, its codec and text encoder: opened, and held against the data.

What makes latents and states is in satellites; their configs open them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache

from jax.sharding import Mesh

from dit_jax.config import VideoRun
from dit_jax.data import MixedSource, MixtureConfig, RecordsSource
from dit_jax.model import ByteEncoderConfig, TextStatesConfig
from dit_jax.sampling import Request
from dit_jax.types import Codec, Sample, Source, TextEncoder

CAPTIONS_KEPT = 1024
"""States that are kept while data are read whose captions are encoded on the way."""


def open_codec(config: VideoRun, mesh: Mesh | None = None) -> Codec | None:
    """The codec of a run; without a folder pixels are their own, and latents have none."""
    return config.codec.open(config.model.patch.channels, mesh)


def with_codec_hash(config: VideoRun) -> VideoRun:
    """The config with the hash of the codec whose latents are trained on, as far as that is known: the
    data's, or else the folder's.

    Raises:
        ValueError: where the data, the folder and the config name different codecs.
    """
    told, source = config.codec, config.data.source
    known = [told.hash] if told.hash else []
    known += [
        made for one in getattr(source, "record_sets", ()) if (made := RecordsSource(one).codec)
    ]
    if (own := told.weights_hash()) is not None:
        known.append(own)
    if len(set(known)) > 1:
        raise ValueError(
            f"codec.hash {told.hash!r}, the latents of the data and the codec {told.path!r} are not of "
            f"one codec: {', '.join(map(repr, known))}. Give the one that made the latents."
        )
    if not known:
        return config
    return dataclasses.replace(config, codec=dataclasses.replace(told, hash=known[0]))


def check_codec(codec: Codec | None, source: Source) -> None:
    """Raises ``ValueError`` where the latents of the data are another codec's."""
    for records in getattr(source, "record_sets", ()):
        if codec is not None and records.codec not in (None, codec.hash):
            raise ValueError(
                f"the latents of {records.config.path!r} were made by the codec {records.codec!r}, "
                f"and codec.path is {codec.hash!r} ({codec.name}): give the one that made them."
            )


def with_text_hash(config: VideoRun) -> VideoRun:
    """The config with the hash of the encoder whose states it is trained on, as far as that is known:
    the data's, or else the folder's. Configs of models that read no states come back as they are.

    Raises:
        ValueError: where the data, the folder and the config name different encoders.
    """
    if not isinstance(config.model.text, TextStatesConfig):
        return config
    told = config.text_encoder
    known: tuple[str | None, str | None] = (None, None)
    for one in getattr(config.data.source, "record_sets", ()):
        records = RecordsSource(one)
        name, digest = records.text_encoder_name, records.text_encoder
        if one.text_states_key is not None or not isinstance(config.data.source, MixtureConfig):
            _check(config, name, digest, f"the states of {one.path!r} were made by")
            known = (name, digest) if digest or known[1] is None else known
    if (own := told.identity()) is not None:
        config = _with_hash(config, known[1])
        _check(config, *own, f"text_encoder.path {told.path!r} is")
        known = own
    return _with_hash(config, known[1])


def _with_hash(config: VideoRun, digest: str | None) -> VideoRun:
    if digest is None:
        return config
    return dataclasses.replace(
        config, text_encoder=dataclasses.replace(config.text_encoder, hash=digest)
    )


def _check(config: VideoRun, name: str | None, digest: str | None, what: str) -> None:
    """Raises ``ValueError`` where an encoder is another than the config's: by the hashes, or where one
    is unknown by the names."""
    text, wanted = config.model.text, config.text_encoder.hash
    assert isinstance(text, TextStatesConfig)
    if wanted is not None and digest is not None:
        other = wanted != digest
    else:
        other = name is not None and name != text.encoder
    if other:
        raise ValueError(
            f"{what} the encoder {name!r} ({digest or 'no hash'}), and the model reads states of "
            f"{text.encoder!r} ({wanted or 'no hash'}): give the one that it is trained on "
            "(text_encoder.path, data.source), or name it (model.text.encoder)."
        )


def open_text_encoder(config: VideoRun, mesh: Mesh | None = None) -> TextEncoder | None:
    """The encoder at ``config.text_encoder.path``, if there is one: spread over a mesh, for all
    processes together, or on a device of this process.

    Raises:
        ValueError: where it is absent, or makes other states than the model reads.
    """
    given, text = config.text_encoder, config.model.text
    if not isinstance(text, TextStatesConfig):
        return None

    def check(name: str, digest: str, dim: int) -> None:
        if dim != text.dim:
            raise ValueError(
                f"text_encoder.path {given.path!r} makes states of {dim} numbers, and the model reads "
                f"{text.dim} (model.text.dim): make them the same."
            )
        _check(config, name, digest, f"text_encoder.path {given.path!r} is")

    return given.open(mesh, check)


def open_for_data(config: VideoRun, source: Source) -> TextEncoder | None:
    """The encoder where the data have captions and no states: for each process alone, as it reads.

    Raises:
        ValueError: where the states that the data have are another encoder's; else as
            ``open_text_encoder`` does.
    """
    states = isinstance(config.model.text, TextStatesConfig)
    read = [records for records in getattr(source, "record_sets", ()) if records.config.captioned]
    bare = [records.config.path for records in read if records.config.text_states_key is None]
    for records in read:
        if states and records.config.text_states_key is not None:
            known = records.text_encoder_name, records.text_encoder
            _check(config, *known, f"the states of {records.config.path!r} were made by")
    if states and bare and isinstance(source, MixedSource) and config.text_encoder.path is None:
        raise ValueError(
            f"the model reads states of captions, and the set {bare[0]!r} of data.source has none: "
            "name their feature (text_states_key), give the encoder (text_encoder.path), or set "
            "captioned to False."
        )
    return None if read and not bare else open_text_encoder(config)


def encoded(source: Source, encoder: TextEncoder) -> Source:
    """A source whose samples have states, made by the encoder where the data have none."""
    if isinstance(source, MixedSource):
        return MixedSource([encoded(part, encoder) for part in source.parts], source.weights)
    if isinstance(source, RecordsSource):
        of = source.config
        if of.text_states_key is not None or not of.captioned:
            return source
    return Encoded(source, encoder)


class Encoded:
    """A source whose samples get the states of their captions, of all that may be drawn."""

    def __init__(self, source: Source, encoder: TextEncoder) -> None:
        self._source = source
        self._states = lru_cache(CAPTIONS_KEPT)(lambda caption: encoder.encode([caption])[0])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {**self._source[index]}
        sample["text_states"] = self._states(sample["caption"])
        if captions := sample.get("captions"):
            # One of them will be drawn.
            found = {name: self._states(text) for name, text in captions.items() if text}
            sample["captions_states"] = found
        return sample


def with_states(requests: Sequence[Request], encoder: TextEncoder | None) -> list[Request]:
    """Requests with the states of their prompts (and of the negative ones, if any), where an encoder
    is given and they have none."""
    if encoder is None:
        return list(requests)
    bare = [r.prompt for r in requests if r.text_states is None]
    bare += [r.negative for r in requests if r.negative and r.negative_states is None]
    bare = list(dict.fromkeys(bare))
    states = dict(zip(bare, encoder.encode(bare), strict=True))

    def told(request: Request) -> Request:
        found, negative = request.text_states, request.negative_states
        found = states[request.prompt] if found is None else found
        if request.negative and negative is None:
            negative = states[request.negative]
        return dataclasses.replace(request, text_states=found, negative_states=negative)

    return [told(request) for request in requests]


def prompt_length(config: VideoRun) -> tuple[Callable[[str], int], int] | None:
    """How the model counts a prompt, and how much of one it reads, in tokens; None for a model of
    classes, and for one of states without their encoder.

    Raises:
        ValueError: where there is no tokenizer in ``text_encoder.path``.
    """
    given, text = config.text_encoder, config.model.text
    if isinstance(text, ByteEncoderConfig):
        return lambda prompt: text.length(prompt) - 1, text.max_bytes
    counted = given.length() if isinstance(text, TextStatesConfig) else None
    if counted is None:
        return None
    length, most = counted
    return length, min(most, text.max_tokens - 1)  # One stands for the beginning.


def cut_note(config: VideoRun, texts: Sequence[str]) -> str | None:
    """What is to be said of texts of which the model does not read all: how many, and the first.

    Raises:
        ValueError: as ``prompt_length`` does.
    """
    texts = list(dict.fromkeys(texts))
    if not texts or (counted := prompt_length(config)) is None:
        return None
    length, limit = counted
    cut = [text for text in texts if length(text) > limit]
    if not cut:
        return None
    unit = "bytes" if isinstance(config.model.text, ByteEncoderConfig) else "tokens"
    return (
        f"{len(cut)} of {len(texts)} texts are longer than the {limit} {unit} that the model "
        f"reads, and cut there. The first has {length(cut[0])}: {cut[0][:200]!r}"
    )


def check_reads(config: VideoRun, run: str) -> None:
    """Raises ``ValueError`` where the model of a run reads states, and no encoder makes them."""
    text = config.model.text
    if isinstance(text, TextStatesConfig) and config.text_encoder.path is None:
        raise ValueError(
            f"the model of {run!r} reads prompts as states of the text encoder {text.encoder!r}: give "
            "--text-encoder, its folder."
        )
