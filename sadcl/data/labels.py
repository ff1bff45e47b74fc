"""Label names: as cells and class files give them, their order, their indices, and what is wrong with them."""

from __future__ import annotations

import ast
import difflib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from sadcl.data.images import ImageFileError
from sadcl.data.text import alike, identifier, normal, number, read_lines

__all__ = [
    "check_compounds",
    "class_index",
    "class_order",
    "doubts",
    "label_indices",
    "label_separator_of",
    "read_class_names",
    "split_labels",
]

SEPARATOR = ";"
SEPARATORS = ("|", "\t", ",", "/", "+", "&", ":", " ")  # what else people write between labels
IN_WORDS = {"\\t": "\t", "tab": "\t", "space": " ", "": " "}  # a blank hardly survives a command line
# What programs print around a list.
WRAPPED = re.compile(r"(?:frozenset|set|array|list|tuple)\(\s*([\[({].*[\])}])?\s*(?:,\s*dtype=[^)]*)?\)", re.DOTALL)
SETTING = "label_separator (--data.label_separator)"


def label_separator_of(given: str | None) -> str | None:
    """The separator that a setting means (``tab`` and ``space`` in words); None stays None."""
    return None if given is None else IN_WORDS.get(given.strip(" ").lower(), given)


def _word(separator: str) -> str:
    return {"\t": "tab", " ": "space"}.get(separator, repr(separator))


def split_labels(cell: str, separator: str | None) -> tuple[str, ...]:
    """The label names of a cell: ``a;b``, or a list as Python, JSON and numpy print it; separated as told, otherwise.

    Raises:
        ValueError: a list that cannot be read.
    """
    cell = cell.strip()
    if separator is None and (wrapped := WRAPPED.fullmatch(cell)):
        cell = wrapped[1] or "[]"
    if separator is None and cell[:1] + cell[-1:] in ("[]", "()", "{}"):
        quoted = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", cell)  # numpy prints no commas
        try:
            names = ast.literal_eval(quoted)
        except (ValueError, SyntaxError):
            names = None
        if isinstance(names, (list, tuple, set)):
            names = [identifier(name) if isinstance(name, (int, float)) else name for name in names if name is not None]
            if all(isinstance(name, (str, int)) for name in names):
                return tuple(text for name in names if (text := normal(str(name))))
        if cell[0] == "[" and "," in cell:
            raise ValueError(f"labels: expected names, or a list that Python can read, got {cell[:60]}; see {SETTING}")
    return tuple(text for name in cell.split(separator or SEPARATOR) if (text := normal(name)))


def check_compounds(labels: Collection[str], source: str | os.PathLike[str]) -> None:
    """Refuse labels that are several, separated by something else than was assumed.

    A bar or a tab is in no label. Anything else separates if most labels with it fall into parts that are labels
    themselves or parts of others (for a blank, at least one a label: "red car" and "red bus" are names; for a comma
    one such part will do; for both, numbers will), or if the parts are half as many as the labels. Any other sign
    that is neither a letter nor a digit is judged as a blank is.

    Raises:
        ValueError: the message names a label, its parts and the setting.
    """
    for separator in (*SEPARATORS, *_signs(labels)):
        parts = {label: [normal(part) for part in label.split(separator) if part.strip()] for label in labels}
        compounds = [label for label, made_of in parts.items() if len(made_of) > 1]
        if compounds and (label := _separated(separator, parts, compounds)):
            raise ValueError(
                f"{source}: label {label!r} looks like several, {', '.join(map(repr, parts[label]))}; "
                f"set {SETTING} to {_word(separator)}, or to {SEPARATOR!r} if it is one"
            )


def _signs(labels: Iterable[str]) -> list[str]:
    """What else may stand between labels, of what stands in some."""
    signs = {sign for label in labels for sign in label if not (sign.isalnum() or unicodedata.combining(sign))}
    return sorted(signs.difference(SEPARATORS, SEPARATOR))


def _separated(separator: str, parts: dict[str, list[str]], compounds: Sequence[str]) -> str | None:
    """One of the compounds, if they seem to be several labels each."""
    count = Counter(part for made_of in parts.values() for part in set(made_of))
    known = {part for part in count if part in parts or count[part] > 1}
    made = []
    for label in compounds:
        some, whole = not parts.keys().isdisjoint(parts[label]), known.issuperset(parts[label])
        numbers = all(number(part) is not None for part in parts[label])
        if separator == ",":
            several = some or whole or numbers
        elif separator == " ":
            several = (some and whole) or numbers
        else:
            several = whole and (some or separator in SEPARATORS)
        if several:
            made.append(label)
    if separator in "|\t" or 2 * len(made) >= len(compounds) or 2 * len(count) <= len(parts):
        return (made or compounds)[0]
    return None


def class_order(names: Iterable[str]) -> list[str]:
    """Names sorted, by value if all are numbers (0, 1, 2, 10)."""
    names = set(names)
    values = {name: number(name) for name in names}
    if None in values.values():
        return sorted(names)
    return sorted(names, key=lambda name: (values[name], name))


def class_index(classes: Sequence[str], source: str | os.PathLike[str]) -> dict[str, int]:
    """Name in NFC -> index.

    Raises:
        ValueError: a name that occurs twice.
    """
    index: dict[str, int] = {}
    for position, name in enumerate(classes):
        if index.setdefault(normal(name), position) != position:
            raise ValueError(f"{source}: class {name!r} occurs twice")
    return index


def label_indices(
    names: Iterable[str], index: dict[str, int], source: str | os.PathLike[str], where: str = ""
) -> tuple[int, ...]:
    """Class indices of label names; ``index`` is of :func:`class_index`.

    Raises:
        ValueError: a name that is not among the classes; the message names it, the file, and what it resembles.
    """
    try:
        return tuple(index[normal(name)] for name in names)
    except KeyError as error:
        name = error.args[0]
    known = ", ".join(list(index)[:30]) + (", ..." if len(index) > 30 else "")
    at = f"{where}: " if where else ""
    raise ValueError(f"{source}: {at}label {name!r} is not one of the classes: {known}{_resemblance(name, index)}")


def _resemblance(name: str, index: dict[str, int]) -> str:
    for separator in (SEPARATOR, *SEPARATORS, *_signs([name])):
        parts = [normal(part) for part in name.split(separator) if part.strip()]
        if len(parts) > 1 and index.keys() >= set(parts):
            return f"; it is several of them if {SETTING} is {_word(separator)}"
    same = [other for other in index if alike(other) == alike(name)]
    near = same or difflib.get_close_matches(name, index, 1)
    if not near:
        return ""
    return f"; the nearest is {near[0]!r}" if (name + near[0]).isascii() else f"; {name!a} is not {near[0]!a}"


def doubts(classes: Iterable[str]) -> list[str]:
    """Lines about classes that a reader would take for one another, and about one that pandas made of nothing."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[alike(name)].append(name)
    pairs = [" and ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]
    lines = [f"classes that look alike: {', '.join(pairs)}"] if pairs else []
    return lines + [f"class {name!r}: pandas writes that for an empty cell" for name in groups.get("nan", ())]


def read_class_names(path: str | os.PathLike[str], count: int | None = None) -> tuple[str, ...]:
    """Label names from a file, one a line, in order.

    Args:
        path: the file.
        count: how many there have to be.

    Raises:
        ImageFileError: the file is missing or has another number of names.
    """
    names = tuple(normal(line) for line in read_lines(path, "file of class names") if line)
    if count is not None and len(names) != count:
        raise ImageFileError(path, f"expected {count} class names, one a line, got {len(names)}")
    return names
