"""Pixels of more than 8 bits to 8: which range of values a file means, and what Pillow would do without a word."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.TiffImagePlugin import TiffImageFile

__all__ = ["Stored", "eight_bits", "select_page", "stored", "tiff_layout"]

SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 254, 258, 259, 262, 277, 339  # tags of TIFF
NO_PAGE = 1 | 4  # of SUBFILE: a smaller copy, a mask
UNUSED = 16  # a picture that uses less than this part of its format's range is of fewer bits, or very dark
SLACK = 0.01  # of a range of floating-point values
SETTING = "pixel_range (--data.pixel_range)"


class Stored(NamedTuple):
    """How a file stores its pixels, where Pillow's mode does not tell.

    Attributes:
        signed: integers of 16 bits with a sign.
        white_is_zero: the lowest value is white.
        wide_colour: 16 bits a band, of which Pillow keeps the upper 8.
    """

    signed: bool = False
    white_is_zero: bool = False
    wide_colour: bool = False


def select_page(image: TiffImageFile) -> None:
    """Turn to the page of a TIFF that is the picture: the only one that is no smaller copy (pyramids) and no mask.

    Raises:
        ValueError: there are several.
    """
    if (count := image.n_frames) < 2:
        return
    full = []
    for page in range(count):
        image.seek(page)
        if not image.tag_v2.get(SUBFILE, 0) & NO_PAGE:
            full.append(page)
    if len(full) > 1:
        raise ValueError(f"a TIFF of {len(full)} pages; save the one that is the picture by itself")
    image.seek(full[0] if full else 0)


def stored(image: Image) -> Stored:
    """How an opened file, not decoded yet, stores its pixels; says once that bands are left out."""
    wide = len(image.getbands()) > 1 and any(";16" in str(tile) for tile in image.tile)  # type: ignore[attr-defined]
    if image.format != "TIFF":
        return Stored(wide_colour=wide)
    tags = image.tag_v2  # type: ignore[attr-defined]
    if (bands := tags.get(SAMPLES, 1)) > len(image.getbands()):
        warnings.warn(f"TIFF with {bands} bands: only {'+'.join(image.getbands())} are read", stacklevel=2)
    signed = image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2 and tags.get(BITS, (1,))[0] == 16
    return Stored(signed, tags.get(PHOTOMETRIC) == 0, wide)


def tiff_layout(path: str) -> str:
    """The layout of a TIFF that Pillow does not know, in words; empty if it is none."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        bands, bits, packed = tags.get(SAMPLES, 1), tags[BITS], tags.get(COMPRESSION, 1)
    except Exception:  # not a TIFF, or a damaged one
        return ""
    layout = f"a TIFF of {bands} bands of {bits[0]} bits, compression {packed}"
    return f"{layout}, which Pillow does not read; save it in one band or three"


def eight_bits(image: Image, how: Stored, value_range: Sequence[float] | None) -> Image:
    """A picture of one wide band (16 or 32 bits, whole numbers or floating point) scaled to 8 bits; others as they are.

    Whole numbers are scaled by their format's range (the upper 8 of 16 bits), floating point from 0..1 or 0..255.

    Args:
        image: decoded.
        how: of :func:`stored`.
        value_range: (low, high), the values that become black and white, instead.

    Raises:
        ValueError: values that do not tell their range, or use so little of it that 16 grey levels or fewer are left.
    """
    if how.wide_colour:
        _check_colour(image, value_range)
        return image
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    import numpy as np
    from PIL import Image as images

    values = np.asarray(image)
    if image.mode == "F":
        low, high = value_range or _float_range(values)
        scaled = np.rint((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low)))
    else:
        low, high = value_range or _whole_range(values, image.mode, how.signed)
        scaled = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
    scaled = scaled.clip(0, 255).astype(np.uint8)
    return images.fromarray(255 - scaled if how.white_is_zero else scaled)


def _float_range(values: np.ndarray) -> tuple[float, float]:
    import numpy as np

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low == high == 0:
        return 0.0, 1.0
    for top in (1.0, 255.0):  # a little more is what filters and resizing make of it
        if -SLACK * top <= low and high <= (1 + SLACK) * top and high * UNUSED >= top:
            return 0.0, top
    raise ValueError(
        f"floating-point values from {low:g} to {high:g}, which tell neither 0..1 nor 0..255; set {SETTING} to the "
        f"values that are black and white, such as [{math.floor(low)}, {math.ceil(high)}]"
    )


def _whole_range(values: np.ndarray, mode: str, signed: bool) -> tuple[int, int]:
    lowest, highest = (int(values.min()), int(values.max())) if values.size else (0, 0)
    low, high = (-32768, 32767) if signed else (0, 65535)
    if mode == "I" and not signed and lowest >= 0 and highest <= 255:
        return 0, 255
    extent = max(highest, 0) - min(lowest, 0)
    if low <= lowest and highest <= high and (extent == 0 or extent * UNUSED >= high - low):
        return low, high
    top = (1 << max(highest, 1).bit_length()) - 1
    likely = [min(low, lowest) if lowest < 0 else 0, top]
    raise ValueError(
        f"values from {lowest} to {highest} do not tell their range (12 bits in 16?); set {SETTING} to the values that "
        f"are black and white, such as {likely}, or [{low}, {high}] if it is that dark"
    )


def _check_colour(image: Image, value_range: Sequence[float] | None) -> None:
    highest = max(high for _, high in image.getextrema()[:3])  # type: ignore[misc,index]
    if highest < UNUSED and tuple(value_range or ()) != (0, 65535):
        raise ValueError(
            "16 bits a band, of which Pillow keeps the upper 8, and those are almost empty (12 bits in 16?); save it "
            f"with 8 bits a band, or set {SETTING} to [0, 65535] if it is that dark"
        )
