"""One's own pictures from a list: each line is ``path,label;label;...`` (no label at all is allowed)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from sadcl.data.images import ImageFileError
from sadcl.data.listing import NamedListing, read_lines

__all__ = ["CsvDataset"]


class CsvDataset(NamedListing):
    """Pictures listed in a UTF-8 CSV file, ``path,label;label`` a line; a first line ``path,labels`` is a header."""

    @staticmethod
    def rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
        reader = csv.reader(read_lines(path, "list of pictures"), strict=True)
        try:
            for row in reader:
                number = reader.line_num
                if not row or (number == 1 and row[0].strip().lower() == "path"):
                    continue
                if len(row) > 2:
                    raise ImageFileError(path, f"line {number}: expected `path,label;label`, got {len(row)} columns")
                if not row[0].strip():
                    raise ImageFileError(path, f"line {number}: no path of a picture")
                names = row[1].split(";") if len(row) == 2 else ()
                yield number, row[0].strip(), tuple(name.strip() for name in names if name.strip())
        except csv.Error as error:
            raise ImageFileError(path, f"line {reader.line_num}: {error}") from None
