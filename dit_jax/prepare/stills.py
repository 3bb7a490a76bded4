"""Still and animated images through Pillow: upright, opaque, 8 bits, in sRGB.

EXIF orientation is applied; transparency stands before a background colour; CMYK, palettes, greys
and 16 bits become 8-bit RGB; an embedded colour profile is converted to sRGB. GIF, WebP, APNG and
AVIF animations give their frames with their own times (delays under 20 ms count as 100 ms, as in
browsers); of other files with several pictures (MPO, TIFF) the first is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from dit_jax.prepare.media import Probe
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.rendering import LARGEST, over
from dit_jax.prepare.timeline import native_rate

ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}
with contextlib.suppress(ImportError):  # Pillow reads HEIC where it is installed.
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # Larger ones are refused by name.
_SHORTEST, _DEFAULT = 0.02, 0.1  # Seconds.
_MIRRORED, _TURNS = (2, 4, 5, 7), {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}  # EXIF's numbers.


_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError, TypeError)
_DAMAGE += (ArithmeticError, struct.error)


@contextlib.contextmanager
def opened_image(path: str | os.PathLike) -> Iterator[Any]:
    """Pillow's image. Refused: not an image, an unsupported format, too many pixels."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _refusing():
            try:
                image = Image.open(path)
            except UnidentifiedImageError as error:
                raise _unidentified(path) from error
        with image:
            if image.width * image.height > LARGEST:
                size = f"{image.width} x {image.height} pixels, at most {LARGEST}"
                raise Refused("too large", size)
            yield image


def probe_image(path: str | os.PathLike) -> Probe:
    """What is known of an image or animation without decoding its pixels. Refused: see above."""
    with opened_image(path) as image, _refusing():
        times = _times(image)
        number = image.getexif().get(0x0112, 1)
        turn, size = _TURNS.get(number, 0), image.size
        width, height = size[::-1] if turn in (90, 270) else size
        if len(times) == 1:
            fps, constant, duration = 1.0, True, 0.0
        else:
            (fps, constant), duration = native_rate(np.array(times[:-1])), times[-1]
        return Probe(
            kind="image" if len(times) == 1 else "video",
            container=image.format.lower(),
            codec=image.format.lower(),
            width=width,
            height=height,
            fps=fps,
            constant_rate=constant,
            frames=max(len(times) - 1, 1),
            duration=duration,
            pixel_format=image.mode,
            rotation=turn,
            mirrored=number in _MIRRORED,
            full_range=True,
        )


def images(
    path: str | os.PathLike, background: tuple[int, int, int]
) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, uint8 RGB [h, w, 3]) of the pictures of a file in order.

    Refused: see `opened_image`, and `cannot be decoded` or `truncated` where a picture is damaged.
    """
    with opened_image(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _refusing():
            times = _times(image)
            first = _first(image)
        for i, time in enumerate(times[:-1] or times):
            with _refusing():
                if first + i:
                    image.seek(first + i)
                pixels = to_rgb(image, background)
            yield time, pixels


def to_rgb(image: Any, background: tuple[int, int, int]) -> np.ndarray:
    """A Pillow image as displayed: uint8 [h, w, 3], upright, before the background, in sRGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(image)
    image = _in_srgb(image)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return over(rgba[..., :3], rgba[..., 3:], np.array(background))
    return np.array(image.convert("RGB"))


def _deep(image: Any) -> np.ndarray:
    """Greys of 16 bits (or 32, of the same range) in 8 bits: 65535 is white."""
    grey = np.asarray(image).astype(np.float64)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise Refused("unsupported", f"grey levels from {grey.min():g} to {grey.max():g}")
    return np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=2)


def _in_srgb(image: Any) -> Any:
    """The image by its embedded profile in sRGB; as it is if it has none, or a damaged one."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image

    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        source, target = (
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
        )
        return ImageCms.profileToProfile(image, source, target, outputMode=mode) or image
    return image


def _first(image: Any) -> int:
    """The first picture of the animation: APNG may have another before, for who cannot animate."""
    return int(bool(getattr(image, "default_image", False)))


def _times(image: Any) -> list[float]:
    """When each picture is shown, in seconds from 0, and last when the animation ends."""
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    first = _first(image) if count > 1 else 0
    if count - first < 2:
        return [0.0]
    times = [0.0]
    for i in range(first, count):
        try:
            image.seek(i)
            if image.format != "GIF":  # The others tell a picture's time once it is decoded.
                image.load()
        except _DAMAGE:
            break
        delay = float(image.info.get("duration") or 0) / 1000
        times.append(times[-1] + (delay if delay >= _SHORTEST else _DEFAULT))
    image.seek(0)
    return times if len(times) > 2 else [0.0]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever Pillow raises for a damaged file, as a refusal."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # Of the disk; Pillow's own have no number.
            raise Refused("cannot be read", error.strerror or str(error)) from error
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        words = str(error) or type(error).__name__
        raise Refused("truncated" if cut else "cannot be decoded", words) from error


def _unidentified(path: str | os.PathLike) -> Refused:
    with open(path, "rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin-1")
        return Refused("unsupported", f"HEIF ({brand}): pip install pillow-heif decodes it")
    if len(head) < 32:
        return Refused("truncated", f"an image of {os.path.getsize(path)} bytes")
    return Refused("cannot be decoded", "it begins as an image does, and goes on otherwise")
