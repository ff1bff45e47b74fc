"""Compiled programs on disk: under ``SADCL_CACHE``, else ``~/.cache/sadcl``, in a folder ``cuda``.

A file's name is a hash of all that its content depends on, so none is ever out of date, and no two programs share one.
It is written elsewhere, synchronised and renamed: another process sees all of it or nothing. It begins with its own
checksum: what a full disk or a crash left behind is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from . import _nvrtc

_DIGEST = 32


def folder() -> Path:
    """Where programs are kept."""
    return Path(os.environ.get("SADCL_CACHE") or Path.home() / ".cache" / "sadcl") / "cuda"


def key_of(name: str, defines: Mapping[str, object], target: str) -> str:
    """Hash of what a compilation depends on."""
    parts = (_nvrtc.included(name), sorted((k, str(v)) for k, v in defines.items()), target, _nvrtc.FLAGS,
             _nvrtc.version())  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compiled(name: str, defines: Mapping[str, object], target: str) -> bytes:
    """What :func:`._nvrtc.compile_source` gives, from the disk if it is there."""
    path = folder() / f"{name}-{key_of(name, defines, target)[:32]}.{'ptx' if target[0] == 'c' else 'cubin'}"
    kept = _read(path)
    if kept is None:
        kept = _nvrtc.compile_source(name, defines, target)
        _write(path, kept)
    return kept


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, made = content[:_DIGEST], content[_DIGEST:]
    return made if made and hashlib.sha256(made).digest() == digest else None


def _write(path: Path, made: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            with open(whole, "wb") as file:
                file.write(hashlib.sha256(made).digest() + made)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(path)
    except OSError as error:
        print(f"sadcl: cannot keep a compiled kernel in {path.parent}: {error}", file=sys.stderr)
