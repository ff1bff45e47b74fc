"""Reading picture files: RGB out, and one clear error that names the file when it cannot be read."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["ImageFileError", "image_tensor", "load_cutout", "load_rgb", "square_tensor"]


class ImageFileError(ValueError):
    """A picture file, or a file that lists pictures, is missing, truncated, or not what it should be.

    The message starts with its path.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        if reason is None:  # a DataLoader raises a worker's error anew, with the worker's traceback as the argument
            path, _, reason = str(path).rstrip().splitlines()[-1].partition("ImageFileError: ")[2].rpartition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)


def _open(path: str | os.PathLike[str], at_least: int | None = None) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        raise ImageFileError(path, "no such picture file")
    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # a JPEG at 1/2, 1/4 or 1/8; nothing for other formats
            image.load()  # decoding happens here, so this is where a truncated file shows
            return image
    except UnidentifiedImageError:
        raise ImageFileError(path, "not a picture in a known format") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders fail in every way (struct.error, KeyError, ...)
        raise ImageFileError(path, f"cannot be decoded ({error})") from error


def load_rgb(path: str | os.PathLike[str], at_least: int | None = None) -> Image:
    """Decode a picture to RGB, upright (the EXIF orientation is applied) and on white where it is
    transparent.

    Args:
        path: a file in any format Pillow reads (grayscale, palette and CMYK included).
        at_least: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size while both sides stay at least so long
            (a photo of 12 megapixels takes a quarter of the time); default: its own size.

    Returns:
        A ``PIL.Image`` in mode RGB.

    Raises:
        ImageFileError: the file is missing, truncated, or no picture.
    """
    from PIL import Image, ImageOps

    image = _open(path, at_least)
    with suppress(SyntaxError, ValueError, struct.error):  # damaged EXIF data: the picture itself was decoded
        image = ImageOps.exif_transpose(image)
    image = _eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """16-bit grayscale scaled to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def square_tensor(image: Image, image_size: int) -> Tensor:
    """A picture resized to a square (antialiased, bilinear): RGB uint8 [3, image_size, image_size]."""
    import numpy as np
    import torch

    resized = image.resize((image_size, image_size), 2)  # 2 = bilinear
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def image_tensor(path: str | os.PathLike[str], image_size: int) -> Tensor:
    """Decode a picture and resize it to a square: RGB uint8 [3, image_size, image_size].

    Raises:
        ImageFileError: the file is missing, truncated, or no picture.
    """
    return square_tensor(load_rgb(path, 2 * image_size), image_size)


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
