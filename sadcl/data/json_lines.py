"""One's own pictures from JSON lines: ``{"path": "a.jpg", "labels": ["dog", "cat"]}`` a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from sadcl.data.images import ImageFileError
from sadcl.data.listing import NamedListing, read_lines

__all__ = ["JsonLinesDataset"]


class JsonLinesDataset(NamedListing):
    """Pictures listed in a UTF-8 file of JSON lines, ``{"path": ..., "labels": [...]}``; other keys are passed over."""

    @staticmethod
    def rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, list[str]]]:
        expected = 'expected {"path": "...", "labels": ["...", ...]}'
        for number, line in enumerate(read_lines(path, "list of pictures"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ImageFileError(path, f"line {number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
                raise ImageFileError(path, f"line {number}: {expected}, got {line[:80]}")
            names = row.get("labels")
            if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                raise ImageFileError(path, f"line {number}: {expected}, got labels {names!r}")
            yield number, row["path"], [name.strip() for name in names]
