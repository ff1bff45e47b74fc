"""One's own pictures from a table: lines of ``path,label;label;...``, or columns with a header."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import suppress

from sadcl.data.images import ImageFileError, picture_suffixes
from sadcl.data.labels import SEPARATOR
from sadcl.data.listing import NamedListing, Row, Rows
from sadcl.data.text import normal, read_lines

__all__ = ["CsvDataset"]

# Names of columns in lower case with _ for blanks; the first that a header has is taken.
PATHS = (
    *("path", "filepath", "file_path", "image_path", "imagepath", "img_path", "filename", "file_name", "file"),
    *("image", "img", "picture", "photo", "image_name", "img_name", "image_file", "image_index"),
    *("image_id", "imageid", "img_id", "name", "id"),
)
LABELS = ("labels", "label", "tags", "tag", "classes", "class", "class_name", "categories", "category", "target")
LABELS_OF = ("_labels", "_label", "_tags")  # ends of other names
UNKNOWN = ("unknown", "uncertain", "ignored")
INDEX = ("", "index", "unnamed:_0")  # what pandas writes unasked
VALUES = {"1": 1, "1.0": 1, "1,0": 1, "true": 1, "0": 0, "0.0": 0, "0,0": 0, "false": 0}
VALUES |= {"-1": -1, "-1.0": -1, "-1,0": -1}
NOTHING = ("nan", "na", "null", "none")  # what programs write for a blank
DELIMITERS = ",;\t| "

Numbered = tuple[int, list[str]]


class CsvDataset(NamedListing):
    """Pictures listed in a CSV file, ``path,label;label`` a line.

    With a header its columns are found by name: the picture (``path``, ``filename``, ``image``, ...), its labels
    (``labels``, ``tags``, ...) and those not known to be there or absent (``unknown``); without a column of labels,
    every column of 0, 1 and -1 (or blank: unknown, or absent in a table that has no 0) is a label. Delimited by comma,
    semicolon, tab, bar or blank.
    """

    @staticmethod
    def read(path: str | os.PathLike[str], separator: str | None) -> Rows:
        lines = read_lines(path, "list of pictures")
        delimiter, start = _delimiter(lines)
        reader = csv.reader(lines[start:], delimiter=delimiter, strict=True)
        try:
            table = [(reader.line_num + start, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise ImageFileError(path, f"line {reader.line_num + start}: {error}") from None
        header = _header(table[0][1]) if table else None
        if header is None:
            _check_first(path, table)
            return Rows([_plain(path, row, delimiter, separator) for row in table])
        return _columns(path, header, table)


def _delimiter(lines: Sequence[str]) -> tuple[str, int]:
    """What separates columns, and the line that the table begins in: of ``sep=``, or such that a path stands first."""
    first = next((number for number, line in enumerate(lines) if line), 0)
    said = lines[first].strip('"') if lines else ""
    if said.lower().startswith("sep=") and len(said) <= len("sep=,"):
        return said[4:] or "\t", first + 1  # lines are stripped
    for delimiter in DELIMITERS:
        if delimiter == " " and lines and any(other in lines[first] for other in DELIMITERS[:-1]):
            continue  # it is in names
        with suppress(csv.Error):
            row = next(csv.reader(lines[first:], delimiter=delimiter), None)
            if row and (_header(row) is not None or _is_picture(row[0])):
                return delimiter, first
    return ",", first


def _is_picture(cell: str) -> bool:
    return os.path.splitext(cell.strip())[1].lower() in picture_suffixes()


def _header(row: Sequence[str]) -> list[str] | None:
    """Names of the columns, if a row is a header: it has one for paths and names no picture."""
    names = [cell.strip().lower().replace(" ", "_") for cell in row]
    return names if not set(names).isdisjoint(PATHS) and not any(map(_is_picture, row)) else None


def _check_first(path: str | os.PathLike[str], table: Sequence[Numbered]) -> None:
    """Refuse a header of other names, which would be a picture."""
    if len(table) > 1 and not any(map(_is_picture, table[0][1])) and any(map(_is_picture, table[1][1])):
        titles = ", ".join(repr(cell.strip()) for cell in table[0][1])
        raise ImageFileError(path, f"line {table[0][0]}: {titles}: no column is called path, filename, image, ...")


def _path(path: str | os.PathLike[str], number: int, cell: str) -> str:
    if not cell.strip():
        raise ImageFileError(path, f"line {number}: no path of a picture")
    return cell.strip()


def _plain(path: str | os.PathLike[str], numbered: Numbered, delimiter: str, separator: str | None) -> Row:
    """A line without a header; where the delimiter cannot be told from what separates labels, it separates labels."""
    number, (picture, *cells) = numbered
    cells = [cell for cell in cells if cell.strip()]
    if len(cells) > 1 and delimiter not in (separator or SEPARATOR, "\t"):
        expected = "`path,label;label`, or a first line that names the columns (path, labels)"
        raise ImageFileError(path, f"line {number}: expected {expected}, got {len(cells) + 1} columns")
    if set(cells) <= {"0", "1"} and len(cells) > len(set(cells)):
        raise ImageFileError(path, f"line {number}: 0 and 1 are no labels; expected a first line that names columns")
    return Row(number, _path(path, number, picture), cells[0] if len(cells) == 1 else [*map(normal, cells)])


def _columns(path: str | os.PathLike[str], header: Sequence[str], table: Sequence[Numbered]) -> Rows:
    (_, titles), *table = table
    width = len(titles)
    for number, row in table:
        if any(cell.strip() for cell in row[width:]):
            raise ImageFileError(path, f"line {number}: expected {width} columns as in the header, got {len(row)}")
        row += [""] * (width - len(row))

    def column(names: Sequence[str]) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    pictures, labels = column(PATHS), column([*LABELS, *(name for name in header if name.endswith(LABELS_OF))])
    unknown = None if labels is None else column(UNKNOWN)
    assert pictures is not None
    others = [i for i in range(width) if i not in (pictures, labels, unknown) and header[i] not in INDEX]
    paths = [(number, _path(path, number, row[pictures])) for number, row in table]
    if labels is not None:
        rows = [
            Row(number, picture, row[labels], "" if unknown is None else row[unknown])
            for (number, picture), (_, row) in zip(paths, table, strict=True)
        ]
        return Rows(rows, (), _passed_over([titles[i] for i in others]))
    return _one_hot(path, titles, paths, others, table)


def _one_hot(
    path: str | os.PathLike[str],
    titles: Sequence[str],
    paths: Sequence[tuple[int, str]],
    others: Sequence[int],
    table: Sequence[Numbered],
) -> Rows:
    """A column a label; ``others`` are the columns that may be one."""
    cells = {i: [_value(row[i]) for _, row in table] for i in others}
    valued = [i for i in others if any(cells[i]) and all(cell in VALUES or not cell for cell in cells[i])]
    if others and table and not valued:
        named = ", ".join(repr(titles[i]) for i in others)
        raise ImageFileError(path, f"line 1: no column is called labels, and {named} do not hold 0, 1 and -1 alone")
    names = [normal(titles[i]) for i in valued]
    says_zero = any(VALUES.get(cell) == 0 for i in valued for cell in cells[i])
    values = {**VALUES, "": -1 if says_zero else 0}
    rows = []
    for k, (number, picture) in enumerate(paths):
        found: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for name, i in zip(names, valued, strict=True):
            found[values[cells[i][k]]].append(name)
        rows.append(Row(number, picture, found[1], found[-1]))
    return Rows(rows, names, _passed_over([titles[i] for i in others if i not in valued]))


def _value(cell: str) -> str:
    value = cell.strip().lower()
    return "" if value in NOTHING else value


def _passed_over(titles: Sequence[str]) -> str:
    return f"columns passed over: {', '.join(titles)}" if titles else ""
