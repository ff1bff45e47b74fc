"""Checkpoints: each holds all that evaluation and prediction need; ``last.pt`` also what a resume needs.

A file is what ``torch.save`` writes (any torch loads it), followed by a seal: the SHA-256 of everything before it,
since torch itself does not notice a flipped bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from sadcl._files import mistaken_for_checkpoint, unwrapped
from sadcl._json import dumps
from sadcl.model import SADCL

__all__ = [
    "CannotWrite",
    "CheckpointError",
    "behind",
    "load_checkpoint",
    "make_folder",
    "remove_drafts",
    "restore_model",
    "save_checkpoint",
    "save_weights",
    "thresholds_of",
    "write_atomically",
]

FORMAT = "sadcl-checkpoint"
VERSION = 1
SEAL = b"sadcl-sha256:"  # then the 32 bytes of the digest
SEAL_SIZE = len(SEAL) + 32
DRAFT = ".draft"
WEIGHTS = ".safetensors"
E = TypeVar("E", bound=BaseException)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, damaged, or not one of ours. The message starts with its path."""


class CannotWrite(OSError):
    """A file could not be written (the disk is full, for one); what its path held before is untouched."""

    def __init__(self, path: Path, cause: OSError) -> None:
        hint = "; make room and go on with --resume" if cause.errno in FULL else ""
        super().__init__(f"{path}: cannot be written: {cause.strerror or cause}; what it held before is whole{hint}")
        self.errno = cause.errno


def write_atomically(path: Path, write: Callable[..., Any]) -> None:
    """Call ``write(file)`` on a draft beside ``path`` and move it there once it is on disk.

    Killed at any moment, ``path`` holds either the old content or the new one, whole.

    Raises:
        CannotWrite: the disk is full, or the folder cannot be written to.
    """
    draft = None
    try:
        make_folder(path.parent)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=DRAFT)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        if behind(error, KeyboardInterrupt) is not None:  # torch's writer turns it into an error of its own
            raise KeyboardInterrupt from None
        if isinstance(error, Exception) and (cause := behind(error, OSError)) is not None:
            raise CannotWrite(path, cause) from error
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The error of a kind that is, or led to, another one: what writes or loads may raise one that says nothing."""
    seen: set[int] = set()
    while error is not None and not isinstance(error, kind) and id(error) not in seen:  # they may form a circle
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return error if isinstance(error, kind) else None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there, or a link to one, is left as it is.

    Raises:
        ValueError: a link that leads nowhere, or a file, is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
            raise
    for part in (folder, *folder.parents):
        if part.is_symlink() and not part.exists():
            raise ValueError(f"{part}: a link to {os.readlink(part)}, which is not there; make that folder")
        if part.exists() and not part.is_dir():
            raise ValueError(f"{part}: a file, expected a folder")


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``; nobody else may be writing there."""
    for draft in folder.glob(f".*{DRAFT}"):
        draft.unlink(missing_ok=True)


class _Hashed:
    """A file that is written from start to end, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values) atomically, with its seal."""

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        torch.save({"format": FORMAT, "version": VERSION, "sealed": True, **content}, hashed)  # type: ignore[arg-type]
        file.write(SEAL + hashed.digest.digest())

    write_atomically(path, write)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``, onto the CPU; or what :func:`save_weights` wrote.

    Raises:
        CheckpointError: missing, truncated, damaged, or not written by ``sadcl``.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if what := mistaken_for_checkpoint(path):
        raise CheckpointError(f"{path}: {what}")
    if os.fspath(path).endswith(WEIGHTS):
        return _load_weights(path)
    sealed = _check_seal(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint (truncated or no checkpoint at all): {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of sadcl train")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer sadcl (format {content['version']}, this one reads {VERSION})"
        )
    if content.get("sealed") and not sealed:  # files of the first versions have no seal
        raise CheckpointError(f"{path}: damaged: the checksum at its end is not there")
    return content


def _check_seal(path: str | os.PathLike[str]) -> bool:
    """Whether a file ends in a seal.

    Raises:
        CheckpointError: it does, and the seal belongs to other content.
    """
    digest, left = hashlib.sha256(), os.path.getsize(path) - SEAL_SIZE
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        seal = file.read()
    if not seal.startswith(SEAL):
        return False
    if seal != SEAL + digest.digest():
        raise CheckpointError(f"{path}: damaged: its content does not have the checksum at its end")
    return True


# -- what is in one --


def restore_model(content: dict[str, Any]) -> SADCL:
    """The model of a loaded checkpoint, in eval mode; needs nothing but the checkpoint.

    The weights may be those of a compiled or otherwise wrapped model.
    """
    model = SADCL(**content["architecture"])
    model.load_state_dict(unwrapped(content["model"], model.state_dict()))
    return model.eval()


def thresholds_of(content: dict[str, Any], wanted: float | str) -> Tensor:
    """One threshold per class [C]: the same number for all, or (``"tuned"``) those that the checkpoint holds."""
    classes = content["classes"]
    if not isinstance(wanted, str):
        return torch.full((len(classes),), float(wanted), device="cpu")
    if content.get("thresholds") is None:
        raise ValueError(
            "thresholds: this checkpoint holds no tuned ones (a stage that was not finished, or an older version); "
            "give a number"
        )
    return torch.tensor(content["thresholds"], dtype=torch.float32, device="cpu")


# -- the model alone --


def save_weights(path: Path, content: Mapping[str, Any]) -> None:
    """Write the model of a loaded checkpoint as safetensors; :func:`load_checkpoint` reads it back.

    The file's metadata has two entries: ``sadcl``, the checkpoint's plain values (config, classes, architecture,
    preprocessing, thresholds, ...) as JSON, and ``sha256``, over that and the weights.
    """
    from safetensors.torch import save

    about = {key: value for key, value in content.items() if key not in ("model", "training", "history")}
    text = dumps(about, sort_keys=True)
    model = {name: value.contiguous() for name, value in content["model"].items()}
    data = save(model, {"sadcl": text, "sha256": _digest(text, model)})
    write_atomically(path, lambda file: file.write(data))


def _load_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if "sadcl" not in metadata:
        raise CheckpointError(f"{path}: not written by sadcl export --format safetensors (weights without a model)")
    if metadata.get("sha256") != _digest(metadata["sadcl"], model):
        raise CheckpointError(f"{path}: damaged: its content does not have the checksum in its metadata")
    return {**json.loads(metadata["sadcl"]), "model": model}


def _digest(text: str, model: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(model.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
