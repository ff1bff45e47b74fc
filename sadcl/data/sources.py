"""Where the pictures of the composed scenes come from, and which source objects are held out.

Two sources, neither shipped with this package:

* ``photos``: photo cut-outs and photo backgrounds of Debian's ``tuxpaint-stamps-default`` and
``tuxpaint-data``
  (19 labels, 284 objects), installed, or unpacked into the user's cache by ``sadcl fetch``.
* ``emoji``: Twemoji drawings (graphics CC-BY 4.0, Twitter and contributors) of the PyPI package ``augly`` on
photo
  backgrounds of scikit-image and scikit-learn (26 labels, 352 objects).

The label specs (``tuxpaint.json``, ``twemoji.json``) lie beside this file; they name files and hold no
pictures.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Background", "SceneSource", "SourceNotFound", "cache_dir", "find_source", "split_objects"]

VARIANT_SUFFIXES = ("_mirror", "_mirrored", "_left", "_right", "_small_open", "_small_closed")


class SourceNotFound(ValueError):
    """No picture source is installed; the message says how to get one."""


@dataclass(frozen=True)
class Background:
    """A background photo; ``box`` (left, top, right, bottom; fractions) is the part that shows no label."""

    path: Path
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class SceneSource:
    """Everything scenes are composed from.

    Attributes:
        name: ``"photos"`` or ``"emoji"``.
        title: one line for people: what these pictures are.
        labels: the C label names, in order.
        objects: per label, its source objects; an object is a tuple of files (its variants).
        backgrounds: background photos.
        themes: groups of label indices that occur together.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    objects: tuple[tuple[tuple[Path, ...], ...], ...]
    backgrounds: tuple[Background, ...]
    themes: tuple[tuple[int, ...], ...]

    @property
    def num_objects(self) -> int:
        return sum(len(label_objects) for label_objects in self.objects)


