"""Pixels of more than 8 bits, pages, bands, alpha, and limits: a picture that shows its content, or a named refusal."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

PIL = pytest.importorskip("PIL.Image")

from PIL import PngImagePlugin  # noqa: E402

from sadcl.data.images import ImageFileError, image_tensor, load_rgb, picture_suffixes  # noqa: E402

RAMP = np.linspace(0, 1, 48 * 40).reshape(40, 48)


def gray(path: Path, **options: object) -> np.ndarray:
    """The picture's single grey value a pixel."""
    pixels = np.asarray(load_rgb(path, **options)).astype(int)  # type: ignore[arg-type]
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def tiff(path: Path, values: np.ndarray, photometric: int = 1, extra: int | None = None, pages: tuple = ()) -> Path:
    """An uncompressed TIFF of any dtype and byte order, values [H, W] or [H, W, bands], written by hand.

    Args:
        extra: kind of the bands above three (0: unspecified, 2: alpha).
        pages: for each page its kind (0: picture, 1: smaller copy, 4: mask); default: one page without.
    """
    order = "<" if values.dtype.byteorder in "=|<" else ">"
    bands = values.shape[2] if values.ndim == 3 else 1
    data, kind = values.tobytes(), {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    content = (b"II*\0" if order == "<" else b"MM\0*") + b"\0\0\0\0" + data
    link = 4  # where the place of the next page is written
    for page in pages or (None,):
        bits_at = len(content)
        content += struct.pack(f"{order}{bands}H", *[values.dtype.itemsize * 8] * bands)
        tags = [(256, values.shape[1]), (257, values.shape[0]), (259, 1), (262, photometric), (273, 8), (277, bands)]
        tags += [(278, values.shape[0]), (279, len(data)), (339, kind)]
        tags += [(254, page)] if page is not None else []
        tags += [(338, extra)] if extra is not None else []
        entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags if tag not in (338, 339)]
        entries += [struct.pack(f"{order}HHIHH", t, 3, 1, v, 0) for t, v in tags if t in (338, 339)]
        bits = (258, 3, bands, bits_at) if bands > 2 else (258, 3, 1, values.dtype.itemsize * 8)
        entries.append(
            struct.pack(f"{order}HHII" if bands > 2 else f"{order}HHIHH", *bits, *([] if bands > 2 else [0]))
        )
        entries.sort(key=lambda entry: struct.unpack(f"{order}H", entry[:2]))
        content = content[:link] + struct.pack(f"{order}I", len(content)) + content[link + 4 :]
        content += struct.pack(f"{order}H", len(entries)) + b"".join(entries)
        link = len(content)
        content += b"\0\0\0\0"
    path.write_bytes(content)
    return path


