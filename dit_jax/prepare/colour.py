"""HDR and wide-gamut pixels to what an ordinary display shows: R'G'B' of BT.709 primaries, 8 bits.

HDR: the electro-optical transfer function gives light in cd/m2 (PQ: SMPTE ST 2084; HLG: BT.2100 with
its system gamma of 1.2 on a display of 1,000 cd/m2), which is divided by 203 cd/m2, the level of
diffuse white (BT.2408). The highlights above are rolled off by the curve of BT.2390 section 5.4.1
(a Hermite spline in PQ's scale) applied to the brightest of the three primaries, which keeps hues;
the peak is 1,000 cd/m2 where the file does not say. Then BT.2020 primaries become BT.709 ones,
colours outside are clipped, and the inverse of BT.1886's gamma of 2.4 makes the signal.

Wide gamut alone (BT.2020 or P3 primaries with an ordinary transfer) takes the last three steps only.
"""

from __future__ import annotations

import functools

import numpy as np

PQ, HLG = 16, 18
"""The numbers of ITU-T H.273 for the transfer characteristics."""
WHITE = 203.0
"""Light of diffuse white, in cd/m2."""
DISPLAY_GAMMA = 2.4

_PRIMARIES = {  # H.273's numbers: the chromaticities x, y of red, green and blue; white is D65.
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_LEVELS = 4096  # Entries of the tables: 12 bits of a signal of 10 (or 12).


def needs_mapping(transfer: int, primaries: int) -> bool:
    """Whether pixels with these numbers of H.273 look wrong when taken for BT.709."""
    return transfer in (PQ, HLG) or primaries in _PRIMARIES and primaries != 1


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


def to_bt709(primaries: int) -> np.ndarray:
    """The matrix [3, 3] from linear RGB of these primaries (number of H.273) to BT.709's."""
    return np.linalg.inv(_to_xyz(1)) @ _to_xyz(primaries if primaries in _PRIMARIES else 1)


def to_sdr(pixels: np.ndarray, transfer: int, primaries: int, peak: float = 1000.0) -> np.ndarray:
    """R'G'B' uint16 [h, w, 3] over its full range to uint8 [h, w, 3] for an ordinary display.

    `transfer`, `primaries`: numbers of H.273; `peak`: the brightest light meant, in cd/m2.
    """
    light = _light_table(transfer)[pixels >> 4]
    if transfer == HLG:
        luma = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= 1000.0 * np.power(np.maximum(luma, 1e-6), 0.2)[..., None]
        peak = 1000.0
    if transfer in (PQ, HLG):
        brightest = light.max(-1)
        gains = _gain_table(round(peak))
        at = np.sqrt(np.minimum(brightest / 10000.0, 1.0)) * (_LEVELS - 1)
        light *= gains[np.rint(at).astype(np.intp)][..., None]
    linear = np.clip(light @ to_bt709(primaries).T.astype(np.float32), 0, 1)
    return _signal_table()[np.rint(np.sqrt(linear) * (_LEVELS - 1)).astype(np.intp)]


@functools.cache
def _light_table(transfer: int) -> np.ndarray:
    """Light of each of `_LEVELS` signals: cd/m2 for PQ, of the scene for HLG, else white is 1."""
    signal = np.linspace(0, 1, _LEVELS)
    if transfer == PQ:
        return pq_to_light(signal).astype(np.float32)
    light = hlg_to_scene(signal) if transfer == HLG else signal**DISPLAY_GAMMA
    return light.astype(np.float32)


@functools.cache
def _gain_table(peak: int) -> np.ndarray:
    """What light is multiplied with, white becoming 1, by the square root of light / 10,000."""
    light = 10000.0 * np.linspace(0, 1, _LEVELS) ** 2
    light[0] = light[1]
    return (rolled_off(light, peak) / light / WHITE).astype(np.float32)


@functools.cache
def _signal_table() -> np.ndarray:
    """The signal, 0..255, by the square root of linear light in [0, 1]."""
    linear = np.linspace(0, 1, _LEVELS) ** 2
    return np.rint(255 * linear ** (1 / DISPLAY_GAMMA)).astype(np.uint8)


def _to_xyz(primaries: int) -> np.ndarray:
    """The matrix [3, 3] from linear RGB to CIE XYZ, white at Y = 1."""
    corners = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in _PRIMARIES[primaries]]).T
    x, y = _D65
    return corners * np.linalg.solve(corners, np.array([x / y, 1.0, (1 - x - y) / y]))
