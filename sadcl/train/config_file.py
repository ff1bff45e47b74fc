"""Config files as people write them: YAML reads ``amp: off`` as a boolean and ``output: 007`` as a number."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["moved", "with_config_files"]

STRING, NULL, BOOL = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool"))
WORDS = {"false": "off", "no": "off", "off": "off", "true": "on", "yes": "on", "on": "on"}


def with_config_files(arguments: Sequence[str], kind: type) -> list[str]:
    """The arguments with the text of every ``--config FILE`` in the place of its path, mended by the types of ``kind``.

    A value is a string where a string is wanted, whatever else YAML could take it for; a boolean where one of several
    strings is wanted is the choice on or off; a section without content, or a file without any, changes nothing.
    What is no file stays as it is.

    Raises:
        ValueError: a file is no YAML, or does not consist of keys with values; the message names it.
    """
    found: list[str] = []
    for argument, path in _options(arguments):
        if path is None:
            found.append(argument)
        elif not os.path.isfile(path):
            found += ["--config", path]
        elif text := _read(path, kind):
            found += ["--config", text]
    return found


def moved(arguments: Sequence[str], output: str) -> str | None:
    """The folder of a run that the arguments name by its config file alone, if it was moved there from ``output``."""
    if os.path.isfile(os.path.join(output, "last.pt")) or any(one.startswith("--output") for one in arguments):
        return None
    folders = [
        os.path.dirname(path) or "." for _, path in _options(arguments) if path is not None and os.path.isfile(path)
    ]
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, "last.pt"))), None)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each argument, and of ``--config`` its path (``--config FILE`` is one)."""
    given = list(arguments)
    while given:
        argument = given.pop(0)
        option, equals, path = argument.partition("=")
        if option != "--config" or not (equals or given):
            yield argument, None
        else:
            yield option, path if equals else given.pop(0)


def _read(path: str, kind: type) -> str:
    """The text of a file, mended; empty if there is nothing in it."""
    import yaml

    try:
        with open(path, "rb") as file:
            node = yaml.compose(file, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"--config {path}: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if node is None or node.tag == NULL:
        return ""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config {path}: expected lines of `key: value`, got a {node.tag.rpartition(':')[2]}")
    try:
        _mend(node, kind)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    return yaml.serialize(node) if node.value else ""


def _mend(node: Any, kind: Any) -> None:
    """Give the scalars below ``node`` the tags that ``kind`` asks for, and take out sections without content.

    Raises:
        ValueError: a key that stands twice, or a section that is none.
    """
    if is_dataclass(kind) and node.id != "mapping":
        raise ValueError(f"line {node.start_mark.line + 1}: expected keys with values, got {node.value or 'nothing'!r}")
    if node.id == "mapping":
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number] and key.value != "<<":
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} stands there twice")
    if is_dataclass(kind) and node.id == "mapping":
        hints = get_type_hints(kind)
        hints["<<"] = kind  # the keys of another mapping, merged into this one
        node.value = [
            (key, value) for key, value in node.value if not (is_dataclass(hints.get(key.value)) and value.tag == NULL)
        ]
        for key, value in node.value:
            _mend(value, hints.get(key.value))
    elif node.id == "sequence":
        inner = kind if is_dataclass(kind) else (get_args(kind) or (None,))[0]
        for value in node.value:
            _mend(value, inner)
    elif node.id == "scalar" and node.style is None:
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
        if not (choices or str in kinds) or bool in kinds or (node.tag == NULL and type(None) in kinds):
            return
        if node.tag == BOOL and node.value not in choices and WORDS[node.value.lower()] in choices:
            node.value = WORDS[node.value.lower()]
        node.tag, node.style = STRING, '"'