def png16(path: Path, values: np.ndarray, colour: int) -> Path:
    """A 16-bit PNG of several bands, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


FORMATS = {
    "float 0..1": ("<f4", RAMP),
    "float 0..255": ("<f4", RAMP * 255),
    "float 0..1 and a little": ("<f4", RAMP * 1.002 - 1e-3),
    "float 0..255 and a little": ("<f4", RAMP * 256 - 0.5),
    "float with infinity": ("<f4", np.where(RAMP == 1, np.inf, RAMP)),
    "float without data": ("<f4", np.where(RAMP < 0.1, np.nan, RAMP)),
    "float, big end first": (">f4", RAMP),
    "unsigned 16": ("<u2", RAMP * 65535),
    "unsigned 16, big end first": (">u2", RAMP * 65535),
    "signed 16": ("<i2", RAMP * 65535 - 32768),
    "signed 16, big end first": (">i2", RAMP * 65535 - 32768),
    "int32 of 16 bits": ("<i4", RAMP * 65535),
    "int32 of 8 bits": ("<i4", RAMP * 255),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_wide_pixels_are_scaled_by_their_formats_range(tmp_path: Path, kind: str) -> None:
    dtype, values = FORMATS[kind]
    seen = gray(tiff(tmp_path / "x.tif", values.astype(dtype)))
    wanted = np.where(RAMP < 0.1, 0, RAMP) if kind == "float without data" else RAMP
    assert np.abs(seen - wanted * 255).max() <= 1
    assert image_tensor(tmp_path / "x.tif", 16).float().mean() == pytest.approx(wanted.mean() * 255, abs=1.5)


@pytest.mark.parametrize("dtype", ["<u2", "<u1", "<f4"])
def test_white_is_zero(tmp_path: Path, dtype: str) -> None:
    top = {"<u2": 65535, "<u1": 255, "<f4": 1}[dtype]
    seen = gray(tiff(tmp_path / "x.tif", (RAMP * top).astype(dtype), photometric=0))
    assert np.abs(seen - (1 - RAMP) * 255).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "low", "high", "setting"),
    [
        ("<u2", 0, 4095, [0, 4095]),
        ("<u2", 0, 255, [0, 255]),
        ("<u2", 100, 900, [0, 1023]),
        ("<i2", -1000, 3000, [-1000, 3000]),
        ("<i4", 0, 4095, [0, 4095]),
        ("<i4", -5, 90000, [-5, 90000]),
        ("<f4", -500, 1500, [-500, 1500]),
        ("<f4", 0, 4095, [0, 4095]),
        ("<f4", 0, 8, [0, 8]),
        ("<f4", 0, 0.03125, [0, 1]),
    ],
)
def test_values_that_do_not_tell_their_range_are_refused_until_it_is_set(
    tmp_path: Path, dtype: str, low: int, high: float, setting: list[int]
) -> None:
    path = tiff(tmp_path / "x.tif", (low + RAMP * (high - low)).astype(dtype))
    with pytest.raises(
        ImageFileError, match=r"x.tif: .*values from .*set pixel_range \(--data.pixel_range\) to"
    ) as caught:
        load_rgb(path)
    assert f"from {low} to {high}" in str(caught.value)
    seen = gray(path, pixel_range=setting)
    span = setting[1] - setting[0]
    assert np.abs(seen - ((low - setting[0]) + RAMP * (high - low)) / span * 255).max() <= 1
    assert load_rgb(path, pixel_range=(0, 65535)).size == (48, 40), "it may be as dark as that"


def test_a_black_picture_is_black(tmp_path: Path) -> None:
    for dtype in ("<u2", "<i2", "<i4", "<f4"):
        seen = gray(tiff(tmp_path / "x.tif", np.zeros((4, 4), dtype)))
        assert (seen == (128 if dtype == "<i2" else 0)).all(), "the middle of a range with a sign is grey"


def test_wide_colour_is_read_by_its_upper_bits_or_refused(tmp_path: Path) -> None:
    for bands, colour in ((3, 2), (4, 6), (2, 4)):
        full = np.stack([RAMP * 65535] * bands, -1)
        full[..., 3 if bands == 4 else 2 if bands == 3 else 1] = 65535 if bands != 3 else RAMP * 65535
        assert np.abs(gray(png16(tmp_path / "x.png", full, colour)) - RAMP * 255).max() <= 1
    dark = np.stack([RAMP * 2400] * 3, -1)
    for path in (png16(tmp_path / "x.png", dark, 2), tiff(tmp_path / "x.tif", dark.astype("<u2"), photometric=2)):
        with pytest.raises(ImageFileError, match="16 bits a band, of which Pillow keeps the upper 8, and those are"):
            load_rgb(path)
        assert np.asarray(load_rgb(path, pixel_range=(0, 65535))).max() == 9


# -- pages, bands, alpha --


@pytest.mark.parametrize("pages", [(0, 0), (0, 0, 1), (0,) * 13])
def test_tiffs_of_several_pages_are_refused(tmp_path: Path, pages: tuple[int, ...]) -> None:
    path = tiff(tmp_path / "x.tif", (RAMP * 255).astype("<u1"), pages=pages)
    with pytest.raises(ImageFileError, match=f"a TIFF of {pages.count(0)} pages; save the one"):
        load_rgb(path)


@pytest.mark.parametrize("pages", [(0,), (0, 1, 1), (1, 0), (0, 4)])
def test_smaller_copies_and_masks_are_no_pages(tmp_path: Path, pages: tuple[int, ...]) -> None:
    assert np.abs(gray(tiff(tmp_path / "x.tif", (RAMP * 255).astype("<u1"), pages=pages)) - RAMP * 255).max() <= 1


def test_the_page_that_is_the_picture_is_taken(tmp_path: Path) -> None:
    """As cameras' raw files have it: a smaller copy comes first."""
    first = tiff(tmp_path / "x.tif", np.full((5, 5), 9, "<u1"), pages=(1, 0))
    content = bytearray(first.read_bytes())
    second = content.rindex(struct.pack("<HHII", 256, 4, 1, 5))
    content[second : second + 12] = struct.pack("<HHII", 256, 4, 1, 3)  # the second page is 3 wide
    first.write_bytes(content)
    assert load_rgb(first).size == (3, 5)


def test_animations_give_their_first_picture(tmp_path: Path) -> None:
    red, blue = PIL.new("RGB", (8, 8), "red"), PIL.new("RGB", (8, 8), "blue")
    for suffix in ("gif", "png", "webp"):
        red.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[blue])
        assert np.abs(np.asarray(load_rgb(tmp_path / f"x.{suffix}"))[0, 0].astype(int) - [255, 0, 0]).max() < 8


