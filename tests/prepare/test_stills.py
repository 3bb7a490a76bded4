"""Images as cameras, editors and browsers make them: upright, opaque, eight bits."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import Refused
from tests.prepare.made_media import displayed, probe

RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 256, (4, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)


def shown(path, **config):
    found = displayed(path, DecodingConfig(**config))
    assert len(found) == 1 and found[0][0] == 0.0
    return found[0][1]


@pytest.mark.parametrize(
    "number, undo",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, 1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x, -1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, number, undo):
    # EXIF 2.3 tag 274: how the stored picture must be turned; `undo` stores the upright one so.
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = number
    Image.fromarray(np.ascontiguousarray(undo(BLOCKS))).save(path, exif=exif)
    assert np.array_equal(shown(path), BLOCKS)
    found = probe(path)
    assert (found.kind, found.height, found.width) == ("image", 64, 96)
    assert found.duration == 0 and found.frames == 1


GREY = BLOCKS[..., 0]


@pytest.mark.parametrize(
    ("name", "image", "expected", "tolerance"),
    [
        ("l.png", Image.fromarray(GREY), GREY[..., None], 0),
        ("p.png", Image.fromarray(BLOCKS).quantize(256), BLOCKS, 12),
        ("16.png", Image.fromarray(GREY.astype(np.uint16) * 257), GREY[..., None], 0),
        ("cmyk.tif", Image.fromarray(BLOCKS).convert("CMYK"), BLOCKS, 1),
        ("cmyk.jpg", Image.fromarray(BLOCKS).convert("CMYK"), BLOCKS, 60),
        ("1.png", Image.fromarray(GREY > 128), (GREY > 128)[..., None] * 255, 0),
        ("a.webp", Image.fromarray(BLOCKS), BLOCKS, 160),
    ],
)
def test_modes_become_rgb(tmp_path, name, image, expected, tolerance):
    image.save(tmp_path / name)
    off = np.abs(shown(tmp_path / name).astype(int) - expected)
    assert off.shape == (64, 96, 3) and off.max() <= tolerance and off.mean() <= tolerance / 8


def test_transparent_pixels_stand_before_the_background(tmp_path):
    rgba = np.dstack([BLOCKS, np.full((64, 96), 255, np.uint8)])
    rgba[:32, :, 3], rgba[32:40, :, 3] = 0, 51
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    white, blue = shown(path), shown(path, background=(0, 0, 200))
    assert (white[:32] == 255).all() and (blue[:32] == (0, 0, 200)).all()
    assert np.array_equal(white[40:], BLOCKS[40:]) and np.array_equal(blue[40:], BLOCKS[40:])
    mixed = np.rint(BLOCKS[32:40] * 0.2 + np.array([0, 0, 200]) * 0.8)
    assert np.abs(blue[32:40] - mixed).max() <= 1
    palette = Image.fromarray(rgba).quantize(8)
    palette.save(tmp_path / "p.png")
    assert (shown(tmp_path / "p.png")[:30] == 255).mean() > 0.99


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_videos_with_their_own_times(tmp_path, name):
    first, *others = [Image.fromarray(np.full((40, 60, 3), 20 * i + 5, np.uint8)) for i in range(9)]
    path, delays = tmp_path / name, [100] * 9
    delays[3] = 300
    how = {"duration": delays, "loop": 0, "lossless": True}
    first.save(path, save_all=True, append_images=others, **how)
    found = probe(path)
    assert found.kind == "video" and found.fps == 10 and found.frames == 9
    assert found.duration == pytest.approx(1.1)
    levels = [round((int(x[5, 5, 0]) - 5) / 20) for _, x in displayed(path)]
    assert levels == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8]  # The fourth is shown for three intervals.


def test_a_still_gif_and_pictures_that_are_no_animation_are_one(tmp_path):
    Image.fromarray(BLOCKS).save(tmp_path / "a.gif")
    assert probe(tmp_path / "a.gif").kind == "image"
    pages = {"save_all": True, "append_images": [Image.new("L", (9, 9))]}
    Image.fromarray(BLOCKS).save(tmp_path / "a.tif", **pages)
    assert np.array_equal(shown(tmp_path / "a.tif"), BLOCKS)


def test_profiles_become_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    Image.fromarray(BLOCKS).save(tmp_path / "odd.png", icc_profile=lab.tobytes())
    assert shown(tmp_path / "odd.png").shape == BLOCKS.shape
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(BLOCKS).save(tmp_path / "srgb.png", icc_profile=srgb)
    assert np.abs(shown(tmp_path / "srgb.png").astype(int) - BLOCKS).max() <= 1


def test_heic_that_is_damaged_or_unknown_is_refused(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    with pytest.raises(Refused) as refused:
        probe(path)
    assert refused.value.reason in ("unsupported", "cannot be decoded")