def cache_dir() -> Path:
    """``$SADCL_CACHE``, else ``$XDG_CACHE_HOME/sadcl``, else ``~/.cache/sadcl``."""
    own = os.environ.get("SADCL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sadcl"


def find_source(name: str = "auto", root: str | os.PathLike[str] | None = None) -> SceneSource:
    """Find the pictures.

    Args:
        name: ``"photos"``, ``"emoji"``, or ``"auto"`` (photos where they are, else emoji).
        root: explicit folder: for photos the one that holds ``stamps`` and ``templates``, for emoji the one
            that holds ``twemojis/*/*.png``. Default: the places listed in the module docstring.

    Raises:
        SourceNotFound: not there; the message says what to install.
        ValueError: unknown ``name``.
    """
    if name not in ("auto", "photos", "emoji"):
        raise ValueError(f"source: expected one of auto, photos, emoji, got {name!r}")
    if name in ("auto", "photos"):
        photo_roots = [Path(root)] if root else [cache_dir() / "tuxpaint", Path("/usr/share/tuxpaint")]
        for photo_root in photo_roots:
            if (photo_root / "stamps").is_dir() and (photo_root / "templates").is_dir():
                return _photo_source(photo_root)
    if name in ("auto", "emoji"):
        emoji_root = Path(root) if root else _package_folder("augly", "assets")
        if emoji_root is not None and (emoji_root / "twemojis").is_dir():
            return _emoji_source(emoji_root)
    where = f" under {root}" if root else ""
    raise SourceNotFound(
        f"source {name!r}: no pictures found{where}. For the photo cut-outs run `sadcl fetch` "
        "(Debian, Ubuntu: packages tuxpaint-stamps-default and tuxpaint-data); "
        "elsewhere `pip install 'sadcl[emoji]'` brings the drawings"
    )


def split_objects(source: SceneSource, split: str, seed: int = 0, held_out: float = 0.3) -> SceneSource:
    """Keep the training or the validation part of a source: per label, 70 % or 30 % of its objects.

    Objects are split, not files or scenes: all variants of an object land on one side, so do whole
    backgrounds. (Splitting scenes would show the same cut-outs to training and validation and read about
    0.15 mAP too high.)

    Args:
        source: all objects.
        split: ``"train"`` or ``"val"``.
        seed: which of the possible splits.
        held_out: fraction of the objects kept for validation; at least one object a label on either side.
    """
    import numpy as np

    if split not in ("train", "val"):
        raise ValueError(f"split: expected train or val, got {split!r}")

    def part(items: Sequence[Any], stream: int) -> tuple[Any, ...]:
        if len(items) < 2:
            raise ValueError(f"a split needs at least 2 objects, got {len(items)}: {items}")
        order = np.random.default_rng([seed, stream]).permutation(len(items))
        count = min(len(items) - 1, max(1, round(held_out * len(items))))
        chosen = order[:count] if split == "val" else order[count:]
        return tuple(items[i] for i in sorted(chosen))

    objects = tuple(part(label_objects, stream) for stream, label_objects in enumerate(source.objects))
    backgrounds = part(source.backgrounds, len(source.objects))
    return SceneSource(source.name, source.title, source.labels, objects, backgrounds, source.themes)


def _spec(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _package_folder(package: str, *parts: str) -> Path | None:
    """Folder inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *parts)


def _theme_indices(spec: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    index = {label: i for i, label in enumerate(spec["labels"])}
    return tuple(tuple(index[label] for label in theme) for theme in spec["themes"])


def _object_key(path: Path, prefixes: Sequence[str]) -> tuple[Path, str]:
    """Files with the same key show the same object: variants in one folder."""
    stem = path.stem
    for suffix in VARIANT_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return path.parent, next((prefix for prefix in prefixes if stem.startswith(prefix)), stem)


def _photo_source(root: Path) -> SceneSource:
    spec = _spec("tuxpaint.json")
    stamps = root / "stamps"
    objects = []
    for label, patterns in spec["labels"].items():
        dropped = tuple(pattern[1:] for pattern in patterns if pattern.startswith("!"))
        files: set[Path] = set()
        for pattern in patterns:
            if not pattern.startswith("!"):
                files.update(path for path in stamps.glob(pattern) if path.suffix == ".png")
        by_object: dict[tuple[Path, str], list[Path]] = {}
        for path in sorted(files):
            inside = path.relative_to(stamps).as_posix()
            if any(word in inside for word in spec["drop_paths"]) or path.name.startswith(dropped or ("\0",)):
                continue
            by_object.setdefault(_object_key(path, spec["same_object_prefixes"]), []).append(path)
        if len(by_object) < 2:
            raise SourceNotFound(f"{stamps}: expected at least 2 objects of label {label!r}, found {len(by_object)}")
        objects.append(tuple(tuple(files) for files in by_object.values()))
    drop = tuple(spec["drop_backgrounds"])
    templates = sorted(path for path in (root / "templates").glob("*.jpg") if not path.name.startswith(drop))
    if len(templates) < 2:
        raise SourceNotFound(f"{root / 'templates'}: expected at least 2 background photos, found {len(templates)}")
    return SceneSource(
        "photos",
        "composed scenes of real photo cut-outs (Debian package tuxpaint-stamps-default)",
        tuple(spec["labels"]),
        tuple(objects),
        tuple(Background(path) for path in templates),
        _theme_indices(spec),
    )


def _emoji_source(root: Path) -> SceneSource:
    spec = _spec("twemoji.json")
    files = {path.stem: path for path in sorted((root / "twemojis").glob("*/*.png"))}
    objects = []
    for label, names in spec["labels"].items():
        found = tuple((files[name],) for name in names if name in files)
        if len(found) < 2:
            raise SourceNotFound(f"{root}: expected at least 2 drawings of label {label!r}, found {len(found)}")
        objects.append(found)
    folders = {
        "skimage": _package_folder("skimage", "data"),
        "sklearn": _package_folder("sklearn", "datasets", "images"),
    }
    backgrounds = []
    for entry in spec["backgrounds"]:
        folder = folders[entry["package"]]
        if folder is not None and (folder / entry["file"]).is_file():
            backgrounds.append(Background(folder / entry["file"], tuple(entry.get("box", (0.0, 0.0, 1.0, 1.0)))))
    if len(backgrounds) < 2:
        raise SourceNotFound("emoji scenes need background photos: pip install scikit-image scikit-learn")
    return SceneSource(
        "emoji",
        "composed scenes of Twemoji drawings, not photos (CC-BY 4.0, PyPI package augly)",
        tuple(spec["labels"]),
        tuple(objects),
        tuple(backgrounds),
        _theme_indices(spec),
    )
