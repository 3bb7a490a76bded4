"""A decoded frame to pixels as a player shows them: turned, square, in ordinary R'G'B'.

Stored pixels are stretched in width by the sample aspect ratio, as players do, then mirrored and
turned by the display matrix. Y'CbCr becomes R'G'B' by the frame's own matrix and range; where it names
none, BT.709 from 720 lines or 1,280 columns on and BT.601 below, limited range but for JPEG's formats.
Transparent pixels stand before a background colour. HDR and wide gamuts: see `colour.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from typing import Any

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from dit_jax.prepare import colour
from dit_jax.prepare.refusals import Refused

_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # H.273's numbers to the scaler's.
_KNOWN_MATRICES = {*_MATRICES, 0, 2, 3}
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""The scaler's filter for pixels that are kept: without the last flag they are two levels darker."""
_QUICK = Interpolation.BILINEAR
LARGEST = 1 << 26
"""Pixels of the largest picture that is decoded."""


@dataclasses.dataclass(frozen=True)
class Orientation:
    """How a stored picture is turned for display: mirrored left to right, then turned clockwise."""

    mirrored: bool = False
    rotation: int = 0
    """0, 90, 180 or 270 degrees clockwise."""

    @property
    def turned(self) -> bool:
        """Whether rows become columns."""
        return self.rotation in (90, 270)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels [h, w, ...] as displayed: [h, w, ...] or [w, h, ...]."""
        if not self.mirrored and not self.rotation:
            return np.ascontiguousarray(pixels)
        if self.mirrored:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(np.rot90(pixels, -self.rotation // 90))


def orientation(matrix: bytes) -> Orientation:
    """The orientation nearest to a display matrix of ISO 14496-12: nine int32, row by row.

    A matrix that maps everything to a line (damage) is taken for none.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
    if a * d - b * c == 0:
        return Orientation()
    mirrored = a * d - b * c < 0
    if mirrored:  # Undo it: what is left is a turn.
        a, b = -a, -b
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(mirrored, 0 if a > 0 else 180)
    return Orientation(mirrored, 90 if b > 0 else 270)


