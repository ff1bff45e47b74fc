"""One's own pictures from JSON lines: ``{"path": "a.jpg", "labels": ["dog", "cat"]}`` a line."""

from __future__ import annotations

import json
import os
from typing import Any

from sadcl.data.images import ImageFileError
from sadcl.data.labels import class_order
from sadcl.data.listing import NamedListing, Row, Rows
from sadcl.data.text import identifier, normal, read_lines

__all__ = ["JsonLinesDataset"]

EXPECTED = 'expected {"path": "...", "labels": ["...", ...]}'
UNKNOWN = ("unknown", "uncertain", "ignored")
VALUES = {1: 1, 0: 0, -1: -1, None: -1}  # true and false are 1 and 0


class JsonLinesDataset(NamedListing):
    """Pictures listed in a file of JSON lines, ``{"path": ..., "labels": [...]}``; other keys are passed over.

    Labels are names or whole numbers. Those not known to be there or absent stand under ``"unknown"``, or
    ``"labels"`` is an object of ``name: 1``, 0 or -1 (or null).
    """

    @staticmethod
    def read(path: str | os.PathLike[str], separator: str | None) -> Rows:
        rows: list[Row] = []
        mentioned: set[str] = set()
        for number, line in enumerate(read_lines(path, "list of pictures"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ImageFileError(path, f"line {number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
                raise ImageFileError(path, f"line {number}: {EXPECTED}, got {line[:80]}")
            try:
                labels, unknown, absent = _labels(row.get("labels"), separator)
                for key in UNKNOWN:
                    unknown += _names(row.get(key) or [], separator)
            except ValueError as error:
                raise ImageFileError(path, f"line {number}: {EXPECTED}, got {error}") from None
            mentioned.update(absent)
            rows.append(Row(number, row["path"], labels, unknown))
        return Rows(rows, class_order(mentioned.union(*(row.labels for row in rows), *(row.unknown for row in rows))))


def _labels(given: Any, separator: str | None) -> tuple[list[str], list[str], list[str]]:
    """(there, unknown, absent) label names."""
    if not isinstance(given, dict):
        return _names(given, separator), [], []
    kinds: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, value in given.items():
        if isinstance(value, (str, list, dict)) or value not in VALUES or not name.strip():
            raise ValueError(f"label {name!r} with the value {value!r}, not 1, 0 or -1")
        kinds[VALUES[value]].append(normal(name))
    return kinds[1], kinds[-1], kinds[0]


def _names(given: Any, separator: str | None) -> list[str]:
    if isinstance(given, str) and separator is not None:
        given = [name for name in given.split(separator) if name.strip()]
    names = [identifier(name) if isinstance(name, (int, float)) else name for name in given or ()]
    if not isinstance(given, list) or not all(isinstance(n, int) or (isinstance(n, str) and n.strip()) for n in names):
        raise ValueError(f"labels {given!r}")
    if set(names) <= {0, 1} and len(names) > len(set(names)):
        raise ValueError(f"labels {given!r}, which are no names (an object of name and value can say 0 and 1)")
    return [normal(str(name)) for name in names]
