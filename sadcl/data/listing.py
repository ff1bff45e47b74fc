"""What every data set of picture files has in common: paths, label indices, reading, counting, refusing early."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.data.folders import Folders, files_stamp
from sadcl.data.images import ImageFileError, load_rgb, square_tensor
from sadcl.data.labels import (
    check_compounds,
    class_index,
    class_order,
    doubts,
    label_indices,
    label_separator_of,
    split_labels,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Entry", "ImageListing", "Keep", "Missing", "NamedListing", "Row", "Rows"]

Keep = Literal["keep", "drop"]
Missing = Literal["error", "drop"]


class Entry(NamedTuple):
    """A picture as its data set names it.

    Attributes:
        path: of the picture file.
        positive: indices of its labels.
        where: what names it, in words ("line 3 of train.csv"); for messages.
        ignored: indices of labels that are neither there nor absent (label value -1).
        absent: indices of labels that are known to be absent, where the data set says so: all others that are not
            positive are ignored then.
    """

    path: str
    positive: tuple[int, ...]
    where: str
    ignored: tuple[int, ...] = ()
    absent: tuple[int, ...] | None = None

    def joined(self, other: Entry) -> Entry:
        """One picture that was named twice: what either says is there is there, what either ignores is ignored."""
        absent = None if self.absent is None or other.absent is None else self.absent + other.absent
        return self._replace(
            positive=self.positive + other.positive, ignored=self.ignored + other.ignored, absent=absent
        )


class ImageListing(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in files, with labels: the base of every loader, which only has to produce the entries.

    A picture that several entries name (``a.png`` and ``./a.png``, two links to one file) is one picture with all
    their labels, in the place of the first.

    Args:
        title: what the pictures are, in words: it heads :meth:`summary`.
        source: the file (or folder) that lists them; errors name it.
        entries: the pictures, in order.
        classes: the C label names.
        image_size: side of the square that ``self[index]`` resizes to.
        empty_images: what to do with pictures without any label: "keep" (a row of zeros) or "drop".
        missing_images: what to do with pictures whose file is not there: "error" (now, not in the middle of
            an epoch) or "drop".
        note: more lines for :meth:`summary`, separated by line ends.

    Attributes:
        paths: of the pictures that were kept, as they lie on the disk.
        identities: the same without links, for comparing listings.
        positive: their label indices.
        ignored: picture index -> indices of its labels with value -1 (only pictures that have any).
        absent: picture index -> indices of its labels with value 0, where all others are ignored.
        dropped: reason -> number of pictures left out.
        pixel_range: see :func:`sadcl.data.images.load_rgb`; set it before the first picture is read.

    Raises:
        ImageFileError: a picture's file is missing, or no picture is left.
        ValueError: an unknown option, no class, or a class name that occurs twice.
    """

    def __init__(
        self,
        title: str,
        source: str | os.PathLike[str],
        entries: Iterable[Entry],
        classes: Sequence[str],
        image_size: int,
        *,
        empty_images: Keep = "keep",
        missing_images: Missing = "error",
        note: str = "",
    ) -> None:
        _check_options(source, classes, image_size, empty_images, missing_images)
        self.title = title
        self.classes = tuple(classes)
        self.image_size = image_size
        self.pixel_range: Sequence[float] | None = None
        self.dropped: dict[str, int] = {}
        listed, folders = list(entries), Folders()
        found, missing, merged = _merge(listed, folders)
        kept = {
            identity: entry
            for identity, entry in found.items()
            if empty_images == "keep" or entry.positive or entry.ignored or entry.absent is not None
        }
        self._count_dropped("without a label", len(found) - len(kept))
        gone = [entry for identity, entry in kept.items() if identity in missing]
        if gone and missing_images == "error":
            more = f"; missing with it: {len(gone) - 1} more" if len(gone) > 1 else ""
            reason = f"no such picture file ({gone[0].where}{more}{folders.hint(gone[0].path)})"
            raise ImageFileError(gone[0].path, reason)
        self._count_dropped("whose file is missing", len(gone))
        kept = {identity: entry for identity, entry in kept.items() if identity not in missing}
        if not kept:
            raise ImageFileError(
                source, f"no picture is left ({self._dropped_words()})" if listed else "lists no picture"
            )
        self.paths = [entry.path for entry in kept.values()]
        self.identities = list(kept)
        self.positive = [tuple(sorted(set(entry.positive))) for entry in kept.values()]
        self.ignored = {i: entry.ignored for i, entry in enumerate(kept.values()) if entry.ignored}
        self.absent = {i: entry.absent for i, entry in enumerate(kept.values()) if entry.absent is not None}
        self.notes = [merged, *doubts(self.classes), *note.splitlines()]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def annotated(self) -> bool:
        """Whether any label of any picture is known."""
        return any(self._unknown(i) < len(self.classes) for i in range(len(self)))

    def labels(self, index: int) -> Tensor:
        """Labels of picture ``index``: float32 [C], 1 there, 0 absent, -1 ignored."""
        index %= len(self)
        labels = torch.zeros(len(self.classes), device="cpu")
        if (absent := self.absent.get(index)) is not None:
            labels -= 1.0
            labels[list(absent)] = 0.0
        labels[list(self.ignored.get(index, ()))] = -1.0
        labels[list(self.positive[index])] = 1.0
        return labels

    def load(self, index: int, at_least: int | None = None) -> tuple[Image, Tensor]:
        """Picture ``index`` upright in RGB, and its labels float32 [C].

        Args:
            index: which picture.
            at_least: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size while both sides stay at least so
                long; default: native size.

        Raises:
            ImageFileError: the file cannot be decoded.
        """
        return load_rgb(self.paths[index], at_least, self.pixel_range), self.labels(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture ``index``: (RGB uint8 [3, image_size, image_size], labels float32 [C])."""
        image, labels = self.load(index, 2 * self.image_size)
        return square_tensor(image, self.image_size), labels

    def fingerprint(self) -> str:
        """Changes with the classes, the pictures' paths or the labels (not with what is in the picture files)."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for index, (path, positive) in enumerate(zip(self.paths, self.positive, strict=True)):
            known = f"{self.ignored.get(index, ())}\0{self.absent.get(index)}"
            digest.update(f"{path}\0{positive}\0{known}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def stamp(self) -> str:
        """Changes with what is in the picture files, by where a name leads, size and times of change."""
        return files_stamp(self.paths)

    def summary(self) -> str:
        """Counts for people: images, labels, class frequencies, what is not known, what was dropped."""
        counts = Counter(label for positive in self.positive for label in positive)
        sizes = [len(positive) for positive in self.positive]
        head = f"{len(self)} images, {len(self.classes)} labels, {sum(sizes) / len(sizes):.2f} labels an image"
        head += f" (at most {max(sizes)}); {sizes.count(0)} without a label"
        ranked = sorted(range(len(self.classes)), key=lambda c: (-counts[c], c))
        lines = [f"{self.title}: {head}", *_frequency_lines([(self.classes[c], counts[c]) for c in ranked])]
        lines.append(self._unknown_words())
        if self.dropped:
            lines.append(f"dropped: {self._dropped_words()}")
        return "\n  ".join(line for line in [*lines, *self.notes] if line)

    def _unknown(self, index: int) -> int:
        """How many labels of a picture are neither there nor absent."""
        positive = set(self.positive[index])
        if (absent := self.absent.get(index)) is not None:
            return len(self.classes) - len(positive | set(absent) - set(self.ignored.get(index, ())))
        return len(set(self.ignored.get(index, ())) - positive)

    def _unknown_words(self) -> str:
        unknown = [count for i in {*self.ignored, *self.absent} if (count := self._unknown(i))]
        if not unknown:
            return "labels that a picture is not listed with are absent"
        if not self.annotated:
            return "no annotations: nothing can be measured here, only predicted"
        return f"ignored: {sum(unknown)} labels of {len(unknown)} images, not known to be there or absent"

    def _count_dropped(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] = count

    def _dropped_words(self) -> str:
        return ", ".join(f"{count} images {reason}" for reason, count in self.dropped.items())


class Row(NamedTuple):
    """A line of a list: its number, the picture, and its label names, or a cell of them that is still to be split."""

    number: int
    path: str
    labels: str | Sequence[str]
    unknown: str | Sequence[str] = ()


class Rows(NamedTuple):
    """What a list holds.

    Attributes:
        rows: its lines.
        names: label names that it knows whether or not a picture has them, in its own order.
        note: a line for the summary.
    """

    rows: Sequence[Row]
    names: Sequence[str] = ()
    note: str = ""


class NamedListing(ImageListing):
    """Pictures of a list that gives label names a line; subclasses say how a line is read.

    Args:
        path: the list.
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: those of the list's columns, or those that occur, sorted (numbers
            by value).
        root: folder that relative paths start from; default: the list's own.
        empty_images: "keep" or "drop" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there.
        label_separator: what stands between the labels of one text; default: a semicolon, and labels that look like
            several (separated by anything else) are refused.

    Raises:
        ImageFileError: the list is missing or empty, one of its lines cannot be read, a picture it names does
            not exist (here), or cannot be decoded (when it is read).
        ValueError: a label that is not among ``classes``, or one that looks like several.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_size: int,
        classes: Sequence[str] | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        empty_images: Keep = "keep",
        missing_images: Missing = "error",
        label_separator: str | None = None,
    ) -> None:
        separator = label_separator_of(label_separator)
        content = self.read(path, separator)
        if not content.rows:
            raise ImageFileError(path, "lists no picture")
        rows = [_split(row, separator, path) for row in content.rows]
        if classes is None:
            named = {name for _, _, labels, unknown in rows for name in (*labels, *unknown)}
            classes = content.names if named.issubset(content.names) else class_order({*named, *content.names})
            if not classes:
                first = content.rows[0]
                raise ImageFileError(path, f"no picture has a label (line {first.number} is {first.path!r})")
            if label_separator is None:
                check_compounds(classes, path)
        index = class_index(classes, path)
        folder = os.path.dirname(path) if root is None else os.fspath(root)
        entries = [
            Entry(
                os.path.join(folder, picture),
                label_indices(labels, index, path, f"line {number}"),
                f"line {number} of {path}",
                label_indices(unknown, index, path, f"line {number}"),
            )
            for number, picture, labels, unknown in rows
        ]
        super().__init__(
            f"pictures of {path}",
            path,
            entries,
            classes,
            image_size,
            empty_images=empty_images,
            missing_images=missing_images,
            note=content.note,
        )

    @staticmethod
    def read(path: str | os.PathLike[str], separator: str | None) -> Rows:
        """The list's lines; ``separator`` is what the user says stands between labels."""
        raise NotImplementedError


def _split(row: Row, separator: str | None, path: str | os.PathLike[str]) -> Row:
    """A row whose labels are names, each once, none both there and unknown."""
    cells = []
    for cell in (row.labels, row.unknown):
        try:
            cells.append(split_labels(cell, separator) if isinstance(cell, str) else tuple(cell))
        except ValueError as error:
            raise ImageFileError(path, f"line {row.number}: {error}") from None
    if both := set(cells[0]) & set(cells[1]):
        raise ImageFileError(path, f"line {row.number}: label {min(both)!r} is both listed and unknown")
    return row._replace(labels=cells[0], unknown=cells[1])


def _merge(listed: Sequence[Entry], folders: Folders) -> tuple[dict[str, Entry], set[str], str]:
    """(identity -> its entry, in order; identities whose file is missing; in words, what was listed twice)."""
    found: dict[str, Entry] = {}
    missing: set[str] = set()
    repeated: list[Entry] = []
    for entry, path in zip(listed, folders.resolve([entry.path for entry in listed]), strict=True):
        identity = os.path.abspath(entry.path) if path is None else folders.identity(path)
        if path is None:
            missing.add(identity)
        if identity in found:
            repeated.append(entry)
            found[identity] = found[identity].joined(entry)
        else:
            found[identity] = entry if path is None else entry._replace(path=path)
    if not repeated:
        return found, missing, ""
    return (
        found,
        missing,
        f"listed more than once, labels joined: {len(repeated)} rows ({repeated[0].where} is the first)",
    )


def _check_options(
    source: str | os.PathLike[str], classes: Sequence[str], image_size: int, empty_images: str, missing_images: str
) -> None:
    for name, value, allowed in (
        ("empty_images", empty_images, ("keep", "drop")),
        ("missing_images", missing_images, ("error", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
    if image_size < 1:
        raise ValueError(f"image_size: expected a number > 0, got {image_size}")
    if not classes:
        raise ValueError(f"{source}: no picture has a label")
    class_index(classes, source)


def _frequency_lines(ranked: Sequence[tuple[str, int]], shown: int = 5) -> list[str]:
    """``ranked``: (class, images) from the commonest to the rarest."""

    def words(pairs: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{name} {count}" for name, count in pairs)

    seen = [(name, count) for name, count in ranked if count]
    never = [name for name, count in ranked if not count]
    if len(seen) <= 2 * shown:
        lines = [f"images a label: {words(seen)}"] if seen else []
    else:
        lines = [f"commonest: {words(seen[:shown])}", f"rarest: {words(reversed(seen[-shown:]))}"]
    if never:
        more = f" and {len(never) - shown} more" if len(never) > shown else ""
        lines.append(f"never there: {', '.join(never[:shown])}{more}")
    return lines
