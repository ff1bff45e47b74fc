"""Visual Genome 500: the pictures of Visual Genome with its 500 most frequent categories as labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sadcl.data.images import ImageFileError
from sadcl.data.labels import class_index, label_indices, read_class_names
from sadcl.data.listing import Entry, ImageListing, Keep, Missing
from sadcl.data.text import read_json, read_lines

__all__ = ["VisualGenome500Dataset"]

NUM_CLASSES = 500
INDEX_FILE = "vg_category_500_labels_index.json"
NUMBERED_NOTE = (
    "label names: category numbers, since the data set's files give no names (class_names takes a file of them)"
)


class VisualGenome500Dataset(ImageListing):
    """One split of VG500: ``<split>_list_500.txt`` names pictures of ``VG_100K`` (or ``VG_100K_2``, as the second
    archive unpacks), ``vg_category_500_labels_index.json`` maps each to its class indices.

    Args:
        root: the folder that holds all of them.
        split: "train" or "test".
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: the names of ``class_names``, or numbers.
        class_names: a file with the names of categories 0 to 499, one a line; default: those of ``classes``.
        empty_images: "keep" or "drop" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there.

    Raises:
        ImageFileError: a file is missing or not what it should be.
        ValueError: an unknown option.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        image_size: int,
        classes: Sequence[str] | None = None,
        *,
        class_names: str | os.PathLike[str] | None = None,
        empty_images: Keep = "keep",
        missing_images: Missing = "error",
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        if classes is not None and len(classes) != NUM_CLASSES:
            raise ValueError(f"classes: expected {NUM_CLASSES} names, got {len(classes)}")
        folder = Path(root)
        list_file = folder / f"{split}_list_500.txt"
        if class_names is not None:
            names = read_class_names(class_names, NUM_CLASSES)
        else:
            names = tuple(classes or (f"category {number:03d}" for number in range(NUM_CLASSES)))
        order = label_indices(names, class_index(classes or names, list_file), list_file)
        super().__init__(
            f"Visual Genome 500 {split}",
            list_file,
            _entries(folder, list_file, order),
            classes or names,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
            note="" if classes or class_names else NUMBERED_NOTE,
        )


def _entries(folder: Path, list_file: Path, order: Sequence[int]) -> Iterator[Entry]:
    index_file = folder / INDEX_FILE
    labels = _read_index(index_file)
    first, second = ({*os.listdir(place)} if place.is_dir() else set() for place in _picture_folders(folder))
    for number, name in enumerate(read_lines(list_file, "list of pictures"), 1):
        if not name:
            continue
        if name not in labels:
            raise ImageFileError(index_file, f"no labels for {name!r} (line {number} of {list_file})")
        picture_folder = _picture_folders(folder)[name not in first and name in second]
        positive = tuple(order[category] for category in labels[name])
        yield Entry(os.path.join(picture_folder, name), positive, f"line {number} of {list_file}")


def _picture_folders(folder: Path) -> tuple[Path, Path]:
    return folder / "VG_100K", folder / "VG_100K_2"


def _read_index(path: Path) -> dict[str, tuple[int, ...]]:
    content = read_json(path, "file of labels")
    if not isinstance(content, dict):
        raise ImageFileError(path, "expected an object: picture name -> list of class indices")
    for name, indices in content.items():
        if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < NUM_CLASSES for i in indices):
            expected = f"expected a list of indices from 0 to {NUM_CLASSES - 1}"
            raise ImageFileError(path, f"{name!r}: {expected}, got {str(indices)[:60]}")
    return {name: tuple(indices) for name, indices in content.items()}
