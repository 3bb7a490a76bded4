"""Images as cameras, editors and browsers make them: upright, opaque, eight bits."""

import numpy as np
import pytest
from made_media import displayed, probe
from PIL import Image, ImageCms

from dit_jax.prepare.examining import examine
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import Refused

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


def test_modes_become_rgb(tmp_path):
    grey = BLOCKS[..., 0]
    for name, image, expected, tolerance in (
        ("l.png", Image.fromarray(grey), grey[..., None].repeat(3, 2), 0),
        ("p.png", Image.fromarray(BLOCKS).quantize(256), BLOCKS, 12),
        ("16.png", Image.fromarray(grey.astype(np.uint16) * 257), grey[..., None].repeat(3, 2), 0),
        ("cmyk.tif", Image.fromarray(BLOCKS).convert("CMYK"), BLOCKS, 1),
        ("cmyk.jpg", Image.fromarray(BLOCKS).convert("CMYK"), BLOCKS, 60),
        ("1.png", Image.fromarray(grey > 128), ((grey > 128) * 255)[..., None].repeat(3, 2), 0),
        ("a.webp", Image.fromarray(BLOCKS), BLOCKS, 160),
        ("a.bmp", Image.fromarray(BLOCKS), BLOCKS, 0),
        ("a.tif", Image.fromarray(BLOCKS), BLOCKS, 0),
    ):
        path = tmp_path / name
        image.save(path)
        off = np.abs(shown(path).astype(int) - expected)
        assert off.max() <= tolerance and off.mean() <= max(tolerance / 8, 0), name


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
    made = [Image.fromarray(np.full((40, 60, 3), 20 * i + 5, np.uint8)) for i in range(9)]
    path = tmp_path / name
    delays = [100] * 9
    delays[3] = 300
    made[0].save(
        path, save_all=True, append_images=made[1:], duration=delays, loop=0, lossless=True
    )
    found = probe(path)
    assert found.kind == "video" and found.fps == 10 and found.frames == 9
    assert found.duration == pytest.approx(1.1)
    levels = [round((int(x[5, 5, 0]) - 5) / 20) for _, x in displayed(path)]
    assert levels == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8]  # The fourth is shown for three intervals.


def test_a_still_gif_is_an_image(tmp_path):
    Image.fromarray(BLOCKS).save(tmp_path / "a.gif")
    assert probe(tmp_path / "a.gif").kind == "image"


def test_several_pictures_that_are_no_animation_are_the_first(tmp_path):
    Image.fromarray(BLOCKS).save(
        tmp_path / "a.tif", save_all=True, append_images=[Image.new("L", (9, 9))]
    )
    assert np.array_equal(shown(tmp_path / "a.tif"), BLOCKS)


def test_damaged_images_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RNG.integers(0, 256, (200, 200, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(Refused) as refused:
        shown(path)
    assert refused.value.reason == "truncated"
    assert examine(path).refusal is not None


def test_profiles_become_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    Image.fromarray(BLOCKS).save(tmp_path / "odd.png", icc_profile=lab.tobytes())
    assert shown(tmp_path / "odd.png").shape == BLOCKS.shape
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(BLOCKS).save(tmp_path / "srgb.png", icc_profile=srgb)
    assert np.abs(shown(tmp_path / "srgb.png").astype(int) - BLOCKS).max() <= 1


def test_heic_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    with pytest.raises(Refused) as refused:
        probe(path)
    assert refused.value.reason in ("unsupported", "cannot be decoded")
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.register_heif_opener()
    Image.fromarray(BLOCKS).save(path, quality=95)
    assert np.abs(shown(path).astype(int) - BLOCKS).mean() < 12


def test_an_image_becomes_a_clip_of_one_frame(tmp_path):
    Image.fromarray(BLOCKS.repeat(3, 0).repeat(3, 1)).save(tmp_path / "a.png")
    report = examine(tmp_path / "a.png")
    assert len(report.clips) == 1 and report.clips[0].rejection is None
    assert report.clips[0].frames == 1 and len(report.clips[0].hashes) == 1
