"""SSIM beside its definition, flicker in closed form, the picture, and what resizing keeps."""

import numpy as np
import pytest
from scipy import ndimage

from dit_jax.codec.measures import (
    flicker,
    reconstruction_report,
    resize_baseline,
    resize_clip,
    shrunk_size,
    side_by_side,
    ssim,
)
from dit_jax.sampling.media import mean_psnr, psnr, read_video


def clip(frames=3, height=16, width=20, seed=0):
    """Smooth coloured noise, uint8."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(frames, height, width, 3)), (1, 2, 2, 0))
    return np.clip(np.rint(128 + 40 * field / field.std()), 0, 255).astype(np.uint8)


def noisy(video, level, seed=1):
    noise = np.random.default_rng(seed).normal(size=video.shape, scale=level)
    return np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)


def stated_ssim(a, b):
    """Equation 13 of Wang et al., window by window."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        for i, j, c in np.ndindex(x.shape[0] - 10, x.shape[1] - 10, 3):
            u, v = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
            mu, mv = (window * u).sum(), (window * v).sum()
            uu, vv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
            uv = (window * (u - mu) * (v - mv)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            top, below = (2 * mu * mv + c1) * (2 * uv + c2), (mu**2 + mv**2 + c1) * (uu + vv + c2)
            found.append(top / below)
    return np.mean(found)


def test_ssim_is_its_definition():
    a = clip()
    for b in (noisy(a, 8), clip(seed=5), 255 - a):
        np.testing.assert_allclose(ssim(a, b), stated_ssim(a, b), rtol=1e-9)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert ssim(a, noisy(a, 4)) > ssim(a, noisy(a, 16)) > ssim(a, clip(seed=5))
    # Of flat frames only the means are compared.
    grey, dark = (np.full((1, 11, 11, 3), level, np.uint8) for level in (100, 50))
    c1 = 2.55**2
    assert ssim(grey, dark) == pytest.approx((2 * 5000 + c1) / (100**2 + 50**2 + c1))


def test_flicker_counts_changes_of_the_error_alone():
    still, moving = np.repeat(clip(1), 6, 0), clip(6)
    for original in (still, moving):
        assert flicker(original, original) == 0
        assert flicker(original // 2, original // 2 + 9) == 0  # an error that stays
        blinking = original // 2
        blinking = blinking + np.array([0, 6] * 3, np.uint8)[:, None, None, None]
        assert flicker(original // 2, blinking) == pytest.approx(6)
        once = original // 2
        once[3:] += 5  # a seam between two of six frames
        assert flicker(original // 2, once) == pytest.approx(5 / 5)
    # Of a still original it is the mean step; of noise drawn anew, of deviation s, 2 s / √π.
    steps = np.abs(np.diff(moving.astype(int), axis=0)).mean()
    assert flicker(still, moving) == pytest.approx(steps)
    assert flicker(moving, still) == pytest.approx(steps)  # motion that is lost
    grey = np.full((9, 64, 64, 3), 128, np.uint8)
    assert flicker(grey, noisy(grey, 10)) == pytest.approx(20 / np.pi**0.5, rel=0.01)
    assert flicker(np.zeros_like(grey), np.full_like(grey, 255)) == 0  # no wrap-around


def test_the_report_is_the_means_over_clips():
    originals = [clip(), clip(1, seed=2), clip(5, 24, 16, seed=3)]
    back = [noisy(video, level) for video, level in zip(originals, (3, 6, 9), strict=True)]
    report = reconstruction_report(originals, back)
    assert report == {
        "psnr": mean_psnr(back, originals),
        "ssim": np.mean([ssim(a, b) for a, b in zip(originals, back, strict=True)]),
        "flicker": (flicker(originals[0], back[0]) + flicker(originals[2], back[2])) / 2,
        "count": 3.0,
    }
    assert all(type(value) is float for value in report.values())
    wanted = np.mean([20 * np.log10(255 / x) for x in (3, 6, 9)])
    assert report["psnr"] == pytest.approx(wanted, abs=0.3)
    assert set(reconstruction_report(originals[1:2], back[1:2])) == {"psnr", "ssim", "count"}


def test_side_by_side_shows_input_output_and_difference(tmp_path):
    original = [np.full((4, 6, 5, 3), 100, np.uint8), np.full((1, 6, 5, 3), 20, np.uint8)]
    back = [original[0] + 7, original[1] - 3]
    path = side_by_side(original, back, tmp_path / "pairs.png", frames=2, scale=3)
    (picture,), _ = read_video(path)
    assert picture.shape == (6 * (18 + 2) + 2, 2 * (15 + 2) + 2, 3)
    rows, columns = np.arange(6) * 20 + 10, np.arange(2) * 17 + 8
    levels = picture[rows[:, None], columns]
    assert (levels == levels[..., :1]).all()
    shown = [[100] * 2, [107] * 2, [156] * 2, [20, 128], [17, 128], [116, 128]]
    assert levels[..., 0].tolist() == shown


def test_resizing_keeps_constants_and_smooth_ramps():
    flat = np.full((9, 16, 24, 3), 77, np.uint8)
    np.testing.assert_array_equal(resize_clip(flat, 48), flat)
    t, y, x = np.meshgrid(np.arange(17), np.arange(64), np.arange(64), indexing="ij")
    smooth = 128 + 50 * np.sin(2 * np.pi * (t / 34 + y / 64)) + 50 * np.cos(2 * np.pi * x / 64)
    smooth = np.rint(smooth)[..., None].repeat(3, -1).astype(np.uint8)
    assert psnr(resize_clip(smooth, 1), smooth) > 140  # nothing lost
    assert psnr(resize_clip(smooth, 36), smooth) > 38
    assert psnr(resize_clip(noisy(smooth, 20), 36), smooth) > 28  # shrinking averages noise away


@pytest.mark.slow
def test_the_baseline_stores_as_many_values_as_latents_have():
    for size, ratio in (((17, 256, 256), 40.8), ((5, 32, 32), 30), ((1, 256, 192), 12)):
        small = shrunk_size(size, ratio)
        assert np.prod(small) == pytest.approx(np.prod(size) / ratio, rel=0.06)
        if size[0] > 1:
            factors = np.divide(size, small)
            assert factors.max() / factors.min() < 2.2  # five frames shrink to one or two
    assert shrunk_size((1, 256, 192), 16)[0] == 1
    originals = [clip(9, 32, 32), clip(1, 32, 40, seed=1)]
    latents = [np.zeros((3, 4, 4, 16)), np.zeros((1, 4, 5, 16))]
    ratios = [9 * 32 * 32 * 3 / (3 * 4 * 4 * 16), 32 * 40 * 3 / (4 * 5 * 16)]
    wanted = np.mean([psnr(resize_clip(v, r), v) for v, r in zip(originals, ratios, strict=True)])
    assert resize_baseline(originals, latents) == pytest.approx(wanted)
    more, fewer = ([z.repeat(n, 0) for z in latents] for n in (4, 1))
    assert resize_baseline(originals, more) > resize_baseline(originals, fewer)
    # Latents of more values than the clip: nothing is lost.
    assert resize_baseline(originals, [z.repeat(100, 0) for z in latents]) > 100
