"""Reading picture files: RGB out, and one clear error that names the file when it cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sadcl.data.pixels import Stored, eight_bits, select_page, stored, tiff_layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["ImageFileError", "image_tensor", "load_cutout", "load_rgb", "picture_suffixes", "square_tensor"]

DECODING = 3  # counts the changes of what load_rgb makes of a file: features that are kept depend on it
MAX_PIXELS, MAX_PNG_TEXT = "SADCL_MAX_PIXELS", "SADCL_MAX_PNG_TEXT"  # environment: limits against decompression bombs


class ImageFileError(ValueError):
    """A picture file, or a file that lists pictures, is missing, truncated, or not what it should be.

    The message starts with its path.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        if reason is None:  # a DataLoader raises a worker's error anew, with the worker's traceback as the argument
            path, _, reason = str(path).rstrip().splitlines()[-1].partition("ImageFileError: ")[2].rpartition(": ")
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, in lower case with their dot, of the formats that Pillow can decode here."""
    from PIL import Image, ImageFile

    known = Image.registered_extensions()
    stubs = {name for name, (kind, _) in Image.OPEN.items() if _is_stub(kind, ImageFile.StubImageFile)}
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN and name not in stubs | {"MPEG"})


def _is_stub(kind: object, stub: type) -> bool:
    """Whether Pillow knows such a file when it sees it and can do no more."""
    return isinstance(kind, type) and issubclass(kind, stub)


def _open(path: str | os.PathLike[str], at_least: int | None = None) -> tuple[Image, Stored]:
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        raise ImageFileError(path, "no such picture file")
    _set_limits()
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                select_page(image)  # type: ignore[arg-type]
            how = stored(image)
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # a JPEG at 1/2, 1/4 or 1/8; nothing for other formats
            image.load()  # decoding happens here, so this is where a truncated file shows
            return image, how
    except UnidentifiedImageError:
        raise ImageFileError(path, _what_it_is(path)) from None
    except Image.DecompressionBombError as error:
        raise ImageFileError(path, f"{error} {MAX_PIXELS} in the environment sets another limit") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders fail in every way (struct.error, KeyError, ...)
        reason = str(error)
        if "MAX_TEXT" in reason:
            reason += f"; {MAX_PNG_TEXT} in the environment sets another limit, in bytes"
        raise ImageFileError(path, f"cannot be decoded ({reason})") from error


def _set_limits() -> None:
    """Give Pillow the limits that the environment asks for."""
    from PIL import Image, PngImagePlugin

    if (pixels := _limit(MAX_PIXELS)) is not None:
        Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2  # it warns from here on and refuses from twice as many on
    if (text := _limit(MAX_PNG_TEXT)) is not None:
        PngImagePlugin.MAX_TEXT_CHUNK = text
        PngImagePlugin.MAX_TEXT_MEMORY = max(text, PngImagePlugin.MAX_TEXT_MEMORY)


def _limit(name: str) -> int | None:
    given = os.environ.get(name)
    if given is None:
        return None
    if not given.strip().isdecimal() or int(given) < 1:
        raise ValueError(f"{name}: expected a number > 0, got {given!r}")
    return int(given)


def _what_it_is(path: str | os.PathLike[str]) -> str:
    """What a file is that no decoder knows."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "an empty file, not a picture"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the picture itself (git lfs pull)"
    if head.startswith(b"<"):
        return "a web page or other XML, not a picture"
    return tiff_layout(os.fspath(path)) or "not a picture in a known format"


def load_rgb(
    path: str | os.PathLike[str], at_least: int | None = None, pixel_range: Sequence[float] | None = None
) -> Image:
    """Decode a picture to RGB, upright (the EXIF orientation is applied) and on white where it is
    transparent (a picture that is transparent everywhere and has content is taken as if it were not).

    Args:
        path: a file in any format Pillow reads (grayscale, palette, CMYK and 16 bits included).
        at_least: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size while both sides stay at least so long
            (a photo of 12 megapixels takes a quarter of the time); default: its own size.
        pixel_range: (low, high), what is black and white in pictures of one band of more than 8 bits; default: the
            range of their format (floating point: 0..1 or 0..255).

    Returns:
        A ``PIL.Image`` in mode RGB.

    Raises:
        ImageFileError: the file is missing, truncated, no picture, of several pages, or its values do not tell
            their range.
    """
    from PIL import Image, ImageOps

    image, how = _open(path, at_least)
    with suppress(Exception):  # damaged EXIF data fail in every way; the picture itself was decoded
        image = ImageOps.exif_transpose(image)
    try:
        image = eight_bits(image, how, pixel_range)
    except ValueError as error:
        raise ImageFileError(path, str(error)) from None
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    shown = rgba.convert("RGB")
    alpha = rgba.getchannel("A")
    if alpha.point(lambda a: a > 1).getbbox() is None and len(shown.getcolors(shown.width * shown.height) or ()) > 1:
        return shown  # a fourth band that only happens to be called alpha, or a mask of 0 and 1
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def square_tensor(image: Image, image_size: int) -> Tensor:
    """A picture resized to a square (antialiased, bilinear): RGB uint8 [3, image_size, image_size]."""
    import numpy as np
    import torch

    resized = image.resize((image_size, image_size), 2)  # 2 = bilinear
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def image_tensor(path: str | os.PathLike[str], image_size: int, pixel_range: Sequence[float] | None = None) -> Tensor:
    """Decode a picture and resize it to a square: RGB uint8 [3, image_size, image_size].

    Args:
        path: of the file.
        image_size: side of the square.
        pixel_range: see :func:`load_rgb`.

    Raises:
        ImageFileError: see :func:`load_rgb`.
    """
    return square_tensor(load_rgb(path, 2 * image_size, pixel_range), image_size)


def load_cutout(path: str | os.PathLike[str], max_side: int) -> Image:
    """Decode a cut-out to RGBA, cropped to its visible part and at most ``max_side`` pixels long.

    Raises:
        ImageFileError: the file cannot be decoded, or every pixel of it is transparent.
    """
    from PIL import Image

    image = _open(path)[0].convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 32 else 0).getbbox()
    if box is None:
        raise ImageFileError(path, "every pixel is transparent")
    image = image.crop(box)
    shrink = max_side / max(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    return image
