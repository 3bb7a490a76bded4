"""A decoded frame to pixels as a player shows them: turned, square, opaque, ordinary R'G'B' of 8 bits.

Stored pixels are stretched in width by the sample aspect ratio, as players do, then mirrored and
turned by the display matrix. Y'CbCr becomes R'G'B' by the frame's own matrix and range; where it names
none, BT.709 from 720 lines or 1,280 columns on and BT.601 below, limited range but for JPEG's formats.
Transparent pixels stand before a background colour.

HDR: the electro-optical transfer function gives light in cd/m2 (PQ: SMPTE ST 2084; HLG: BT.2100 with
its system gamma of 1.2 on a display of 1,000 cd/m2), which is divided by 203 cd/m2, the level of
diffuse white (BT.2408). The highlights above are rolled off by the curve of BT.2390 section 5.4.1
(a Hermite spline in PQ's scale) applied to the brightest of the three primaries, which keeps hues.
Then BT.2020 primaries become BT.709 ones, colours outside are clipped, and the inverse of BT.1886's
gamma of 2.4 makes the signal. Wide gamut alone (BT.2020 or P3 primaries with an ordinary transfer)
takes these last steps only. FFmpeg's own filter for this, `zscale`, is not in PyAV's wheels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import struct
from collections.abc import Sequence
from typing import Any

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from dit_jax.files import refuse_if
from dit_jax.prepare.refusals import refuse_file

_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # H.273's numbers to the scaler's.
_KNOWN_MATRICES = {*_MATRICES, 0, 2, 3}
# For pixels that are kept: without the last flag they are two levels darker.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
LARGEST = 1 << 26  # Pixels of the largest picture that is decoded.
PQ, HLG = 16, 18  # H.273's numbers of the transfer characteristics.
WHITE = 203.0  # Light of diffuse white, in cd/m2.
DISPLAY_GAMMA = 2.4
BT2020_TO_BT709 = (
    (1.6604910021, -0.5876411388, -0.0728498633),
    (-0.1245504745, 1.1328998971, -0.0083494226),
    (-0.0181507634, -0.1005788980, 1.1187296614),
)
P3_TO_BT709 = (
    (1.2249401763, -0.2249401763, 0.0),
    (-0.0420569547, 1.0420569547, 0.0),
    (-0.0196375546, -0.0786360456, 1.0982736001),
)
# Linear RGB, white D65, by H.273's numbers of the primaries.
TO_BT709 = {9: BT2020_TO_BT709, 11: P3_TO_BT709, 12: P3_TO_BT709}
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How pictures are shown."""

    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pixels stand before, RGB in 0..255."""

    def __post_init__(self) -> None:
        colour = len(self.background) == 3 and all(0 <= x <= 255 for x in self.background)
        message = f"background is {self.background}: it is three numbers in 0..255"
        refuse_if([(not colour, message)])


class Renderer:
    """Turns the frames of one stream into pixels; by what its first frame says."""

    def __init__(
        self,
        frame: av.VideoFrame,
        config: DecodingConfig,
        aspect: float = 1.0,
        turn: tuple[bool, int] | None = None,
    ):
        """`aspect`: width of a stored pixel over its height. `turn`: in place of `display_turn`."""
        data = _side_data(frame)
        self.mirrored, self.rotation = turn or display_turn(frame, data.get(Type.DISPLAYMATRIX))
        wide = max(round(frame.width * aspect), 1) if 1 / 16 < aspect < 16 else frame.width
        self.height, self.width = self._swapped(frame.height, wide)
        self.transfer, self.primaries = int(frame.color_trc), int(frame.color_primaries)
        self.mapped = needs_mapping(self.transfer, self.primaries)
        self.background = np.array(config.background, np.float32)
        self.hdr = {PQ: "pq", HLG: "hlg"}.get(self.transfer, "")
        self.looks = {"height": self.height, "width": self.width, "rotation": self.rotation}
        self.looks |= {"hdr": self.hdr}
        light = data.get(Type.CONTENT_LIGHT_LEVEL)
        peak = float(struct.unpack("=I", bytes(light)[:4])[0]) if light is not None else 0.0
        self.peak = peak if 100 <= peak <= 10000 else 1000.0
        kind, matrix = frame.format.name, int(frame.colorspace)
        unmapped = Type.DOVI_METADATA in data and self.transfer in (0, 2)
        size = f"{wide} x {frame.height} pixels, at most {LARGEST}"
        refuse_file(
            [
                (frame.height * wide > LARGEST, "too large", size),
                (matrix not in _KNOWN_MATRICES, "unsupported", f"colour matrix {matrix} of H.273"),
                (unmapped, "hdr", "Dolby Vision without a base layer"),
            ]
        )
        rgb = frame.format.is_rgb or kind == "pal8"
        full = frame.color_range == 2 or kind.startswith("yuvj") or rgb
        self._range = ColorRange.JPEG if full else ColorRange.MPEG
        guess = 1 if frame.height >= 720 or frame.width >= 1280 else 6
        self._matrix = None if rgb else _MATRICES.get(matrix, _MATRICES[guess])
        # The scaler takes grey for BT.601's luma: by that matrix all luma stays as it is.
        self._luma = None if rgb else _MATRICES[6]
        self._scalers = collections.defaultdict[tuple, VideoReformatter](VideoReformatter)

    def pixels(
        self, frame: av.VideoFrame, size: Sequence[int] = (), how: Interpolation = EXACT
    ) -> np.ndarray:
        """The displayed picture, uint8 RGB [height, width, 3]; by default of its own size."""
        alpha = _has_alpha(frame.format.name)
        # The scaler writes planes more than twice as fast as packed pixels, and the same numbers.
        names = ("rgb48le", "rgba64le") if self.mapped else ("gbrp", "rgba")
        image = self._scaled(frame, size, names[alpha], how)
        opacity = image[..., 3:]
        if self.mapped:
            image = to_sdr(image[..., :3], self.transfer, self.primaries, self.peak)
        if alpha:
            part = opacity.astype(np.float32) / np.iinfo(opacity.dtype).max
            image = np.rint(image[..., :3] * part + self.background * (1 - part)).astype(np.uint8)
        return self._turned(image)

    def lightness(self, frame: av.VideoFrame, size: Sequence[int] = ()) -> np.ndarray:
        """The displayed picture's luma, uint8 [height, width] over the full range."""
        if self.mapped or _has_alpha(frame.format.name):
            shown = self.pixels(frame, size, Interpolation.AREA)
            return cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY)
        return self._turned(self._scaled(frame, size, "gray", Interpolation.AREA))

    def _scaled(
        self, frame: av.VideoFrame, size: Sequence[int], name: str, how: Interpolation
    ) -> np.ndarray:
        height, width = self._swapped(*(size or (self.height, self.width)))
        options: dict[str, Any] = {"src_color_range": self._range, "interpolation": how}
        options["src_colorspace"] = self._luma if name == "gray" else self._matrix
        options |= {"dst_color_range": ColorRange.JPEG, "threads": 1}
        scaler = self._scalers[height, width, name, int(how)]
        return scaler.reformat(frame, width, height, name, **options).to_ndarray()

    def _swapped(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.rotation in (90, 270) else (height, width)

    def _turned(self, pixels: np.ndarray) -> np.ndarray:
        if self.mirrored:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(np.rot90(pixels, -self.rotation // 90))


def display_turn(frame: av.VideoFrame, matrix: Any) -> tuple[bool, int]:
    """(mirrored left to right, then degrees turned clockwise: 0, 90, 180, 270), the nearest to a
    display matrix of ISO 14496-12, nine int32 row by row; none by one that maps all to a line."""
    if matrix is None:  # Or it is hidden by side data of a type that PyAV does not know.
        turn = -frame.rotation % 360
        return False, turn if turn % 90 == 0 else 0
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    mirrored = a * d - b * c < 0
    if a * d - b * c == 0:
        return False, 0
    if mirrored:  # Undo it: what is left is a turn.
        a, b = -a, -b
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return mirrored, 0 if a > 0 else 180
    return mirrored, 90 if b > 0 else 270


def _side_data(frame: av.VideoFrame) -> dict[Type, Any]:
    """A frame's side data by type; nothing where PyAV does not know one of the types."""
    try:
        data: Any = frame.side_data.keys()
        return {one.type: one for one in data}
    except ValueError:
        return {}


@functools.cache
def _has_alpha(pixel_format: str) -> bool:
    described = av.VideoFormat(pixel_format)
    return described.has_palette or any(part.is_alpha for part in described.components)


def needs_mapping(transfer: int, primaries: int) -> bool:
    """Whether pixels with these numbers of H.273 look wrong when taken for BT.709."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def pq_to_light(signal):
    """PQ signal in [0, 1] to light in cd/m2, at most 10,000 (ST 2084, equation 4.1)."""
    power = np.power(np.clip(signal, 0, 1), 1 / _M2)
    return 10000.0 * np.power(np.maximum(power - _C1, 0) / (_C2 - _C3 * power), 1 / _M1)


def light_to_pq(light):
    """Light in cd/m2 to the PQ signal in [0, 1] (ST 2084, equation 5.2)."""
    power = np.power(np.clip(light, 0, 10000.0) / 10000.0, _M1)
    return np.power((_C1 + _C2 * power) / (1 + _C3 * power), _M2)


def hlg_to_scene(signal):
    """HLG signal in [0, 1] to scene light in [0, 1] (BT.2100, inverse OETF)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.clip(signal, 0, 1)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def rolled_off(light, peak: float):
    """BT.2390's curve: light in cd/m2 up to `peak` to light up to `WHITE`, the dark part as it is."""
    if peak <= WHITE:
        return np.minimum(light, WHITE)
    scale = float(light_to_pq(peak))
    x = np.minimum(light_to_pq(light) / scale, 1.0)
    target = float(light_to_pq(WHITE)) / scale
    knee = 1.5 * target - 0.5
    t = np.maximum(x - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * target
    )
    return pq_to_light(np.where(x < knee, x, spline) * scale)


def to_sdr(pixels: np.ndarray, transfer: int, primaries: int, peak: float = 1000.0) -> np.ndarray:
    """R'G'B' uint16 [h, w, 3] over its full range to uint8 [h, w, 3] for an ordinary display; `peak`:
    the brightest light meant, in cd/m2."""
    light = _lights(transfer)[pixels]
    if transfer == HLG:
        luma = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= 1000.0 * np.power(np.maximum(luma, 1e-6), 0.2)[..., None]
    if transfer in (PQ, HLG):
        brightest = np.maximum(light.max(-1, keepdims=True), 1e-4)
        light *= rolled_off(brightest, 1000.0 if transfer == HLG else peak) / brightest / WHITE
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / DISPLAY_GAMMA)).astype(np.uint8)


@functools.cache
def _lights(transfer: int) -> np.ndarray:
    """Light by the signal of 16 bits, float32: cd/m2 for PQ, of the scene for HLG, else white is 1."""
    functions = {PQ: pq_to_light, HLG: hlg_to_scene}
    light = functions.get(transfer, lambda x: x**DISPLAY_GAMMA)(np.linspace(0, 1, 1 << 16))
    return light.astype(np.float32)
