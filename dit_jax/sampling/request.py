"""Requests, the sampler's inputs made of them, clips as latents, and files of prompts.

A *request* is one clip to generate. Its latents have noise caps, and which are 0 makes the mode (see
``modes``). With ``s`` frames to a token (the codec's stride in time by the patch's), token 0 holds
frame 0, and token ``j`` frames ``s (j - 1) + 1`` to ``s j``. So a clip that begins at another frame
than 0 cannot be cut out of the tokens of another: it is encoded as a clip of its own.
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
from jaxtyping import Array, Bool, Float, Int

from dit_jax.files import SURROGATES, MiB, checking_input, read_bytes, refuse_if
from dit_jax.model import ModelConfig, PatchConfig, check_fields, field_tokens, patchify, positions
from dit_jax.sampling.media import to_float
from dit_jax.types import PAD, TOKENS, Codec, DenoiserInputs, FrameGrid


@dataclasses.dataclass(frozen=True, eq=False)
class KnownLatents:
    """Clean latents and the noise cap of each: 0 is kept, 1 is generated, between them the latent is
    remade from that much noise.

    A token's cap is the highest of its latents. Kept latents of other tokens are *put back* after every
    step of the solver, at the token's own noise level (Song et al. 2021, "Score-based generative
    modeling", section I.2).
    """

    clean: np.ndarray  # [t, h, w, c], of the request's size; anything finite where the cap is 1
    noise_caps: np.ndarray  # [t], or [t, h, w] for parts of a picture

    def __post_init__(self) -> None:
        shape, caps = np.shape(self.clean), np.asarray(self.noise_caps)
        fits = caps.shape in (shape[:1], shape[:3]) and ((caps >= 0) & (caps <= 1)).all()
        rule = "give finite latents [t, h, w, c] and caps [t] or [t, h, w] in [0, 1]"
        message = (
            f"latents {shape}, noise caps {caps.shape} from {caps.min()} to {caps.max()}: {rule}."
        )
        refuse_if([(not fits or not np.isfinite(self.clean).all(), message)])


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to generate. Sizes and rates are those of latents."""

    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    seed: int
    text_states: np.ndarray | None = None  # [s, e] of the prompt, for a model of a text encoder's
    segment_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """One value for the whole clip: ``{"label": 3}``, by the names of the model's conditioners."""
    frame_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """One value for every frame of pixels: ``[t, ...]``."""
    pixel_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Clips beside the clip, float ``[t, h, w, c]`` of the request's size."""
    time_stride: int = 1  # the codec's, by which ``frame_fields`` are grouped
    negative: str = ""  # what guidance leads away from, in place of the empty prompt
    negative_states: np.ndarray | None = None
    known: KnownLatents | None = None  # unset, all latents are generated
    times: np.ndarray | None = None
    """``[frames]`` when each latent frame is shown, in latent frames; unset, 0, 1, 2, ..."""
    loop: bool = False
    """The last frame is followed by the first. No latent is then a first frame's (which with a causal
    codec holds one frame, and the others several)."""

    @property
    def size(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def num_tokens(self, patch: PatchConfig) -> int:
        return patch.num_tokens(*self.size, self.loop)

    def fields(self, patch: PatchConfig) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The fields of its tokens ``[l, ...]``, and of its segment."""
        fields = self.frame_fields, self.pixel_fields
        tokens = field_tokens(patch, self.time_stride, self.size, *fields, self.loop)
        segment = {name: np.asarray(value) for name, value in self.segment_fields.items()}
        return tokens, {**segment, "fps": np.asarray(self.fps, np.float32)}


def check_request(request: Request, model: ModelConfig) -> None:
    """Raises ``ValueError`` if the model cannot generate such a clip, with what it can."""
    patch, known, times, fps = model.patch, request.known, request.times, request.fps
    patch.grid(*request.size, request.loop)
    shape = (*request.size, patch.channels)
    latents, clock = known and known.clean.shape, None if times is None else np.shape(times)
    fits = latents in (None, shape) and clock in (None, shape[:1])
    rule = "a finite rate above 0, known latents of its size, and a time for each latent frame"
    message = f"a request {shape} at {fps} frames/s, latents {latents}, times {clock}: give {rule}."
    refuse_if([(not (fits and 0 < fps < math.inf), message)])
    check_fields(model, *request.fields(patch), "the request")


def token_positions(request: Request, patch: PatchConfig) -> Float[np.ndarray, "l 3"]:
    """Positions of a clip's tokens, in frames of the reference rate; each stands at the mean of the
    times of its latents."""
    grid, index = positions(patch, *request.size, request.fps, request.loop)
    if request.times is not None:
        first, rest = np.split(np.asarray(request.times, np.float64), [0 if request.loop else 1])
        clock = np.append(first, rest.reshape(-1, patch.t).mean(1))
        grid[:, 0] = (clock * (patch.reference_fps / (patch.t * request.fps)))[index]
    return grid


@struct.dataclass(kw_only=True)
class SamplerInputs(DenoiserInputs):
    """What the solver starts from: the denoiser's inputs at t = 1, where every group is at its noise
    cap, with clean tokens in place of noised ones (anything where the cap is 1)."""

    noise_caps: Float[Array, "b l"] = struct.field(metadata=TOKENS)  # 0 is kept, 1 is generated
    seeds: Int[Array, "b n"]
    # What follows is None if no row has it, or holds zeros for the rows that have not.
    kept: Bool[Array, "b l p"] | None = struct.field(default=None, metadata=TOKENS)
    """Numbers that are put back in tokens that are generated."""
    cycles: Float[Array, "b 3"] | None = None
    """Of loops: (tokens along time, the first's time, what lies between two)."""
    negative: Int[Array, "b s"] | Float[Array, "b s e"] | None = None
    negative_segment_ids: Int[Array, "b s"] | None = None

    def unconditioned(self) -> SamplerInputs:
        """The same rows with the negative prompt, or the empty one: the first token of every text."""
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

    Rows are padded to ``row_tokens``, or the longest request's. The inputs have a form that serves the
    requests ``together`` too, so that a step is compiled once for all of them.
    """
    every, patch, s = [*requests, *together], model.patch, model.text.max_tokens
    grids = [token_positions(request, patch) for request in requests]
    l = row_tokens or max(map(len, grids))

    def rows(values: Sequence[np.ndarray], length: int, fill: int = 0, dtype: Any = None) -> Any:
        """Arrays ``[n, ...]`` of requests, each padded to ``length``."""
        shape = len(values), length, *values[0].shape[1:]
        out = np.full(shape, fill, dtype or values[0].dtype)
        for row, value in zip(out, values, strict=True):
            row[: len(value)] = value
        return out

    def segment_ids(values: Sequence[np.ndarray], length: int) -> Any:
        return rows([np.ones(len(one), np.int32) for one in values], length)

    known = [_known_tokens(patch, request) for request in every]
    clean, caps, kept = zip(*known[: len(requests)], strict=True)
    # Tokens of a modulation group share a cap; a row that knows nothing has one group of cap 1.
    groups = [np.unique(one, return_inverse=True) for one in caps]
    most = max(len(np.unique(r.known.noise_caps)) if r.known else 1 for r in every)
    text = [model.text.tokens(r.prompt, r.text_states) for r in requests]
    tokens, segments = zip(*(request.fields(patch) for request in requests), strict=True)
    dtypes = dict.fromkeys([*tokens[0], *segments[0]], np.float32)
    dtypes |= {name: one.field(model).dtype for name, one in model.conditioners.items()}
    by_name = {k: np.array([[one[k]] for one in segments], dtypes[k]) for k in segments[0]}
    arrays: dict[str, Any] = dict(
        tokens=rows(clean, l),
        noise_caps=rows(caps, l, 1),
        group_ids=rows([ids.astype(np.int32) for _, ids in groups], l),
        group_t=rows([values for values, _ in groups], most, 1),
        dropped=np.zeros((len(requests), 1), np.float32),
        positions=rows(grids, l, dtype=np.float32),
        segment_ids=segment_ids(grids, l),
        token_ids=rows([np.arange(len(grid), dtype=np.int32) for grid in grids], l),
        text=rows(text, s),
        text_segment_ids=segment_ids(text, s),
        seeds=np.array([[request.seed % 2**32] for request in requests], np.uint32),
        token_fields={k: rows([one[k] for one in tokens], l, 0, dtypes[k]) for k in tokens[0]},
        segment_fields=by_name,
    )
    # All rows of a compiled step have these, or none has.
    if any(numbers.any() for _, _, numbers in known):
        arrays["kept"] = rows(kept, l)
    if any(r.loop for r in every):
        cycles = [_cycle(g) if r.loop else (0, 0, 0) for g, r in zip(grids, requests, strict=True)]
        arrays["cycles"] = np.array(cycles, np.float32)
    if any(r.negative for r in every) or getattr(model.text, "padded", False):
        negative = [model.text.tokens(r.negative, r.negative_states) for r in requests]
        arrays["negative"] = rows(negative, s)
        arrays["negative_segment_ids"] = segment_ids(negative, s)
    return SamplerInputs(**arrays)


def _known_tokens(
    patch: PatchConfig, request: Request
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The request's known latents ``[l, p]``, their noise caps ``[l]``, and which numbers are kept in
    tokens that are not kept as a whole, bool ``[l, p]``."""
    known, nothing = request.known, np.zeros((*request.size, patch.channels), np.float32)
    known = known or KnownLatents(nothing, np.ones(request.frames))
    caps = known.noise_caps if np.ndim(known.noise_caps) == 3 else known.noise_caps[:, None, None]
    caps = np.broadcast_to(caps[..., None], known.clean.shape)
    clean, each = (  # [l, p]
        patchify(patch, x.astype(np.float32), request.loop) for x in (known.clean, caps)
    )
    highest = each.max(-1)
    return clean, highest, (each == 0) & (highest > 0)[:, None]


def _cycle(positions: np.ndarray) -> tuple[float, float, float]:
    """See ``SamplerInputs.cycles``."""
    clock = np.unique(positions[:, 0])
    unit = float(clock[1] - clock[0]) if len(clock) > 1 else 1.0
    # Otherwise no time would follow the last one.
    assert np.allclose(np.diff(clock), unit, rtol=1e-3), "times of a loop are evenly spaced"
    return float(len(clock)), float(clock[0]), unit


def filled(clip: np.ndarray, stride: int) -> np.ndarray:
    """A clip ``[t, ...]`` whose last frame stands still until its token has ``stride`` frames."""
    return np.concatenate([clip, np.repeat(clip[-1:], (1 - len(clip)) % stride, 0)])


@dataclasses.dataclass(frozen=True)
class Space:
    """Between the pixels of clips and the latents of a model."""

    codec: Codec  # PixelCodec() for a model of pixels
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
        return self.encode(head)[1 if self.codec.strides[0] > 1 else 0 :]


COLUMNS = ("prompt", "prompts", "prompt_en", "caption", "text")  # the first that is there counts


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a file in its order.

    ``.csv`` and ``.tsv`` have a header, ``.json`` is a list, ``.jsonl`` has a value on each line: of
    strings, or of objects. Any other file has a prompt on each line that is not blank.
    """
    raw, suffix = read_bytes(path, 256 * MiB, "the prompts"), Path(path).suffix.lower()
    remedy = "write UTF-8 text with a prompt on each line, or a table or JSON with a key 'prompt'"
    with checking_input(f"prompt file {str(path)!r} cannot be used", remedy):
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        # Not splitlines: a prompt may hold U+2028 and its like.
        rows: Any = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
        if suffix in (".csv", ".tsv"):
            how: Any = dict(delimiter=max(",;\t", key=(rows or [""])[0].count), strict=True)
            if suffix == ".tsv":  # its quotes have no meaning but around a cell, from spreadsheets
                how = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = list(csv.DictReader(io.StringIO(text, newline=""), **how))
        elif suffix in (".jsonl", ".ndjson"):
            rows = list(map(json.loads, rows))
        elif suffix == ".json":
            rows = json.loads(text)
            if isinstance(rows, dict):  # {"prompts": [...], ...}
                rows = next((inner for inner in rows.values() if isinstance(inner, list)), [])
        prompts = [_prompt_of(row) for row in rows]
        bad = [i for i, one in enumerate(prompts, 1) if not one or SURROGATES.search(one)]
        faults = [(True, f"number {i} is no prompt") for i in bad]
        refuse_if([*faults, (not prompts, "it is empty")])
    return prompts


def _prompt_of(row: Any) -> str:
    """The prompt of a row of a table or a value of JSON; empty if there is none."""
    if isinstance(row, dict):
        names = {re.sub(r"[\s-]+", "_", str(name).strip().lower()): name for name in row}
        row = next((row[names[name]] for name in COLUMNS if name in names), "")
        if isinstance(row, str) and (whole := re.fullmatch(r'"((?:[^"]|"")*)"', row)):
            row = whole[1].replace('""', '"')
    return row.strip() if isinstance(row, str) else ""
