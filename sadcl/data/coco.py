"""COCO: ``instances_*.json`` with its pictures, of the data set itself or of anyone's own folder.

The file is read with :mod:`json`. pycocotools would read it with the same module, keep every polygon, and index
boxes and masks that a data set of labels never asks for; here the polygons are let go while the file is parsed,
which is most of its size.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sadcl.data.images import ImageFileError
from sadcl.data.listing import Entry, ImageListing, Keep, Missing, label_indices, read_json

__all__ = ["CocoDataset", "coco"]


class CocoDataset(ImageListing):
    """A folder of pictures and a JSON file in COCO's format; an object of a category makes it a label.

    Crowd regions (``iscrowd``) count: the category is there to be seen.

    Args:
        annotations: the JSON file, with the lists ``images``, ``annotations`` and ``categories``.
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: the file's categories in the order of their ids.
        root: folder that each ``file_name`` starts from; default: the JSON file's own.
        empty_images: "keep" or "drop" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there.
        title: what the pictures are, in words.

    Raises:
        ImageFileError: the file is missing, is not such JSON, or a picture of it is missing.
        ValueError: an annotated category that is not among ``classes``.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        image_size: int,
        classes: Sequence[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        empty_images: Keep = "keep",
        missing_images: Missing = "error",
        title: str = "",
    ) -> None:
        content = _read(annotations)
        names = _category_names(annotations, content["categories"])
        classes = list(names.values()) if classes is None else classes
        folder = os.path.dirname(annotations) if root is None else os.fspath(root)
        entries = _entries(annotations, content, names, classes, folder)
        super().__init__(
            title or f"pictures of {annotations}",
            annotations,
            entries,
            classes,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
        )


def coco(
    root: str | os.PathLike[str],
    year: int,
    split: str,
    image_size: int,
    classes: Sequence[str] | None = None,
    *,
    empty_images: Keep = "keep",
    missing_images: Missing = "error",
) -> CocoDataset:
    """COCO as unpacked: ``<root>/<split><year>/`` and ``<root>/annotations/instances_<split><year>.json``.

    Args:
        root: the folder that holds both.
        year: 2014 or 2017.
        split: "train" or "val".
        image_size: see :class:`CocoDataset`.
        classes: see :class:`CocoDataset`.
        empty_images: see :class:`CocoDataset`; published figures differ by whether 702 training and 367
            validation pictures of 2014 without any annotation were kept (here: yes).
        missing_images: see :class:`CocoDataset`.
    """
    return CocoDataset(
        Path(root) / "annotations" / f"instances_{split}{year}.json",
        image_size,
        classes,
        root=Path(root) / f"{split}{year}",
        empty_images=empty_images,
        missing_images=missing_images,
        title=f"COCO {year} {split}",
    )


def _read(path: str | os.PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    def without_polygons(item: dict[str, Any]) -> dict[str, Any]:
        item.pop("segmentation", None)
        return item

    content = read_json(path, "annotation file", without_polygons)
    needed = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
    for name, keys in needed.items():
        items = content.get(name) if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise ImageFileError(path, f"expected COCO's format with a list {name!r}")
        for number, item in enumerate(items):
            if not isinstance(item, dict) or any(not isinstance(item.get(key), (int, str)) for key in keys):
                raise ImageFileError(path, f"{name}[{number}]: expected {' and '.join(keys)}, got {str(item)[:80]}")
    return content


def _category_names(path: str | os.PathLike[str], categories: list[dict[str, Any]]) -> dict[Any, str]:
    """Category id -> name, in the order of the ids."""
    names: dict[Any, str] = {}
    for item in sorted(categories, key=lambda item: (isinstance(item["id"], str), item["id"])):
        if item["id"] in names:
            raise ImageFileError(path, f"two categories have the id {item['id']!r}")
        names[item["id"]] = str(item["name"])
    return names


def _entries(
    path: str | os.PathLike[str],
    content: dict[str, list[dict[str, Any]]],
    names: dict[Any, str],
    classes: Sequence[str],
    folder: str,
) -> Iterator[Entry]:
    index = {name: i for i, name in enumerate(classes)}
    found: dict[Any, set[Any]] = {item["id"]: set() for item in content["images"]}
    if len(found) < len(content["images"]):
        (repeated, _), *_ = Counter(item["id"] for item in content["images"]).most_common(1)
        raise ImageFileError(path, f"two images have the id {repeated!r}")
    for number, item in enumerate(content["annotations"]):
        if item["image_id"] not in found:
            raise ImageFileError(path, f"annotations[{number}]: no image has the id {item['image_id']!r}")
        if item["category_id"] not in names:
            raise ImageFileError(path, f"annotations[{number}]: no category has the id {item['category_id']!r}")
        found[item["image_id"]].add(item["category_id"])
    for item in content["images"]:
        labels = label_indices((names[category] for category in found[item["id"]]), index, path)
        yield Entry(os.path.join(folder, str(item["file_name"])), labels, f"image id {item['id']} of {path}")
