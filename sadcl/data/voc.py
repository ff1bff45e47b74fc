"""PASCAL VOC 2007 and 2012, and the files that the 2012 evaluation server takes."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor

from sadcl.data.folders import Folders
from sadcl.data.images import ImageFileError, picture_suffixes
from sadcl.data.labels import class_index, label_indices
from sadcl.data.listing import Entry, ImageListing, Keep, Missing
from sadcl.data.text import MARKS, normal, read_lines

CLASS_COLUMN = re.compile(r"\s+(-1|0|1)$")  # of the lists that there are for each class
ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?\bencoding\s*=\s*["']([\w.-]+)["']""")

__all__ = ["VOC_CLASSES", "VocDataset", "write_voc_results"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VocDataset(ImageListing):
    """One split of VOC, or of a tree that a labelling tool made like it: a label is a class with an object that is not
    marked difficult.

    A split without any annotation file (the test set of 2012) has all its labels at -1, ignored, so that nothing
    can be measured on it by mistake; :attr:`annotated` says which it is. Pictures may have any suffix, and the list
    may name them with it, with their folder, or with a column of -1, 0 and 1 behind them.

    Args:
        root: the folder with ``VOCdevkit`` in it; ``VOCdevkit`` or ``VOC<year>`` itself will do.
        year: 2007 or 2012.
        split: a list in ``ImageSets/Main``, such as "trainval" or "test".
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: VOC's 20.
        difficult: a class with difficult objects alone is "negative" (0), or "ignored" (-1) as in VOC's own
            evaluation.
        empty_images: "keep" or "drop" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there.

    Attributes:
        ids: the pictures' identifiers, as in the list.

    Raises:
        ImageFileError: the list, a picture or an annotation of it is missing or not what it should be.
        ValueError: an unknown option, or an object of a class that is not among ``classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        year: int,
        split: str,
        image_size: int,
        classes: Sequence[str] | None = None,
        *,
        difficult: Literal["negative", "ignored"] = "negative",
        empty_images: Keep = "keep",
        missing_images: Missing = "error",
    ) -> None:
        if difficult not in ("negative", "ignored"):
            raise ValueError(f"difficult: expected 'negative' or 'ignored', got {difficult!r}")
        folder = _voc_folder(Path(root), year)
        list_file = folder / "ImageSets" / "Main" / f"{split}.txt"
        classes = VOC_CLASSES if classes is None else tuple(classes)
        listed = _identities(read_lines(list_file, "list of pictures"))
        with_file = {normal(name.removesuffix(".xml")) for name in _names_in(folder / "Annotations")}
        annotated = any(normal(identity) in with_file for _, identity in listed)
        entries = _entries(folder, list_file, listed, classes, annotated, difficult)
        super().__init__(
            f"VOC {year} {split}",
            list_file,
            entries,
            classes,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
        )
        self.ids = [Path(path).stem for path in self.paths]


def _voc_folder(root: Path, year: int) -> Path:
    candidates = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", root]
    for folder in candidates:
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise ImageFileError(root, f"expected VOCdevkit/VOC{year} with ImageSets/Main, JPEGImages and Annotations here")


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _identities(lines: Sequence[str]) -> list[tuple[int, str]]:
    """(line number, identifier) of the pictures of a list."""
    listed = [(number, line) for number, line in enumerate(lines, 1) if line]
    if all(CLASS_COLUMN.search(line) for _, line in listed):
        listed = [(number, CLASS_COLUMN.sub("", line)) for number, line in listed]
    identities = []
    for number, line in listed:
        name = line.replace("\\", "/").removeprefix("./").removeprefix("JPEGImages/")
        stem, suffix = os.path.splitext(name)
        identities.append((number, stem if suffix.lower() in picture_suffixes() else name))
    return identities


def _entries(
    folder: Path,
    list_file: Path,
    listed: Sequence[tuple[int, str]],
    classes: Sequence[str],
    annotated: bool,
    difficult: str,
) -> Iterator[Entry]:
    index = class_index(classes, list_file)
    folders = Folders()
    for number, identity in listed:
        where = f"line {number} of {list_file}"
        picture = os.path.join(folder, "JPEGImages", identity)
        path = folders.with_suffix(picture) or folders.find(f"{picture}.jpg") or f"{picture}.jpg"
        if not annotated:
            yield Entry(path, (), where, absent=())
            continue
        annotation = folder / "Annotations" / f"{identity}.xml"
        annotation = Path(folders.find(os.fspath(annotation)) or annotation)
        clear, hard = _objects(annotation, where)
        positive = label_indices(sorted(clear), index, annotation)
        hard_only = label_indices(sorted(hard - clear), index, annotation)
        yield Entry(path, positive, where, hard_only if difficult == "ignored" else ())


def _objects(annotation: Path, where: str) -> tuple[set[str], set[str]]:
    """Classes with an object that is not difficult, and classes with one that is."""
    try:
        tree = _xml(annotation.read_bytes())
    except FileNotFoundError:
        raise ImageFileError(annotation, f"no such annotation file ({where})") from None
    except (ElementTree.ParseError, LookupError, UnicodeDecodeError) as error:  # the text names line and column
        raise ImageFileError(annotation, f"not XML ({error})") from None
    if tree.tag != "annotation":
        raise ImageFileError(annotation, f"expected an <annotation>, got <{tree.tag}>")
    clear: set[str] = set()
    hard: set[str] = set()
    for item in tree.findall("object"):  # direct children: an object's parts (head, hand) have names too
        name = (item.findtext("name") or "").strip()
        if not name:
            raise ImageFileError(annotation, "an object has no name")
        (hard if (item.findtext("difficult") or "0").strip().lower() in ("1", "true") else clear).add(name)
    return clear, hard


def _xml(raw: bytes) -> ElementTree.Element:
    """The root of an XML file in any encoding that Python knows; expat alone knows none of several bytes (GBK).

    A byte order mark says more than a declaration.
    """
    for mark, encoding in MARKS:
        if raw.startswith(mark):
            return ElementTree.fromstring(raw.decode(encoding))
    raw = raw.lstrip()
    declared = ENCODING.match(raw)
    if declared is None or declared[1].lower().startswith(b"utf"):
        return ElementTree.fromstring(raw)
    return ElementTree.fromstring(raw.decode(declared[1].decode()))  # what a text declares is not looked at


def write_voc_results(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    scores: Tensor,
    *,
    classes: Sequence[str] = VOC_CLASSES,
    competition: int = 1,
    year: int = 2012,
    split: str = "test",
) -> Path:
    """Write the archive that VOC's evaluation server takes.

    It holds ``results/VOC2012/Main/comp1_cls_test_<class>.txt`` for every class, a line ``<image id> <confidence>``
    for every picture.

    Args:
        path: of the archive to write, ``.tar.gz`` or ``.tgz``.
        ids: the pictures' identifiers (:attr:`VocDataset.ids`).
        scores: [n, C] confidences; any increasing scale, for only their order within a class counts.
        classes: the C class names, a permutation of VOC's.
        competition: 1 if nothing but VOC's own trainval data was used, 2 if anything else was (a backbone with
            pretrained weights is something else).
        year: of the data set.
        split: of the data set.

    Raises:
        ValueError: shapes that do not belong together, other classes, or a score that is not finite.
    """
    if competition not in (1, 2):
        raise ValueError(f"competition: expected 1 or 2, got {competition!r}")
    if sorted(classes) != sorted(VOC_CLASSES):
        raise ValueError(f"classes: expected VOC's 20, got {', '.join(classes)}")
    if tuple(scores.shape) != (len(ids), len(classes)):
        raise ValueError(f"scores: expected shape [{len(ids)}, {len(classes)}], got {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores: expected finite values, got NaN or inf")
    if not str(path).endswith((".tar.gz", ".tgz")):
        raise ValueError(f"path: expected a name that ends in .tar.gz or .tgz, got {os.fspath(path)!r}")
    columns = scores.detach().double().cpu().T.tolist()
    with tarfile.open(path, "w:gz") as archive:
        for name, column in zip(classes, columns, strict=True):
            lines = [f"{identity} {score:.9g}\n" for identity, score in zip(ids, column, strict=True)]
            content = "".join(lines).encode()
            member = tarfile.TarInfo(f"results/VOC{year}/Main/comp{competition}_cls_{split}_{name}.txt")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return Path(path)
