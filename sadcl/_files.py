"""What comes as a checkpoint though it is none, and the names that wrappers leave in state dicts."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from typing import TypeVar

__all__ = ["mistaken_for_checkpoint", "unwrapped"]

T = TypeVar("T")
# Of torch.compile; of DistributedDataParallel, DataParallel, averages; of FSDP, activation checkpointing, Fabric.
ANYWHERE = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
IN_FRONT = (*ANYWHERE, "model")  # of trainers that hold the model as an attribute
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def unwrapped(state: Mapping[str, T], wanted: Container[str] = ()) -> dict[str, T]:
    """A state dict under the names that the module itself has, however often it, or a part of it, was wrapped.

    Args:
        state: names to values.
        wanted: names that are right as they are.

    Raises:
        ValueError: two names become one.
    """
    found: dict[str, T] = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in ANYWHERE]
        while len(parts) > 1 and parts[0] in IN_FRONT:
            del parts[0]
        plain = name if name in wanted else ".".join(parts) or name
        if plain in found:
            raise ValueError(f"state_dict: several keys are {plain} of a wrapped module, {name} among them")
        if plain != COUNTER:
            found[plain] = value
    return found


def mistaken_for_checkpoint(path: str | os.PathLike[str]) -> str | None:
    """What a file is, in words, if it is what a download or a clone leaves in the place of a checkpoint."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: `git lfs pull` brings it"
    if not head:
        return "an empty file, not a checkpoint"
    if head.startswith(b"<") and b"\0" not in head:
        return "a web page (HTML), not a checkpoint: the download brought a page instead of the file"
    if head.isascii() and " ".join((text := head.decode()).split()).isprintable():
        return f"a text, not a checkpoint: it begins with {text.splitlines()[0][:60]!r}"
    return None
