"""Files in and out: what is written is what is read, byte for byte the same the second time."""

import errno
import os
import re
import resource
import warnings

import av
import ml_dtypes
import numpy as np
import pytest

from dit_jax.sampling import media


def smooth(t=9, h=24, w=40) -> np.ndarray:
    """A clip uint8 [t, h, w, 3] of slow waves in all three colours."""
    i, y, x = np.mgrid[0:t, 0:h, 0:w]
    waves = [np.sin(x / 9 + i / 3), np.cos(y / 8 - i / 4), np.sin((x + y) / 12)]
    return np.rint(127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def flags(t=4, h=16, w=16) -> np.ndarray:
    """A clip uint8 [t, h, w, 3] of few and pure colours: a bar that moves over four quarters."""
    video = np.zeros((t, h, w, 3), np.uint8)
    video[:, : h // 2, : w // 2] = (255, 0, 0)
    video[:, h // 2 :, : w // 2] = (0, 200, 30)
    video[:, h // 2 :, w // 2 :] = (10, 20, 250)
    for i in range(t):
        video[i, :, 2 * i : 2 * i + 2] = 255
    return video


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise in dB of two uint8 arrays."""
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def mosaic_of(*levels: int, t=1, h=2, w=3) -> list[np.ndarray]:
    """Clips uint8 [t, h, w, 3], one for every grey level."""
    return [np.full((t, h, w, 3), level, np.uint8) for level in levels]


# --- pixels ---


def test_floats_are_rounded_and_clipped_and_invert_exactly():
    x = np.array([-3.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.2, 1.0, 1.5])
    assert media.to_uint8(x).tolist() == [0, 0, 0, 1, 153, 255, 255]
    assert media.to_uint8(x.astype(ml_dtypes.bfloat16)).dtype == np.uint8
    levels = np.arange(256, dtype=np.uint8)
    floats = media.to_float(levels)
    assert floats.dtype == np.float32 and floats[0] == -1.0 and floats[-1] == 1.0
    assert np.array_equal(media.to_uint8(floats), levels)
    with pytest.raises(ValueError, match="2 of 3"):
        media.to_uint8(np.array([0.0, np.nan, np.inf]))


# --- video files ---


@pytest.mark.parametrize(
    ("fps", "shape"), [(8, (9, 24, 40)), (0.5, (1, 24, 40)), (24000 / 1001, (3, 16, 16))]
)
def test_mp4_round_trip(tmp_path, fps, shape):
    video = smooth(*shape)
    path = media.write_video(tmp_path / "a.mp4", video, fps)
    back, rate = media.read_video(path)
    assert back.shape == video.shape and back.dtype == np.uint8
    assert psnr(back, video) > 35  # crf 12 and colour at half resolution: 36.4 to 42 dB seen
    assert rate == pytest.approx(fps, rel=1e-6)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert container.duration / 1e6 == pytest.approx(shape[0] / fps, abs=1e-5)
        assert not container.metadata.get("creation_time")


def test_mp4_keeps_pure_colours(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 90), (255,) * 3, (0,) * 3]
    for colour in colours:
        media.write_video(tmp_path / "c.mp4", np.full((2, 16, 16, 3), colour, np.uint8), 8)
        back, _ = media.read_video(tmp_path / "c.mp4")
        # A wrong matrix or range is off by 10 or more; 8 bits of YUV cost 2.
        assert np.abs(back.astype(int) - colour).max() <= 2, colour


@pytest.mark.parametrize("size", [(23, 39), (1, 1)])
def test_odd_sizes_are_padded_in_mp4_with_a_warning(tmp_path, size):
    video = smooth(3, *size)
    with pytest.warns(UserWarning, match="H.264 needs even sizes"):
        media.write_video(tmp_path / "a.mp4", video, 8)
    back, _ = media.read_video(tmp_path / "a.mp4")
    even = tuple(n + n % 2 for n in size)
    assert back.shape[1:3] == even
    grow = [(0, 0), (0, even[0] - size[0]), (0, even[1] - size[1]), (0, 0)]
    assert psnr(back, np.pad(video, grow, mode="edge")) > 35
    media.write_video(tmp_path / "a.gif", video, 8)
    assert media.read_video(tmp_path / "a.gif")[0].shape == video.shape


def test_a_file_of_parts_is_the_file_of_the_whole_without_a_warning(tmp_path):
    clip = flags()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for extension in media.EXTENSIONS:
            whole = media.write_video(tmp_path / f"a{extension}", clip, 8)
            parts = media.write_video(tmp_path / f"b{extension}", iter((clip[:3], clip[3:])), 8)
            assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("fps", [8, 24])
def test_gif_plays_as_long_as_the_clip_and_loops(tmp_path, fps):
    video = flags(6)
    path = media.write_video(tmp_path / "a.gif", video, fps)
    back, rate = media.read_video(path)
    # Six colours fit the palette: only rounding inside it is allowed.
    assert back.shape == video.shape and np.abs(back.astype(int) - video).max() <= 2
    assert rate == pytest.approx(fps, rel=0.01)  # times are whole hundredths of a second
    with av.open(str(path)) as container:
        assert container.duration / 1e6 == pytest.approx(6 / fps, abs=0.0051)
    assert b"NETSCAPE2.0\x03\x01\x00\x00\x00" in path.read_bytes()  # repeat for ever


def test_gif_of_many_colours_of_one_frame_and_too_fast_for_players(tmp_path):
    media.write_video(tmp_path / "a.gif", smooth(), 8)
    assert psnr(media.read_video(tmp_path / "a.gif")[0], smooth()) > 28  # 256 of 7,000 colours
    media.write_video(tmp_path / "b.gif", smooth(1), 8)
    assert media.read_video(tmp_path / "b.gif")[0].shape == (1, 24, 40, 3)
    with pytest.warns(UserWarning, match="stop at 50"):
        media.write_video(tmp_path / "a.gif", flags(), 120)
    assert media.read_video(tmp_path / "a.gif")[1] == pytest.approx(50)


def test_png_is_exact(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    media.write_png(tmp_path / "a.PNG", noise[0])
    assert np.array_equal(media.read_video(tmp_path / "a.PNG")[0][0], noise[0])
    media.write_video(tmp_path / "b.png", noise[:1], 8)
    assert np.array_equal(media.read_video(tmp_path / "b.png")[0], noise[:1])
    media.write_video(tmp_path / "100%d.png", noise, 8)  # no number is put in for %d
    strip = media.read_video(tmp_path / "100%d.png")[0][0]
    assert np.array_equal(strip, np.hstack(noise)) and strip.shape == (5, 28, 3)


@pytest.mark.parametrize("extension", media.EXTENSIONS)
def test_the_same_clip_gives_the_same_bytes(tmp_path, extension):
    rng = np.random.default_rng(0)
    odd = smooth()[:, :23, :39]
    edges = np.pad(odd, [(0, 0), (0, 1), (0, 1), (0, 0)], mode="edge")
    for clip in (np.asfortranarray(edges), smooth(8, 40, 24)[:, :, ::-1]):
        seen = set()
        # With its defaults, x264 differs in up to one run of eight.
        for i in range(16 if extension == ".mp4" else 2):
            dirty = [rng.integers(0, 256, rng.integers(1000, 60000), np.uint8) for _ in range(4)]
            del dirty
            path = media.write_video(tmp_path / f"{i}{extension}", clip, 0.5)
            seen.add(path.read_bytes())
        assert len(seen) == 1


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    media.write_video(path, flags(), 8)
    assert len(media.read_video(path)[0]) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ValueError, match="size must be one that the format allows"):
        media.write_video(path, np.zeros((1, 2, 70_000, 3), np.uint8), 8)
    assert len(media.read_video(path)[0]) == 4


def test_reading_stops_at_max_frames_and_names_what_it_cannot_read(tmp_path):
    path = media.write_video(tmp_path / "a.mp4", smooth(), 8)
    back, rate = media.read_video(path, max_frames=3)
    assert back.shape == (3, 24, 40, 3) and rate == 8
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "half.mp4").write_bytes(path.read_bytes()[:500])
    for name in ("none.mp4", "text.mp4", "half.mp4", "."):
        with pytest.raises(ValueError, match=re.escape(name)):
            media.read_video(tmp_path / name)


# --- the output path ---


def test_check_output_makes_directories_and_leaves_no_file(tmp_path):
    path = tmp_path / "new" / "deep" / "a.MP4"
    assert media.check_output(path) == path and media.check_output(str(path)) == path
    assert list(path.parent.iterdir()) == []
    path.write_text("kept")
    media.check_output(path)
    assert path.read_text() == "kept"


def test_check_output_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "clips.mp4").mkdir()
    with pytest.raises(ValueError, match="'.avi'"):
        media.check_output(tmp_path / "new" / "a.avi")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="extension ''"):
        media.check_output(tmp_path / "clip")
    with pytest.raises(ValueError, match="'' is empty"):
        media.check_output("")
    with pytest.raises(ValueError, match="is a directory"):
        media.check_output(tmp_path / "clips.mp4")
    # /proc refuses files from root as well.
    for name in ("file/a.mp4", "file/deep/a.mp4", "n" * 300 + ".mp4", "/proc/self/a.mp4"):
        with pytest.raises(ValueError, match="cannot be"):
            media.check_output(tmp_path / name)


@pytest.mark.parametrize("extension", ["mp4", "gif", "png"])
def test_storage_that_fails_is_an_error_of_its_own(tmp_path, extension):
    """A full disk is not an error of the user's, who may try again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / f"a.{extension}"
    clip = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))) as error:
            media.write_video(path, clip, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extension", ["mp4", "png"])
def test_names_that_are_not_utf_8_are_written_and_read(tmp_path, extension):
    path = tmp_path / os.fsdecode(b"caf\xe9 100%d." + extension.encode())
    assert media.check_output(path) == path
    media.write_video(path, smooth()[:1], 8)
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(path.name)]
    assert len(media.read_video(path)[0]) == 1


# --- pictures of many clips ---


def test_upscale_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(media.upscale(image, 3), np.kron(image, np.ones((3, 3, 1), np.uint8)))
    assert media.upscale(smooth(), 2).shape == (9, 48, 80, 3)


def test_grid_places_every_clip():
    tiled = media.grid(mosaic_of(10, 20, 30), columns=2, pad=1)
    expected = np.full((7, 9), media.GREY)
    expected[1:3, 1:4], expected[1:3, 5:8], expected[4:6, 1:4] = 10, 20, 30
    assert np.array_equal(tiled[0], expected[..., None].repeat(3, -1))


def test_grid_centres_small_clips_and_holds_short_ones():
    small, large = np.full((1, 2, 2, 3), 7, np.uint8), smooth(3, 6, 4)
    tiled = media.grid([small, large], columns=2, pad=0)
    assert tiled.shape == (3, 6, 8, 3) and (tiled[:, 2:4, 1:3] == 7).all()
    assert np.array_equal(tiled[:, :, 4:], large)


@pytest.mark.parametrize("n, size, columns", [(4, (8, 8), 2), (2, (9, 16), 1), (5, (8, 8), 3)])
def test_grid_is_near_square(n, size, columns):
    tiled = media.grid(mosaic_of(*range(n), h=size[0], w=size[1]), pad=0)
    assert tiled.shape[1:3] == (-(-n // columns) * size[0], columns * size[1])


def test_contact_sheet_shows_first_and_last_frame():
    ramp = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    sheet = media.contact_sheet([ramp, ramp[:2]], frames_per_video=3, scale=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert sheet[2, 2::6, 0].tolist() == [0, 4, 8]
    assert sheet[8, 2::6, 0].tolist() == [0, 1, media.GREY]