class Renderer:
    """Turns the frames of one stream into pixels; made from its first frame."""

    def __init__(
        self,
        frame: av.VideoFrame,
        aspect: float = 1.0,
        background: tuple[int, int, int] = (255, 255, 255),
        hdr: str = "tone map",
    ):
        """`aspect`: width of a stored pixel over its height. `hdr`: "tone map" or "refuse"."""
        self.stored = frame.height, frame.width
        self.background = np.array(background, np.float32)
        self._scalers: dict[tuple, VideoReformatter] = {}
        self._describe(frame)
        wide = max(round(frame.width * aspect), 1) if 1 / 16 < aspect < 16 else frame.width
        upright = (frame.height, wide)
        self.height, self.width = upright[::-1] if self.orientation.turned else upright
        if frame.height * wide > LARGEST:
            raise Refused("too large", f"{wide} x {frame.height} pixels, at most {LARGEST}")
        if self.matrix not in _KNOWN_MATRICES:
            raise Refused("unsupported", f"colour matrix {self.matrix} of H.273")
        if self.hdr == "dolby vision":
            raise Refused("hdr", "Dolby Vision without a base layer that others can show")
        if self.hdr and hdr == "refuse":
            raise Refused("hdr", f"{self.hdr}, and the config refuses HDR")

    def _describe(self, frame: av.VideoFrame) -> None:
        """Reads the first frame's metadata."""
        data = _side_data(frame)
        matrix = data.get(Type.DISPLAYMATRIX)
        if matrix is not None:
            self.orientation = orientation(bytes(matrix))
        else:
            turn = -frame.rotation % 360 if data.get("unreadable") else 0
            self.orientation = Orientation(rotation=turn if turn % 90 == 0 else 0)
        self.transfer, self.primaries = int(frame.color_trc), int(frame.color_primaries)
        self.matrix = int(frame.colorspace)
        self.pixel_format = frame.format.name
        self.rgb = frame.format.is_rgb or self.pixel_format == "pal8"
        self.full_range = frame.color_range == 2 or self.pixel_format.startswith("yuvj") or self.rgb
        self.hdr = {colour.PQ: "pq", colour.HLG: "hlg"}.get(self.transfer, "")
        if Type.DOVI_METADATA in data and not self.hdr and self.transfer in (0, 2):
            self.hdr = "dolby vision"
        self.peak = _peak(data)

    def pixels(
        self,
        frame: av.VideoFrame,
        height: int | None = None,
        width: int | None = None,
        how: Interpolation = EXACT,
    ) -> np.ndarray:
        """The displayed picture, uint8 RGB [height, width, 3]; by default of its own size.

        `how`: the scaler's filter, where the size differs.
        """
        height, width = height or self.height, width or self.width
        if self.orientation.turned:
            height, width = width, height
        mapped = colour.needs_mapping(self.transfer, self.primaries)
        # The scaler writes planes more than twice as fast as packed pixels, and the same numbers.
        plain = "rgb24" if self.rgb else "gbrp"
        alpha = has_alpha(frame.format.name)
        if mapped:
            pixel_format = "rgba64le" if alpha else "rgb48le"
        else:
            pixel_format = "rgba" if alpha else plain
        key = (height, width, pixel_format, int(how))
        scaler = self._scalers.setdefault(key, VideoReformatter())
        matrix = None if self.rgb else _MATRICES.get(self.matrix) or _guess(*self.stored)
        image = scaler.reformat(
            frame,
            width,
            height,
            pixel_format,
            src_colorspace=matrix,
            interpolation=how,
            src_color_range=ColorRange.JPEG if self.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        image = _merged(image) if pixel_format == "gbrp" else image.to_ndarray()
        opacity = image[..., 3:]
        if mapped:
            image = colour.to_sdr(image[..., :3], self.transfer, self.primaries, self.peak)
        if alpha:
            image = over(image[..., :3], opacity, self.background)
        return self.orientation.apply(image)

    def lightness(self, frame: av.VideoFrame, every: int = 1) -> np.ndarray:
        """The displayed picture's luma, uint8 [h, w] over the full range, its pixels as stored.

        Nothing is scaled, so that it costs next to nothing: `every` so many rows and columns are
        taken, and the width is not stretched. Where the stored picture has no luma of 8 to 16 bits,
        or not one to be shown as it is, the grey of `pixels` at that fraction of its size.
        """
        form = frame.format
        mapped = colour.needs_mapping(self.transfer, self.primaries)
        if mapped or self.rgb or form.name not in _PLANAR:
            size = max(self.height // every, 1), max(self.width // every, 1)
            return cv2.cvtColor(self.pixels(frame, *size, _QUICK), cv2.COLOR_RGB2GRAY)
        plane, bits = frame.planes[0], form.components[0].bits
        rows = np.frombuffer(memoryview(plane), np.dtype("<u2" if bits > 8 else np.uint8))
        luma = rows.reshape(plane.height, -1)[::every, : plane.width : every]
        if bits > 8:
            luma = (luma >> (bits - 8)).astype(np.uint8)
        if not self.full_range:
            luma = cv2.LUT(luma, _expansion())
        return self.orientation.apply(luma)


def _merged(image: av.VideoFrame) -> np.ndarray:
    """Planes of G, B and R as uint8 RGB [h, w, 3]."""
    planes = [
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:, : image.width]
        for plane in image.planes
    ]
    return cv2.merge([planes[2], planes[0], planes[1]])


def over(rgb: np.ndarray, opacity: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Pixels uint8 [h, w, 3] before a colour [3], as uint8 [h, w, 3].

    `opacity`: [h, w, 1] over the full range of its integers, not multiplied into the pixels.
    """
    part = opacity.astype(np.float32) / np.iinfo(opacity.dtype).max
    return np.rint(rgb * part + np.asarray(background, np.float32) * (1 - part)).astype(np.uint8)


@functools.cache
def has_alpha(pixel_format: str) -> bool:
    """Whether pixels of a format of FFmpeg may be transparent."""
    described = av.VideoFormat(pixel_format)
    return described.has_palette or any(part.is_alpha for part in described.components)


_PLANAR = {"gray", "nv12", "nv21", "nv16", "gray10le", "gray12le", "gray16le"} | {
    f"yuv{kind}4{s}p{bits}"
    for kind in ("", "j")
    for s in ("20", "22", "44", "40", "11", "10")
    for bits in ("", "9le", "10le", "12le", "14le", "16le")
}
"""Formats whose first plane is luma, a sample a number, in the low bits of it."""


@functools.cache
def _expansion() -> np.ndarray:
    """uint8 over the full range by luma of the limited one."""
    level = np.arange(256)
    return np.rint(np.clip((level - 16) * 255 / 219, 0, 255)).astype(np.uint8)


def _guess(height: int, width: int) -> int:
    """The scaler's number of the matrix that a picture without one has."""
    return _MATRICES[1] if height >= 720 or width >= 1280 else _MATRICES[5]


def _side_data(frame: av.VideoFrame) -> dict:
    """A frame's side data by type; `unreadable` where there is a type that PyAV does not know."""
    try:
        found: Any = frame.side_data.keys()
        return {data.type: data for data in found}
    except ValueError:
        return {"unreadable": True}


def _peak(data: dict) -> float:
    """The brightest light of HDR10's metadata, in cd/m2; 1,000 where there is none to believe."""
    light = data.get(Type.CONTENT_LIGHT_LEVEL)
    peak = float(struct.unpack("=I", bytes(light)[:4])[0]) if light is not None else 0.0
    return peak if 100 <= peak <= 10000 else 1000.0
