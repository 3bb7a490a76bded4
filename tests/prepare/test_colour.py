"""Transfer functions and matrices against the figures that their standards print."""

import numpy as np
import pytest

from dit_jax.prepare import colour


@pytest.mark.parametrize(
    "signal, light",
    [(0.0, 0.0), (0.5081, 100.0), (0.5807, 203.0), (0.7518, 1000.0), (1.0, 10000.0)],
)
def test_pq_is_st_2084(signal, light):  # The codes are those of BT.2408, table 1, and BT.2390.
    assert colour.pq_to_light(signal) == pytest.approx(light, rel=2e-3, abs=1e-6)
    assert colour.light_to_pq(light) == pytest.approx(signal, abs=2e-4)


def test_hlg_is_bt_2100():
    # Half the signal is a twelfth of the light; diffuse white, 203 cd/m2 of 1,000, is at 0.75.
    assert colour.hlg_to_scene(0.5) == pytest.approx(1 / 12, rel=1e-4)
    assert colour.hlg_to_scene(1.0) == pytest.approx(1.0, rel=1e-4)
    assert 1000 * colour.hlg_to_scene(0.75) ** 1.2 == pytest.approx(203, rel=2e-3)


def test_bt2020_to_bt709_is_bt_2087s_matrix():
    expected = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert np.abs(colour.to_bt709(9) - expected).max() < 2e-4
    assert np.abs(colour.to_bt709(1) - np.eye(3)).max() < 1e-12


def test_highlights_are_rolled_off_and_the_dark_is_kept():
    light = np.linspace(0, 1000, 2001)
    out = colour.rolled_off(light, 1000.0)
    assert (np.diff(out) > 0).all() and out[-1] == pytest.approx(203, rel=1e-6)
    scale = float(colour.light_to_pq(1000.0))
    knee = colour.pq_to_light((1.5 * float(colour.light_to_pq(203.0)) / scale - 0.5) * scale)
    assert np.abs(out - light)[light <= knee].max() < 1e-6
    assert colour.rolled_off(np.array([50.0, 900.0]), 150.0).tolist() == [50.0, 203.0]


@pytest.mark.parametrize("transfer", [colour.PQ, colour.HLG])
def test_greys_stay_grey_and_in_order(transfer):
    grey = np.linspace(0, 65535, 256).astype(np.uint16)[:, None, None].repeat(3, 2)
    out = colour.to_sdr(grey, transfer, 9)[:, 0].astype(int)
    assert np.ptp(out, axis=1).max() <= 1
    assert (np.diff(out[:, 0]) >= -1).all() and out[0, 0] == 0 and out[-1].min() >= 254


def test_the_tables_are_as_good_as_the_functions():
    signal = np.linspace(0.2, 0.75, 50)
    light = colour.rolled_off(colour.pq_to_light(signal), 1000.0) / colour.WHITE
    expected = 255 * light ** (1 / colour.DISPLAY_GAMMA)
    grey = np.rint(signal * 65535).astype(np.uint16)[:, None, None].repeat(3, 2)
    assert np.abs(colour.to_sdr(grey, colour.PQ, 9)[:, 0, 0] - expected).max() <= 1.5


def test_wide_gamut_red_is_clipped_to_red():
    red = np.array([[[65535, 0, 0]]], np.uint16)
    assert colour.to_sdr(red, 1, 9)[0, 0].tolist() == [255, 0, 0]
    assert colour.needs_mapping(1, 9) and colour.needs_mapping(16, 2)
    assert not colour.needs_mapping(1, 1) and not colour.needs_mapping(2, 2)
