"""Still and animated images by Pillow: opaque, 8 bits, in sRGB.

Transparency stands before a background colour; CMYK, palettes, greys and 16 bits become 8-bit RGB; an
embedded colour profile is converted to sRGB. GIF, WebP, APNG and AVIF animations give their frames
with their own times (delays under 20 ms count as 100 ms, as in browsers); of other files with several
pictures (MPO, TIFF) the first is taken.
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
from PIL import Image, ImageCms, UnidentifiedImageError

from dit_jax.prepare.pixels import LARGEST
from dit_jax.prepare.refusals import Refused

with contextlib.suppress(ImportError):  # Pillow reads HEIC where it is installed.
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # Larger ones are refused by name.
ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}
SHORTEST, DEFAULT = 0.02, 0.1  # Seconds.
TURNS = {2: (True, 0), 3: (False, 180), 4: (True, 180), 5: (True, 270)}
TURNS |= {6: (False, 90), 7: (True, 90), 8: (False, 270)}
"""(mirrored left to right, then degrees turned clockwise) by EXIF's numbers of the orientation."""
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError, TypeError)
DAMAGE += (ArithmeticError, struct.error)
"""What Pillow raises for damaged files."""


@contextlib.contextmanager
def opened_image(path: str | os.PathLike) -> Iterator[Any]:
    """Pillow's image. Refused: no image, an unsupported format, too many pixels, and whatever Pillow
    raises within."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                if image.width * image.height > LARGEST:
                    size = f"{image.width} x {image.height} pixels, at most {LARGEST}"
                    raise Refused("too large", size)
                yield image
        except DAMAGE as error:
            reason, words = "cannot be decoded", str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                with open(path, "rb") as file:
                    head = file.read(32)
                if head[4:8] == b"ftyp":
                    reason, words = "unsupported", "HEIF: pip install pillow-heif decodes it"
                elif len(head) < 32:
                    reason, words = "truncated", f"an image of {len(head)} bytes"
            elif (
                isinstance(error, OSError) and error.errno
            ):  # Of the disk; Pillow's have no number.
                reason, words = "cannot be read", error.strerror or words
            elif "truncated" in words or isinstance(error, EOFError):
                reason = "truncated"
            raise Refused(reason, words) from error


def schedule(image: Any) -> tuple[int, list[float], float]:
    """(number of the first picture, when each is shown, when the last one ends), in seconds from 0."""
    # APNG may have another picture before the animation, for who cannot animate.
    first = int(bool(getattr(image, "default_image", False)))
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    times = [0.0]
    for i in range(first, count if count - first > 1 else 0):
        try:
            image.seek(i)
            if image.format != "GIF":  # The others tell a picture's time once it is decoded.
                image.load()
        except DAMAGE:
            break
        delay = float(image.info.get("duration") or 0) / 1000
        times.append(times[-1] + (delay if delay >= SHORTEST else DEFAULT))
    image.seek(0)
    return (first, times[:-1], times[-1]) if len(times) > 2 else (first, [0.0], 0.0)


def to_rgb(image: Any, background: tuple[int, int, int]) -> np.ndarray:
    """A Pillow image as uint8 [h, w, 3], before the background, in sRGB; not turned."""
    if image.mode.startswith("I") or image.mode == "F":  # Of 16 bits (or 32): 65535 is white.
        grey = np.asarray(image).astype(np.float64)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise Refused("unsupported", f"grey levels from {grey.min():g} to {grey.max():g}")
        return np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=2)
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "L", "CMYK"):
        # A damaged profile counts as none.
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            mode = "RGBA" if image.mode == "RGBA" else "RGB"
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, target, outputMode=mode) or image
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))
