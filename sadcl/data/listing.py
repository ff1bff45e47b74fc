"""What every data set of picture files has in common: paths, label indices, reading, counting, refusing early."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.data.images import ImageFileError, load_rgb, square_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Entry",
    "ImageListing",
    "Keep",
    "Missing",
    "NamedListing",
    "label_indices",
    "read_class_names",
    "read_json",
    "read_lines",
]

Keep = Literal["keep", "drop"]
Missing = Literal["error", "drop"]
LISTING_PAYS = 16  # from so many pictures in a folder on, one listing replaces a stat per file


class Entry(NamedTuple):
    """A picture as its data set names it.

    Attributes:
        path: of the picture file.
        positive: indices of its labels.
        where: what names it, in words ("line 3 of train.csv"); for messages.
        ignored: indices of labels that are neither there nor absent (label value -1).
    """

    path: str
    positive: tuple[int, ...]
    where: str
    ignored: tuple[int, ...] = ()


class ImageListing(Dataset[tuple[Tensor, Tensor]]):
    """Pictures in files, with labels: the base of every loader, which only has to produce the entries.

    Args:
        title: what the pictures are, in words: it heads :meth:`summary`.
        source: the file (or folder) that lists them; errors name it.
        entries: the pictures, in order.
        classes: the C label names.
        image_size: side of the square that ``self[index]`` resizes to.
        empty_images: what to do with pictures without any label: "keep" (a row of zeros) or "drop".
        missing_images: what to do with pictures whose file is not there: "error" (now, not in the middle of
            an epoch) or "drop".
        note: one more line for :meth:`summary`.

    Attributes:
        paths: of the pictures that were kept.
        positive: their label indices.
        ignored: picture index -> indices of its labels with value -1 (only pictures that have any).
        dropped: reason -> number of pictures left out.

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
        self.title, self.note = title, note
        self.classes = tuple(classes)
        self.image_size = image_size
        self.dropped: dict[str, int] = {}
        listed = list(entries)
        kept = [entry for entry in listed if entry.positive or entry.ignored] if empty_images == "drop" else listed
        self._count_dropped("without a label", len(listed) - len(kept))
        missing = _missing([entry.path for entry in kept])
        if missing and missing_images == "error":
            raise _missing_error([kept[i] for i in missing])
        kept = [entry for i, entry in enumerate(kept) if i not in missing]
        self._count_dropped("whose file is missing", len(missing))
        if not kept:
            raise ImageFileError(
                source, f"no picture is left ({self._dropped_words()})" if listed else "lists no picture"
            )
        self.paths = [entry.path for entry in kept]
        self.positive = [tuple(sorted(set(entry.positive))) for entry in kept]
        self.ignored = {i: entry.ignored for i, entry in enumerate(kept) if entry.ignored}

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self, index: int) -> Tensor:
        """Labels of picture ``index``: float32 [C], 1 there, 0 absent, -1 ignored."""
        labels = torch.zeros(len(self.classes), device="cpu")
        labels[list(self.ignored.get(index % len(self), ()))] = -1.0
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
        return load_rgb(self.paths[index], at_least), self.labels(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture ``index``: (RGB uint8 [3, image_size, image_size], labels float32 [C])."""
        image, labels = self.load(index, 2 * self.image_size)
        return square_tensor(image, self.image_size), labels

    def fingerprint(self) -> str:
        """Changes with the classes, the pictures' paths or the labels (not with what is in the picture files)."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for index, (path, positive) in enumerate(zip(self.paths, self.positive, strict=True)):
            digest.update(f"{path}\0{positive}\0{self.ignored.get(index, ())}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> str:
        """Counts for people: images, labels, class frequencies, what was dropped."""
        counts = Counter(label for positive in self.positive for label in positive)
        sizes = [len(positive) for positive in self.positive]
        head = f"{len(self)} images, {len(self.classes)} labels, {sum(sizes) / len(sizes):.2f} labels an image"
        head += f" (at most {max(sizes)}); {sizes.count(0)} without a label"
        ranked = sorted(range(len(self.classes)), key=lambda c: (-counts[c], c))
        lines = [f"{self.title}: {head}", *_frequency_lines([(self.classes[c], counts[c]) for c in ranked])]
        if self.ignored:
            lines.append(f"ignored: {sum(map(len, self.ignored.values()))} labels of {len(self.ignored)} images")
        if self.dropped:
            lines.append(f"dropped: {self._dropped_words()}")
        if self.note:
            lines.append(self.note)
        return "\n  ".join(lines)

    def _count_dropped(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] = count

    def _dropped_words(self) -> str:
        return ", ".join(f"{count} images {reason}" for reason, count in self.dropped.items())


class NamedListing(ImageListing):
    """Pictures of a list that gives label names a line; subclasses say how a line is read.

    Args:
        path: the list.
        image_size: pictures are resized to this square.
        classes: the label names, in order; default: those that occur, sorted.
        root: folder that relative paths start from; default: the list's own.
        empty_images: "keep" or "drop" pictures without a label.
        missing_images: "error" or "drop" for pictures whose file is not there.

    Raises:
        ImageFileError: the list is missing or empty, one of its lines cannot be read, a picture it names does
            not exist (here), or cannot be decoded (when it is read).
        ValueError: a label that is not among ``classes``.
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
    ) -> None:
        rows = list(self.rows(path))
        if not rows:
            raise ImageFileError(path, "lists no picture")
        if classes is None:
            classes = sorted({name for _, _, names in rows for name in names})
        index = {name: i for i, name in enumerate(classes)}
        folder = os.path.dirname(path) if root is None else os.fspath(root)
        entries = [
            Entry(
                os.path.join(folder, picture),
                label_indices(names, index, path, f"line {number}"),
                f"line {number} of {path}",
            )
            for number, picture, names in rows
        ]
        options = {"empty_images": empty_images, "missing_images": missing_images}
        super().__init__(f"pictures of {path}", path, entries, classes, image_size, **options)  # type: ignore[arg-type]

    @staticmethod
    def rows(path: str | os.PathLike[str]) -> Iterable[tuple[int, str, Sequence[str]]]:
        """(line number, picture, label names) of every picture of the list."""
        raise NotImplementedError


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
    if repeated := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{source}: class {repeated[0]!r} occurs twice")


def _missing(paths: Sequence[str]) -> set[int]:
    """Which of the paths are no files; a folder is listed once instead of asking for each of its files."""
    folders: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        folders.setdefault(os.path.dirname(path), []).append(index)
    missing: set[int] = set()
    for folder, members in folders.items():
        there: set[str] = set()
        if len(members) >= LISTING_PAYS:
            with suppress(OSError):
                there.update(os.listdir(folder or "."))
        # What a listing does not show may still open (file systems that fold case), so it gets its stat.
        missing.update(i for i in members if os.path.basename(paths[i]) not in there and not os.path.isfile(paths[i]))
    return missing


def _missing_error(entries: Sequence[Entry]) -> ImageFileError:
    more = f"; missing with it: {len(entries) - 1} more" if len(entries) > 1 else ""
    return ImageFileError(entries[0].path, f"no such picture file ({entries[0].where}{more})")


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


# -- what the readers of lists share --


def read_lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """The lines of a UTF-8 text file, stripped (so line ends may be CRLF); empty ones at its end are cut off.

    Args:
        path: the file.
        what: what it is, in words, for the message if it is missing.

    Raises:
        ImageFileError: the file is missing, or a line of it is not UTF-8.
    """
    if not os.path.isfile(path):
        raise ImageFileError(path, f"no such {what}")
    lines = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except UnicodeDecodeError as error:
                raise ImageFileError(path, f"line {number}: not UTF-8 ({error.reason})") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_json(
    path: str | os.PathLike[str], what: str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The content of a UTF-8 JSON file.

    Args:
        path: the file.
        what: what it is, in words, for the message if it is missing.
        object_hook: see :func:`json.load`.

    Raises:
        ImageFileError: the file is missing or no JSON; the message says where it ends to be.
    """
    if not os.path.isfile(path):
        raise ImageFileError(path, f"no such {what}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_hook=object_hook)
    except json.JSONDecodeError as error:
        raise ImageFileError(path, f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ImageFileError(path, f"byte {error.start}: not UTF-8 ({error.reason})") from None


def read_class_names(path: str | os.PathLike[str], count: int | None = None) -> tuple[str, ...]:
    """Label names from a file, one a line, in order.

    Args:
        path: the file.
        count: how many there have to be.

    Raises:
        ImageFileError: the file is missing or has another number of names.
    """
    names = tuple(line for line in read_lines(path, "file of class names") if line)
    if count is not None and len(names) != count:
        raise ImageFileError(path, f"expected {count} class names, one a line, got {len(names)}")
    return names


def label_indices(
    names: Iterable[str], index: dict[str, int], source: str | os.PathLike[str], where: str = ""
) -> tuple[int, ...]:
    """Class indices of label names.

    Raises:
        ValueError: a name that is not among the classes; the message names it and the file.
    """
    try:
        return tuple(index[name] for name in names)
    except KeyError as error:
        known = ", ".join(list(index)[:30]) + (", ..." if len(index) > 30 else "")
        at = f"{where}: " if where else ""
        raise ValueError(f"{source}: {at}label {error.args[0]!r} is not one of the classes: {known}") from None
