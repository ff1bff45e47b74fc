"""Which pictures a run was started on, so that one that goes on can tell whether its lists were edited since."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import torch
from torch import Tensor

from sadcl.data.listing import ImageListing
from sadcl.data.scenes import SceneDataset

__all__ = ["edits", "listed"]

SHOWN = 3  # names in a message


def listed(side: ImageListing | SceneDataset, folder: str | os.PathLike[str] | None) -> Tensor:
    """A side's pictures and labels, compressed: uint8 [bytes], for a checkpoint.

    Args:
        side: the pictures; of scenes, what there is to say of them.
        folder: what the names are relative to, since it may move with its pictures; a name outside stays whole.
    """
    rows: list[Any] = [[side.summary(), [], []]]
    if isinstance(side, ImageListing):
        names = [_relative(path, os.fspath(folder or "")) for path in side.paths]
        labels = enumerate(zip(names, side.positive, strict=True))
        rows = [[name, positive, side.ignored.get(i, ()), side.absent.get(i)] for i, (name, positive) in labels]
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(rows).encode())), dtype=torch.uint8)


def edits(then: Tensor, now: Tensor) -> str:
    """What differs between two sides that :func:`listed` describes, in words; empty if nothing does."""
    before, after = _read(then), _read(now)
    said = [
        _words("is gone", "are gone", [name for name in before if name not in after]),
        _words("is new", "are new", [name for name in after if name not in before]),
        _words("has other labels", "have other labels", [x for x in before if x in after and before[x] != after[x]]),
    ]
    if [name for name in before if name in after] != [name for name in after if name in before]:
        said.append("the order is another")
    return ", ".join(filter(None, said))


def _relative(path: str, folder: str) -> str:
    path, start = os.path.abspath(path), os.path.join(os.path.abspath(folder), "")
    return path.removeprefix(start)


def _read(packed: Tensor) -> dict[str, Any]:
    """Name -> labels, in order."""
    return {name: labels for name, *labels in json.loads(zlib.decompress(packed.numpy().tobytes()))}


def _words(one: str, many: str, names: list[str]) -> str:
    """``3 pictures are gone (a.png, b.png, ...)``."""
    if not names:
        return ""
    shown = ", ".join([name.partition("\n")[0] for name in names[:SHOWN]] + ["..."] * (len(names) > SHOWN))
    return f"{len(names)} picture{'s' if len(names) > 1 else ''} {many if len(names) > 1 else one} ({shown})"
