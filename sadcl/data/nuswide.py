"""NUS-WIDE in both label layouts: one file of 81 columns, or one file per concept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sadcl.data.images import ImageFileError
from sadcl.data.labels import class_index, label_indices, read_class_names
from sadcl.data.listing import Entry, ImageListing, Keep, Missing
from sadcl.data.text import normal, read_lines

__all__ = ["NusWideDataset"]

NUM_CONCEPTS = 81
PICTURE_FOLDERS = ("Flickr", "images", "image", ".")
LABEL_FOLDERS = ("Groundtruth", "Groundtruth/TrainTestLabels", ".")
CONCEPT_FILES = ("Concepts81.txt", "ConceptsList/Concepts81.txt", "Groundtruth/Concepts81.txt")
NUMBERED_NOTE = (
    "label names: column numbers, since neither names nor Concepts81.txt came with the 81 columns "
    "(put Concepts81.txt, one name a line, into the data set's folder)"
)


class NusWideDataset(ImageListing):
    """One split of NUS-WIDE: ``ImageList/<Split>Imagelist.txt`` with labels from ``Groundtruth``.

    Labels are ``Labels_<Split>.txt`` (a row of 81 zeros and ones a picture) or, if that is not there, one
    ``Labels_<concept>_<Split>.txt`` per concept (a zero or one a picture). Concepts are in the order of
    ``Concepts81.txt`` where that lies in the folder, else in alphabetical order, which is the same.

    Args:
        root: the data set's folder. Pictures are looked for in ``Flickr``, ``images``, ``image`` and the folder
            itself, with or without the concept folders that the list names.
        split: "train" or "test".
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: as described above.
        class_names: a file with the names of the columns, one a line, instead of ``Concepts81.txt``.
        empty_images: "drop" (as everyone does here) or "keep" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there (Flickr lost some).

    Raises:
        ImageFileError: a list is missing or a line of it is not what it should be, or a picture is missing.
        ValueError: an unknown option, or a concept that is not among ``classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        image_size: int,
        classes: Sequence[str] | None = None,
        *,
        class_names: str | os.PathLike[str] | None = None,
        empty_images: Keep = "drop",
        missing_images: Missing = "error",
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        folder = Path(root)
        list_file = folder / "ImageList" / f"{split.title()}Imagelist.txt"
        names = [line.replace("\\", "/") for line in read_lines(list_file, "list of pictures")]
        if "" in names:  # the label files count lines
            raise ImageFileError(list_file, f"line {names.index('') + 1}: no path of a picture")
        known = _concepts(folder, class_names)
        concepts, rows, numbered = _labels(folder, split.title(), list_file, len(names), known)
        order = label_indices(concepts, class_index(classes or concepts, list_file), list_file)
        base, flat = _picture_folder(folder, names)
        entries = [
            Entry(
                os.path.join(base, os.path.basename(name) if flat else name),
                tuple(order[column] for column in row),
                f"line {number} of {list_file}",
            )
            for number, (name, row) in enumerate(zip(names, rows, strict=True), 1)
        ]
        super().__init__(
            f"NUS-WIDE {split}",
            list_file,
            entries,
            classes or concepts,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
            note=NUMBERED_NOTE if numbered else "",
        )


def _concepts(folder: Path, class_names: str | os.PathLike[str] | None) -> tuple[str, ...] | None:
    """The concepts' names in the order of the columns, if a file gives them."""
    candidates = [folder / name for name in CONCEPT_FILES] if class_names is None else [Path(class_names)]
    if class_names is None and not any(path.is_file() for path in candidates):
        return None
    return read_class_names(next((path for path in candidates if path.is_file()), candidates[0]))


def _labels(
    folder: Path, split: str, list_file: Path, count: int, known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[list[int]], bool]:
    """(concept names, columns that are 1 for each picture, whether the names are made up)."""
    for place in LABEL_FOLDERS:
        if (table := folder / place / f"Labels_{split}.txt").is_file():
            rows = _table_rows(table, list_file, count, len(known) if known else NUM_CONCEPTS)
            made_up = tuple(f"concept {number:02d}" for number in range(1, NUM_CONCEPTS + 1))
            return known or made_up, rows, known is None
    for place in LABEL_FOLDERS:
        files = {
            normal(path.name[len("Labels_") : -len(f"_{split}.txt")]): path
            for path in (folder / place).glob(f"Labels_*_{split}.txt")
        }
        if files:
            concepts = known or tuple(sorted(files))
            if absent := [name for name in concepts if name not in files]:
                raise ImageFileError(folder / place / f"Labels_{absent[0]}_{split}.txt", "no such file of labels")
            return concepts, _column_rows([files[name] for name in concepts], list_file, count), False
    raise ImageFileError(folder / LABEL_FOLDERS[0] / f"Labels_{split}.txt", "no such file of labels, nor one a concept")


def _table_rows(table: Path, list_file: Path, count: int, columns: int) -> list[list[int]]:
    lines = read_lines(table, "file of labels")
    _check_count(table, len(lines), list_file, count)
    rows = []
    for number, line in enumerate(lines, 1):
        values = line.split()
        if len(values) != columns or not {"0", "1"}.issuperset(values):
            raise ImageFileError(table, f"line {number}: expected {columns} columns of 0 and 1, got {line[:60]!r}")
        rows.append([column for column, value in enumerate(values) if value == "1"])
    return rows


def _column_rows(files: Sequence[Path], list_file: Path, count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for column, file in enumerate(files):
        lines = read_lines(file, "file of labels")
        _check_count(file, len(lines), list_file, count)
        for row, (number, line) in zip(rows, enumerate(lines, 1), strict=True):
            if line == "1":
                row.append(column)
            elif line != "0":
                raise ImageFileError(file, f"line {number}: expected 0 or 1, got {line[:60]!r}")
    return rows


def _check_count(file: Path, lines: int, list_file: Path, count: int) -> None:
    if lines != count:
        raise ImageFileError(file, f"expected a line for each of the {count} pictures of {list_file}, got {lines}")


def _picture_folder(folder: Path, names: Sequence[str]) -> tuple[str, bool]:
    """Where the pictures are, and whether they lie there without the folders that the list names."""
    sample = names[:: max(1, len(names) // 50)]

    def found(place: tuple[str, bool]) -> int:
        base, flat = place
        return sum(os.path.isfile(os.path.join(base, os.path.basename(n) if flat else n)) for n in sample)

    places = [(os.path.join(folder, base), flat) for base in PICTURE_FOLDERS for flat in (False, True)]
    return max(places, key=found)  # the first of equals
