"""Where a listed picture lies: names as lists write them against names as folders have them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress

from sadcl.data.images import picture_suffixes
from sadcl.data.text import normal

__all__ = ["Folders", "files_stamp"]

LISTING_PAYS = 16  # from so many pictures in a folder on, one listing replaces a stat per file
DRIVE = re.compile(r"(^|/)[A-Za-z]:[\\/]")


class Folders:
    """Folders of pictures, each read at most once."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, bool]] = {}  # folder -> name of a file -> whether it is a link
        self._forms: dict[str, dict[str, str]] = {}  # folder -> name in NFC -> name
        self._stems: dict[str, dict[str, list[str]]] = {}  # folder -> stem of a picture's name in NFC -> names
        self._real: dict[str, str] = {}

    def resolve(self, paths: Sequence[str]) -> list[str | None]:
        """:meth:`find` of each path; a folder with many of them is listed instead of asking for each file."""
        for folder, count in Counter(map(os.path.dirname, paths)).items():
            if count >= LISTING_PAYS:
                self._list(folder)
        return [self.find(path) for path in paths]

    def find(self, path: str) -> str | None:
        """The file that a list means: as written, with / for a backslash, with accents in the form that the folder
        has, and, where the list gives no suffix, the one picture of that name."""
        slashed = path.replace("\\", "/")
        for spelling in dict.fromkeys((path, slashed)):
            if self._is_file(spelling):
                return spelling
        for spelling in dict.fromkeys((path, slashed)):
            form = spelling if spelling.isascii() else self._by_form(spelling)
            if form is not None and self._is_file(form):
                return form
            suffix = os.path.splitext(spelling)[1].lower()
            if suffix not in picture_suffixes() and (found := self.with_suffix(form or spelling)) is not None:
                return found
        return None

    def with_suffix(self, path: str) -> str | None:
        """The picture that is called like this plus a suffix; of several, a JPEG, or none if that does not decide."""
        folder, stem = os.path.split(path)
        names = self._same_stem(folder, stem)
        if len(names) > 1:
            names = [name for name in names if name.lower().endswith((".jpg", ".jpeg"))]
        return os.path.join(folder, names[0]) if len(names) == 1 else None

    def hint(self, path: str) -> str:
        """What to say beside the path of a picture that is not there."""
        if DRIVE.search(path):
            return "; a path of another machine (Windows): list paths relative to the folder of the pictures"
        slashed = path.replace("\\", "/")
        folder, name = os.path.split(slashed)
        near = self._same_stem(folder, os.path.splitext(name)[0]) or self._same_stem(folder, name)
        words = "; tried with / for \\, too" if slashed != path else ""
        return words + (f"; there is {' and '.join(near[:3])}" if near else "")

    def identity(self, path: str) -> str:
        """The same for every name of one file: no ``..``, no links."""
        folder, name = os.path.split(path)
        if self._names.get(folder, {}).get(name, True):  # a link, or a folder that was not listed
            return os.path.realpath(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)

    def _list(self, folder: str) -> dict[str, bool]:
        if folder not in self._names:
            self._names[folder] = {}
            with suppress(OSError), os.scandir(folder or ".") as entries:
                self._names[folder] = {
                    entry.name: entry.is_symlink() for entry in entries if not entry.is_dir(follow_symlinks=False)
                }
        return self._names[folder]

    def _is_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        link = self._names.get(folder, {}).get(name)
        # What a listing does not show may still open (file systems that fold case), so it gets its stat.
        return link is False or os.path.isfile(path)

    def _by_form(self, path: str) -> str | None:
        """The path with every component in the Unicode form that its folder has."""
        folder, name = os.path.split(path)
        if os.path.exists(path) or not name:
            return path
        inside = self._by_form(folder) if folder and folder != path else folder
        if inside is None:
            return None
        if inside not in self._forms:
            self._forms[inside] = {}
            with suppress(OSError):
                self._forms[inside] = {normal(other): other for other in os.listdir(inside or ".")}
        found = self._forms[inside].get(normal(name))
        return None if found is None else os.path.join(inside, found)

    def _same_stem(self, folder: str, stem: str) -> list[str]:
        if folder not in self._stems:
            stems: dict[str, list[str]] = defaultdict(list)
            for name in sorted(self._list(folder)):
                base, suffix = os.path.splitext(name)
                if suffix.lower() in picture_suffixes():
                    stems[normal(base)].append(name)
            self._stems[folder] = dict(stems)
        return self._stems[folder].get(normal(stem), [])


def files_stamp(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Changes when one of the files does: which file a name leads to, its size, or when it was written.

    The time of writing may be set to any other (``cp -p``, ``touch -r``, an archive), that of the last change of the
    file or its name may not: both count. Windows has the first alone.
    """
    digest = hashlib.sha256()
    folders = Folders()
    for path in paths:
        with suppress(OSError):  # what is gone is named by whoever reads it
            state = os.stat(path)
            line = f"{folders.identity(os.fspath(path))}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