def test_bands_that_are_left_out_are_said(tmp_path: Path) -> None:
    rgb = np.stack([RAMP * 255, RAMP[::-1] * 255, RAMP * 99, RAMP * 0], -1).astype("<u1")
    with pytest.warns(UserWarning, match=r"TIFF with 4 bands: only R\+G\+B are read"):
        seen = load_rgb(tiff(tmp_path / "x.tif", rgb, photometric=2, extra=0))
    assert (np.asarray(seen) == rgb[..., :3]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rgb(tiff(tmp_path / "x.tif", rgb[..., :3].copy(), photometric=2))
        load_rgb(tiff(tmp_path / "x.tif", rgb[..., 0].copy()))


@pytest.mark.parametrize("bands", [4, 5, 13])
def test_bands_that_pillow_does_not_know_are_named(tmp_path: Path, bands: int) -> None:
    path = tiff(tmp_path / "x.tif", np.stack([RAMP * 9] * bands, -1).astype("<u2"))
    with pytest.raises(
        ImageFileError, match=f"x.tif: a TIFF of {bands} bands of 16 bits, .*which Pillow does not read"
    ):
        load_rgb(path)


def test_alpha_of_zeros_is_no_alpha(tmp_path: Path) -> None:
    """Nor is a mask of 0 and 1."""
    rgba = np.stack([RAMP * 255, RAMP * 200, RAMP * 99, RAMP * 0], -1).astype(np.uint8)
    for alpha in (0, 1, RAMP > 0.5):
        rgba[..., 3] = alpha
        PIL.fromarray(rgba).save(tmp_path / "x.png")
        for path in (tmp_path / "x.png", tiff(tmp_path / "x.tif", rgba, photometric=2, extra=2)):
            assert (np.asarray(load_rgb(path)) == rgba[..., :3]).all()
    rgba[..., 3] = 0
    PIL.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    assert np.asarray(load_rgb(tmp_path / "empty.png")).min() == 255, "nothing is on white"
    rgba[:20, :, 3] = 255
    PIL.fromarray(rgba).save(tmp_path / "x.png")
    seen = np.asarray(load_rgb(tmp_path / "x.png"))
    assert (seen[:20] == rgba[:20, :, :3]).all() and (seen[20:] == 255).all(), "else it is on white"


# -- limits, and what is no picture --


def test_too_many_pixels_name_the_limit_and_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 5_000)  # refused from twice as many on
    PIL.new("L", (200, 100), 120).save(tmp_path / "x.jpg")
    with pytest.raises(
        ImageFileError, match=r"20000 pixels\) exceeds limit of 10000 pixels.* SADCL_MAX_PIXELS in the env"
    ):
        load_rgb(tmp_path / "x.jpg")
    monkeypatch.setenv("SADCL_MAX_PIXELS", "19999")
    with pytest.raises(ImageFileError, match=r"exceeds limit of 20000|SADCL_MAX_PIXELS"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PIL.new("L", (201, 100), 120).save(tmp_path / "y.jpg")
        load_rgb(tmp_path / "y.jpg")
    monkeypatch.setenv("SADCL_MAX_PIXELS", "40000")
    assert load_rgb(tmp_path / "x.jpg").size == (200, 100)
    for wrong in ("many", "0", "-3", ""):
        monkeypatch.setenv("SADCL_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=f"SADCL_MAX_PIXELS: expected a number > 0, got '{wrong}'"):
            load_rgb(tmp_path / "x.jpg")


@pytest.mark.parametrize("zipped", [True, False])
def test_big_texts_in_a_png_name_the_limit_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    for name in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"):
        monkeypatch.setattr(PngImagePlugin, name, 1_000)
    info = PngImagePlugin.PngInfo()
    info.add_text("xmp", "x" * 5_000, zip=zipped)
    PIL.new("RGB", (9, 9)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ImageFileError, match=r"MAX_TEXT_.*; SADCL_MAX_PNG_TEXT in the environment sets another limit"):
        load_rgb(tmp_path / "x.png")
    monkeypatch.setenv("SADCL_MAX_PNG_TEXT", "6000")
    assert load_rgb(tmp_path / "x.png").size == (9, 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n<html>404</html>", "a web page or other XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer"),
        (b"II*\0 and no more", "not a picture in a known format"),
        (b"something", "not a picture in a known format"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageFileError, match=f"x.jpg: {words}"):
        load_rgb(tmp_path / "x.jpg")


def test_suffixes_are_those_that_pillow_can_decode() -> None:
    suffixes = picture_suffixes()
    assert suffixes >= {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".png",
        ".apng",
        ".tif",
        ".webp",
        ".bmp",
        ".tga",
        ".jp2",
        ".ico",
    }
    assert not suffixes & {".pdf", ".txt", ".mpg", ".h5", ".hdf", ".grib", ".wmf", ""}
