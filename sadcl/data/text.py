"""Text as files give it: encodings, lines, JSON, identifiers; names in one Unicode form, and names that look alike."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sadcl.data.images import ImageFileError

__all__ = ["alike", "identifier", "normal", "number", "read_json", "read_lines"]

# UTF-32's mark begins with UTF-16's, so it is asked for first.
MARKS = (
    (codecs.BOM_UTF8, "UTF-8-sig"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Letters of other alphabets that print as these do.
LOOKALIKE = str.maketrans("аеорсухіјѕвкмнтοανικρτυ", "aeopcyxijsbkmhtoavikptu")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def normal(name: str) -> str:
    """A name without blanks around it, in NFC: accents typed on one system equal those typed on another."""
    return unicodedata.normalize("NFC", name.strip())


def alike(name: str) -> str:
    """What two names share that print alike, are one number or differ in case: "Hot dog" and "h\\u043et\\u00a0dog"."""
    plain = unicodedata.normalize("NFKC", name).casefold().translate(LOOKALIKE)
    plain = " ".join("".join(letter for letter in plain if unicodedata.category(letter) != "Cf").split())
    value = number(plain)
    return plain if value is None else repr(value)


def number(name: str) -> float | None:
    """The number that a name is, if it is one."""
    return float(name) if NUMBER.fullmatch(name) else None


def identifier(value: Any) -> int | str | None:
    """An identifier as every program means it: 7, 7.0 and "7" are one; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        text = normal(value).removesuffix(".0")
        return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else normal(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read(path: str | os.PathLike[str], what: str) -> str:
    """A text file in UTF-8, or in what its byte order mark says."""
    if not os.path.isfile(path):
        raise ImageFileError(path, f"no such {what}")
    raw = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "UTF-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        kind = encoding.removesuffix("-sig")
        raise ImageFileError(
            path, f"line {line}: not {kind} ({error.reason}, byte {error.start}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise ImageFileError(path, "holds zero bytes: UTF-16 without a byte order mark? Save the file as UTF-8")
    return text


def read_lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """The lines of a text file, stripped (they may end in LF, CRLF or CR); empty ones at its end are cut off.

    Args:
        path: the file, in UTF-8 or with a byte order mark.
        what: what it is, in words, for the message if it is missing.

    Raises:
        ImageFileError: the file is missing, or a line of it is not UTF-8.
    """
    lines = [line.strip() for line in io.StringIO(_read(path, what), newline=None)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_json(
    path: str | os.PathLike[str], what: str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The content of a JSON file.

    Args:
        path: the file, in UTF-8 or with a byte order mark.
        what: what it is, in words, for the message if it is missing.
        object_hook: see :func:`json.load`.

    Raises:
        ImageFileError: the file is missing or no JSON; the message says where it ends to be.
    """
    try:
        return json.loads(_read(path, what), object_hook=object_hook)
    except json.JSONDecodeError as error:
        raise ImageFileError(path, f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
