"""COCO: ``instances_*.json`` with its pictures, of the data set itself or of anyone's own folder.

The file is read with :mod:`json`. pycocotools would read it with the same module, keep every polygon, and index
boxes and masks that a data set of labels never asks for; here the polygons are let go while the file is parsed,
which is most of its size.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sadcl.data.images import ImageFileError
from sadcl.data.labels import class_index, label_indices
from sadcl.data.listing import Entry, ImageListing, Keep, Missing
from sadcl.data.text import identifier, normal, read_json

__all__ = ["CocoDataset", "coco"]

# For every list the identifiers of an item, and the keys of which it needs one.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "images": (("id",), ("file_name", "coco_url")),
    "annotations": (("image_id", "category_id"), ()),
    "categories": (("id",), ("name",)),
}


class CocoDataset(ImageListing):
    """A folder of pictures and a JSON file in COCO's format; an object of a category makes it a label.

    Crowd regions (``iscrowd``) count: the category is there to be seen. Where images have ``neg_category_ids`` (LVIS),
    those are absent and every other category without an annotation is ignored; without a list ``annotations`` all are.

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
        names, roots = _category_names(annotations, content)
        classes = list(names.values()) if classes is None else classes
        folder = os.path.dirname(annotations) if root is None else os.fspath(root)
        entries, strays = _entries(annotations, content, names, classes, folder)
        super().__init__(
            title or f"pictures of {annotations}",
            annotations,
            entries,
            classes,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
            note=f"{roots}\n{strays}".strip(),
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
    """The file's lists, with identifiers of one kind."""

    def without_polygons(item: dict[str, Any]) -> dict[str, Any]:
        item.pop("segmentation", None)
        return item

    content = read_json(path, "annotation file", without_polygons)
    for name, (identifiers, names) in KEYS.items():
        items = content.get(name) if isinstance(content, dict) else None
        if items is None and name == "annotations" and isinstance(content, dict):
            content.pop(name, None)
            continue  # as in COCO's own test sets
        if not isinstance(items, list):
            raise ImageFileError(path, f"expected COCO's format with a list {name!r}")
        for number, item in enumerate(items):
            known = {key: identifier(item.get(key)) for key in identifiers} if isinstance(item, dict) else {}
            nameless = bool(names) and not any(isinstance(item.get(key), (int, str)) for key in names if known)
            if not known or None in known.values() or nameless:
                expected = " and ".join([*identifiers, *names[:1]])
                raise ImageFileError(path, f"{name}[{number}]: expected {expected}, got {str(item)[:80]}")
            item.update(known)
    return content


def _category_names(
    path: str | os.PathLike[str], content: dict[str, list[dict[str, Any]]]
) -> tuple[dict[Any, str], str]:
    """(category id -> name, in the order of the ids; in words, what is no class).

    Labelling tools put a root above all others: no annotation has it, it has no parent, and others have its name as
    ``supercategory`` (one of the others may have it as its own name as well).
    """
    used = {item["category_id"] for item in content.get("annotations", ())}
    names: dict[Any, str] = {}
    roots: list[str] = []
    for item in sorted(content["categories"], key=lambda item: (isinstance(item["id"], str), item["id"])):
        key, name = item["id"], normal(str(item["name"]))
        below = (other for other in content["categories"] if other["id"] != key)
        above = any(_parent(other) == name.casefold() for other in below)
        if above and key not in used and _parent(item) in ("", "none", "null", name.casefold()):
            roots.append(name)
        elif names.setdefault(key, name) != name:
            raise ImageFileError(path, f"two categories have the id {key!r}: {names[key]!r} and {name!r}")
    return names, f"no class: category {', '.join(map(repr, roots))}, the parent of others" if roots else ""


def _parent(category: dict[str, Any]) -> str:
    return normal(str(category.get("supercategory") or "")).casefold()


def _entries(
    path: str | os.PathLike[str],
    content: dict[str, list[dict[str, Any]]],
    names: dict[Any, str],
    classes: Sequence[str],
    folder: str,
) -> tuple[list[Entry], str]:
    """(the pictures; in words, what was passed over)."""
    index = class_index(classes, path)
    found: dict[Any, set[Any]] = {item["id"]: set() for item in content["images"]}
    if len(found) < len(content["images"]):
        (repeated, _), *_ = Counter(item["id"] for item in content["images"]).most_common(1)
        raise ImageFileError(path, f"two images have the id {repeated!r}")
    annotations = content.get("annotations", [])
    strays = [number for number, item in enumerate(annotations) if item["image_id"] not in found]
    if strays and len(strays) == len(annotations):
        raise ImageFileError(path, f"annotations[0]: no image has the id {annotations[0]['image_id']!r}")
    for number, item in enumerate(annotations):
        if item["category_id"] not in names:
            raise ImageFileError(path, f"annotations[{number}]: no category has the id {item['category_id']!r}")
        found.get(item["image_id"], set()).add(item["category_id"])
    partial = any("neg_category_ids" in item for item in content["images"])  # LVIS: the rest was not looked for
    entries = []
    for item in content["images"]:
        where = f"image id {item['id']} of {path}"
        positive = label_indices((names[category] for category in sorted(found[item["id"]], key=str)), index, path)
        absent: tuple[int, ...] | None = None
        if "annotations" not in content:
            absent = ()
        elif partial:
            known = map(identifier, item.get("neg_category_ids") or ())
            absent = label_indices((names[category] for category in known if category in names), index, path)
        entries.append(Entry(_picture(item, folder), positive, where, absent=absent))
    note = f"passed over: {len(strays)} annotations of images that are not listed" if strays else ""
    return entries, note


def _picture(item: dict[str, Any], folder: str) -> str:
    """Where an image lies; LVIS names its place on a server, of which one's own copy has the last folder or not."""
    if isinstance(item.get("file_name"), (int, str)):
        return os.path.join(folder, str(item["file_name"]))
    *_, inside, name = ["", *str(item["coco_url"]).split("/")]
    return (
        os.path.join(folder, inside, name)
        if os.path.isdir(os.path.join(folder, inside))
        else os.path.join(folder, name)
    )
