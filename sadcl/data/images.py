"""Reading picture files: RGB out, and one clear error that names the file when it cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFileError", "load_cutout", "load_rgb"]


class ImageFileError(ValueError):
    """A picture file is missing, truncated, or no picture. The message starts with its path."""

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        if reason is None:  # a DataLoader raises a worker's error anew, with the worker's traceback as the argument
            path, _, reason = str(path).rstrip().splitlines()[-1].partition("ImageFileError: ")[2].rpartition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)


def _open(path: str | os.PathLike[str]) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        raise ImageFileError(path, "no such picture file")
    try:
        with Image.open(path) as image:
            image.load()  # decoding happens here, so this is where a truncated file shows
            return image
    except UnidentifiedImageError:
        raise ImageFileError(path, "not a picture in a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageFileError(path, f"cannot be decoded ({error})") from error


def load_rgb(path: str | os.PathLike[str]) -> Image:
    """Decode a picture to RGB, upright (the EXIF orientation is applied) and on white where it is
    transparent.

    Args:
        path: a file in any format Pillow reads (grayscale, palette and CMYK included).

    Returns:
        A ``PIL.Image`` in mode RGB.

    Raises:
        ImageFileError: the file is missing, truncated, or no picture.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(_open(path))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def load_cutout(path: str | os.PathLike[str], max_side: int) -> Image:
    """Decode a cut-out to RGBA, cropped to its visible part and at most ``max_side`` pixels long.

    Raises:
        ImageFileError: the file cannot be decoded, or every pixel of it is transparent.
    """
    from PIL import Image

    image = _open(path).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 32 else 0).getbbox()
    if box is None:
        raise ImageFileError(path, "every pixel is transparent")
    image = image.crop(box)
    shrink = max_side / max(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    return image
