"""What is asked of a model: prompts, clips that are known, and the sampler's inputs made of them.

A *request* is one clip to generate. Its latents have noise caps, and which are 0 makes the mode (see
``modes``). With ``s`` frames to a token (the codec's stride in time by the patch's), token 0 holds
frame 0, and token ``j`` frames ``s (j - 1) + 1`` to ``s j``. A clip that begins elsewhere than at a
frame 0 can therefore not be cut out of the tokens of another: a tail is encoded as a clip of its own,
and so is a head that comes to stand at the end of a new clip, whose own frame 0 is then left out.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dit_jax.files import SURROGATES, InputError, MiB, read_bytes
from dit_jax.model import (
    ModelConfig,
    PatchConfig,
    TextStatesConfig,
    check_fields,
    field_tokens,
    patchify,
    positions,
)
from dit_jax.sampling.media import to_float
from dit_jax.types import PAD, TOKENS, Codec, FrameGrid


@dataclasses.dataclass(frozen=True, eq=False)
class KnownLatents:
    """Clean latents and the noise cap of each: 0 is kept, 1 is generated, between them the latent is
    remade from that much noise.

    Caps are of latents, and the model knows them of tokens: a token's is the highest of its latents.
    Kept latents of a token that is not kept as a whole are *put back* after every step of the solver,
    at the token's own noise level (Song et al. 2021, "Score-based generative modeling", section I.2).
    """

    clean: np.ndarray
    """``[t, h, w, c]``, of the request's size; anything finite where the cap is 1."""
    noise_caps: np.ndarray
    """``[t]``, or ``[t, h, w]`` for parts of a picture."""

    def __post_init__(self) -> None:
        shape, caps = np.shape(self.clean), np.shape(self.noise_caps)
        in_range = np.all((self.noise_caps >= np.float32(0)) & (self.noise_caps <= np.float32(1)))
        if caps not in (shape[:1], shape[:3]) or not in_range or not np.isfinite(self.clean).all():
            raise ValueError(
                f"known latents of shape {shape} with noise caps {caps} from {np.min(self.noise_caps)} "
                f"to {np.max(self.noise_caps)}: latents are finite [t, h, w, c], and caps [t] or "
                "[t, h, w] in [0, 1], where 0 is kept."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to generate. Sizes and rates are those of latents."""

    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    seed: int
    text_states: np.ndarray | None = None
    """The prompt as the states ``[s, e]`` of a text encoder, for a model that reads those."""
    segment_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """One value for the whole clip: ``{"label": 3}``, by the names of the model's conditioners."""
    frame_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """One value for every frame of pixels: ``[t, ...]``."""
    pixel_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Clips beside the clip, float ``[t, h, w, c]`` of the request's size."""
    time_stride: int = 1
    """Frames of pixels to a latent frame but the first: the codec's stride in time, which
    ``frame_fields`` are grouped by."""
    negative: str = ""
    """What guidance leads away from, in place of the empty prompt."""
    negative_states: np.ndarray | None = None
    known: KnownLatents | None = None
    """Unset, all latents are generated."""
    times: np.ndarray | None = None
    """``[frames]`` when each latent frame is shown, in latent frames; unset, 0, 1, 2, ..."""
    loop: bool = False
    """The last frame is followed by the first. No latent is then a first frame's (which with a causal
    codec holds one frame, and the others several)."""

    @property
    def size(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def num_tokens(self, patch: PatchConfig) -> int:
        """Tokens of the clip."""
        _, h, w = patch.grid(1, self.height, self.width)
        frames = self.frames + self.loop
        return patch.num_tokens(frames, self.height, self.width) - self.loop * h * w

    def fields(self, patch: PatchConfig) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The fields of its tokens ``[l, ...]``, and of its segment."""
        fields = self.frame_fields, self.pixel_fields
        tokens = field_tokens(patch, self.time_stride, self.size, *fields, self.loop)
        segment = {name: np.asarray(value) for name, value in self.segment_fields.items()}
        return tokens, {**segment, "fps": np.asarray(self.fps, np.float32)}


def check_request(request: Request, model: ModelConfig) -> None:
    """Raises ``InputError`` if the model cannot generate such a clip, with what it can."""
    patch, known, times = model.patch, request.known, request.times
    if not request.loop:
        patch.grid(*request.size)
    shape = (*request.size, patch.channels)
    wrong = request.loop and request.frames % patch.t
    wrong = wrong or times is not None and np.shape(times) != (request.frames,)
    wrong = wrong or not 0 < request.fps < math.inf
    if wrong or known is not None and known.clean.shape != shape:
        raise InputError(
            f"a {'loop' if request.loop else 'request'} of {request.frames} frames, of size {shape} at "
            f"{request.fps} frames a second, with times {None if times is None else np.shape(times)} "
            f"and known latents {known and known.clean.shape}: rates are above 0 and finite, times "
            f"are one for each latent frame, known latents of the request's size, and a loop has "
            f"{patch.t}n frames."
        )
    check_fields(model, *request.fields(patch), "the request")


def token_positions(request: Request, patch: PatchConfig) -> np.ndarray:
    """Positions float32 ``[l, 3]`` of a clip's tokens; time is in frames of the reference rate.

    A token stands at the mean of the times of its latents. In a loop no token holds a first frame:
    there are ``patch.t * n`` latent frames, the first at 1.
    """
    loop, times, (frames, height, width) = request.loop, request.times, request.size
    grid, frame_ids = positions(patch, frames + loop, height, width, request.fps)
    _, h, w = patch.grid(1, height, width)
    if times is not None:
        times = np.asarray(times, np.float64)
        middles = (times if loop else times[1:]).reshape(-1, patch.t).mean(1)
        # Ahead of the first token: its own time, or in a loop what is cut off below.
        clock = np.concatenate([np.zeros(1) if loop else times[:1], middles])
        grid[:, 0] = (clock * (patch.reference_fps / (patch.t * request.fps)))[frame_ids]
    return grid[h * w :] if loop else grid


@struct.dataclass
class SamplerInputs:
    """What the solver starts from: rows of tokens, what is known of them, and their noise caps."""

    clean: Float[Array, "b l p"] = struct.field(metadata=TOKENS)
    """Conditioning tokens; anything where the cap is 1."""
    noise_caps: Float[Array, "b l"] = struct.field(metadata=TOKENS)
    """0 is a conditioning token, 1 is generated."""
    group_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    group_noise_caps: Float[Array, "b k"]
    """The cap that the tokens of a modulation group share."""
    positions: Float[Array, "b l 3"] = struct.field(metadata=TOKENS)
    segment_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    token_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    text: Int[Array, "b s"] | Float[Array, "b s e"]
    text_segment_ids: Int[Array, "b s"]
    seeds: Int[Array, "b n"]
    kept: Bool[Array, "b l p"] | None = struct.field(default=None, metadata=TOKENS)
    """Numbers that are put back in tokens that are generated; None if no row has any."""
    cycles: Float[Array, "b 3"] | None = None
    """Loops: (tokens along time, the first's time, what lies between two), or zeros; None if no row is
    one."""
    negative: Int[Array, "b s"] | Float[Array, "b s e"] | None = None
    """In place of the empty text; None if every row has that."""
    negative_segment_ids: Int[Array, "b s"] | None = None
    token_fields: dict[str, Shaped[Array, "b l *rest"]] = struct.field(
        metadata=TOKENS, default_factory=dict
    )
    segment_fields: dict[str, Shaped[Array, "b n *rest"]] = struct.field(default_factory=dict)

    def unconditioned(self) -> SamplerInputs:
        """The same rows with the negative prompt, or the empty one: of every text the first token
        alone is seen."""
        text, ids = self.negative, self.negative_segment_ids
        if text is None:
            first = jnp.arange(self.text_segment_ids.shape[1]) == 0
            text, ids = self.text, jnp.where(first, self.text_segment_ids, PAD)
        return dataclasses.replace(self, text=text, text_segment_ids=ids)


def make_inputs(
    requests: Sequence[Request],
    model: ModelConfig,
    row_tokens: int | None = None,
    together: Sequence[Request] = (),
) -> SamplerInputs:
    """One request a row, as NumPy arrays; ``parallel.global_batch`` makes them arrays of a mesh.

    Args:
        row_tokens: pads rows to a common length; the longest request's if not given.
        together: all requests whose inputs are to have one form, that a step compiled for one
            serves them all.
    """
    every, patch, b = [*requests, *together], model.patch, len(requests)
    grids = [token_positions(request, patch) for request in requests]
    length = row_tokens or max(map(len, grids))

    def rows(values: Sequence[np.ndarray], fill: float = 0, dtype: Any = None) -> np.ndarray:
        """Values ``[l, ...]`` of requests, each padded to a row."""
        out = np.full((b, length, *values[0].shape[1:]), fill, dtype or values[0].dtype)
        for row, one in zip(out, values, strict=True):
            row[: len(one)] = one
        return out

    known_of_all = [_known_tokens(patch, request) for request in every]
    clean, caps, kept = zip(*known_of_all[:b], strict=True)
    # Tokens of a modulation group share a cap; a row that knows nothing has one group of cap 1.
    groups = [np.unique(one, return_inverse=True) for one in caps]
    most = max(len(np.unique(r.known.noise_caps)) if r.known else 1 for r in every)
    group_caps = np.ones((b, most), np.float32)
    for row, (values, _) in zip(group_caps, groups, strict=True):
        row[: len(values)] = values
    text = [model.text.tokens(r.prompt, r.text_states) for r in requests]
    text, text_segments = _text_rows(text, model)
    tokens, segments = zip(*(request.fields(patch) for request in requests), strict=True)
    dtypes = {name: one.field(model).dtype for name, one in model.conditioners.items()}

    def kind(name: str) -> Any:
        return dtypes.get(name, np.float32)

    arrays: dict[str, Any] = dict(
        clean=rows(clean),
        noise_caps=rows(caps, 1),
        group_ids=rows([ids.astype(np.int32) for _, ids in groups]),
        group_noise_caps=group_caps,
        positions=rows(grids, dtype=np.float32),
        segment_ids=rows([np.ones(len(grid), np.int32) for grid in grids]),
        token_ids=rows([np.arange(len(grid), dtype=np.int32) for grid in grids]),
        text=text,
        text_segment_ids=text_segments,
        seeds=np.array([[request.seed % 2**32] for request in requests], np.uint32),
        token_fields={
            name: rows([own[name] for own in tokens], dtype=kind(name)) for name in tokens[0]
        },
        segment_fields={
            name: np.stack([own[name] for own in segments])[:, None].astype(kind(name))
            for name in segments[0]
        },
    )
    # All rows of a compiled step have these, or none has.
    if any(numbers.any() for _, _, numbers in known_of_all):
        arrays["kept"] = rows(kept)
    if any(r.loop for r in every):
        cycles = [_cycle(grid, r.loop) for grid, r in zip(grids, requests, strict=True)]
        arrays["cycles"] = np.array(cycles, np.float32)
    if any(r.negative for r in every):
        negative = [_negative_tokens(r, model) for r in requests]
        arrays["negative"], arrays["negative_segment_ids"] = _text_rows(negative, model)
    return SamplerInputs(**arrays)


def _known_tokens(
    patch: PatchConfig, request: Request
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The request's known latents ``[l, p]``, their noise caps ``[l]``, and which numbers are kept in
    tokens that are not kept as a whole, bool ``[l, p]``: no tokens if it knows nothing."""
    known = request.known
    if known is None:
        none = np.zeros((0, patch.dim), np.float32)
        return none, np.ones(0, np.float32), none != 0

    def tokens(video: np.ndarray) -> np.ndarray:
        if not request.loop:
            return patchify(patch, video)
        _, h, w = patch.grid(1, *video.shape[1:3])
        return patchify(patch, np.concatenate([video[:1], video]))[h * w :]

    caps = known.noise_caps if np.ndim(known.noise_caps) == 3 else known.noise_caps[:, None, None]
    each = tokens(np.broadcast_to(caps[..., None], known.clean.shape).astype(np.float32))  # [l, p]
    highest = each.max(-1)
    return tokens(known.clean.astype(np.float32)), highest, (each == 0) & (highest > 0)[:, None]


def _cycle(positions: np.ndarray, loop: bool) -> tuple[float, float, float]:
    """See ``SamplerInputs.cycles``."""
    if not loop:
        return 0.0, 0.0, 0.0
    clock = np.unique(positions[:, 0])
    unit = float(clock[1] - clock[0]) if len(clock) > 1 else 1.0
    # Otherwise no time would follow the last one.
    assert np.allclose(np.diff(clock), unit, rtol=1e-3), "times of a loop are evenly spaced"
    return float(len(clock)), float(clock[0]), unit


def _text_rows(texts: Sequence[np.ndarray], model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Texts as rows of one length, and which of it is theirs."""
    b, s = len(texts), model.text.max_tokens
    out = np.zeros((b, s, *texts[0].shape[1:]), texts[0].dtype)
    segments = np.zeros((b, s), np.int32)
    for i, text in enumerate(texts):
        out[i, : len(text)], segments[i, : len(text)] = text, 1
    return out, segments


def _negative_tokens(request: Request, model: ModelConfig) -> np.ndarray:
    states = request.negative_states
    if states is None and isinstance(model.text, TextStatesConfig) and not request.negative:
        states = np.zeros((0, model.text.dim), np.float32)
    return model.text.tokens(request.negative, states)


# --- clips as latents ---


def filled(clip: np.ndarray, stride: int) -> np.ndarray:
    """A clip ``[t, ...]`` whose last frame stands still until its token has ``stride`` frames."""
    return np.concatenate([clip, np.repeat(clip[-1:], (1 - len(clip)) % stride, 0)])


@dataclasses.dataclass(frozen=True)
class Space:
    """Between the pixels of clips and the latents of a model."""

    codec: Codec
    """``PixelCodec()`` for a model of pixels."""
    patch: PatchConfig

    @property
    def grid(self) -> FrameGrid:
        """Which frames share latents and tokens."""
        return FrameGrid(self.codec.strides[0], self.patch.t)

    @property
    def stride(self) -> int:
        """Frames of a token, but for the first, which holds one."""
        return self.grid.token_frames

    @property
    def multiple(self) -> tuple[int, int]:
        """Heights and widths in pixels are multiples of these."""
        _, h, w = self.codec.strides
        return h * self.patch.h, w * self.patch.w

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raises ``ValueError`` if the model's tokens do not fill a clip of this size, in pixels."""
        PatchConfig(self.stride, *self.multiple).grid(frames, height, width)

    def new(self, seconds: float, fps: float) -> int:
        """Frames ``n stride`` (at least one token) that last about this long: added to a clip."""
        return max(round(seconds * fps / self.stride), 1) * self.stride

    def gap(self, seconds: float, fps: float) -> int:
        """Frames ``n stride - 1`` (at least 1) that last about this long: between two clips."""
        least = 2 if self.stride == 1 else 1
        return max(round((seconds * fps + 1) / self.stride), least) * self.stride - 1

    def encode(self, clip: np.ndarray) -> np.ndarray:
        """Latents float32 of uint8 ``[t, h, w, 3]``."""
        return np.asarray(self.codec.encode(to_float(clip)), np.float32)

    def still(self, image: np.ndarray) -> np.ndarray:
        """The latents of one token that shows an image ``[h, w, 3]`` and is not a clip's first."""
        return self.encode(np.repeat(image[None], 1 + self.stride, 0))[-self.patch.t :]

    def stands_still(self, head: np.ndarray) -> bool:
        """True if a head is one still frame that must be repeated to fill a token."""
        return len(head) == 1 and self.codec.strides[0] > 1

    def at_end(self, head: np.ndarray) -> np.ndarray:
        """The latents that hold a head of ``1 + n stride`` frames at the end of another clip.

        Of a causal codec those behind its first, which is a first frame's alone: frame 0 is then held
        by none. A single frame stands still, as in ``still``.
        """
        if self.stands_still(head):
            return self.still(head[0])
        latents = self.encode(head)
        return latents[1:] if self.codec.strides[0] > 1 else latents


# --- prompt files ---

COLUMNS = ("prompt", "prompts", "prompt_en", "caption", "text")
"""Names of the column or key that holds the prompts, in the order in which they are looked for."""


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a file in its order.

    ``.csv`` and ``.tsv`` have a header, ``.json`` is a list, ``.jsonl`` has a value on each line: of
    strings, or of objects. Any other file has a prompt on each line that is not blank.
    """
    raw, suffix = read_bytes(path, 256 * MiB, "the prompts"), Path(path).suffix.lower()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        # Not splitlines: a prompt may hold U+2028 and its like.
        lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
        if suffix in (".csv", ".tsv"):
            mark = "\t" if suffix == ".tsv" else max(",;\t", key=(lines or [""])[0].count)
            # Quotes have no meaning in TSV, but around a whole cell, where spreadsheets put them.
            quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
            table = io.StringIO(text, newline="")
            rows: Any = list(csv.DictReader(table, delimiter=mark, quoting=quoting, strict=True))
        elif suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in lines]
        elif suffix == ".json":
            rows = json.loads(text)
            if isinstance(rows, dict):  # {"prompts": [...], ...}
                rows = next((inner for inner in rows.values() if isinstance(inner, list)), [])
        else:
            rows = lines
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(
            f"prompt file {str(path)!r} cannot be read ({error}): save it as UTF-8 text, CSV with "
            "closed quotes, or JSON."
        ) from error
    prompts = [_prompt_of(row) for row in rows]
    bad = [i for i, one in enumerate(prompts, 1) if not one or SURROGATES.search(one)]
    if bad or not prompts:
        which = f"number {bad[0]} is {prompts[bad[0] - 1]!r}" if bad else "it is empty"
        raise InputError(
            f"prompt file {str(path)!r} holds no prompt ({which}): write one a line, or a table or "
            f"JSON with a column or key {COLUMNS[0]!r}."
        )
    return prompts


def _prompt_of(row: Any) -> str:
    """The prompt of a row of a table or a value of JSON; empty if there is none."""
    if isinstance(row, dict):
        names = {re.sub(r"[\s-]+", "_", str(name).strip().lower()): name for name in reversed(row)}
        row = next((row[names[name]] for name in COLUMNS if name in names), "")
        whole = re.fullmatch(r'"((?:[^"]|"")*)"', row) if isinstance(row, str) else None
        row = whole[1].replace('""', '"') if whole else row
    return row.strip() if isinstance(row, str) else ""
