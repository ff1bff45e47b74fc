"""One process a folder: two runs that write the same checkpoints would destroy both."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sadcl.checkpoint import make_folder

__all__ = ["FolderInUse", "locked"]

NAME = "lock"


class FolderInUse(ValueError):
    """Another process works in this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that works in ``folder``.

    The lock is the operating system's, on the file ``lock``, and belongs to this process: it ends with the process,
    however that ends, and worker processes do not inherit it. A file that a killed run left behind stops nobody, be it
    another user's. Windows, and file systems without locks, have none.

    Raises:
        FolderInUse: another process is at work; the message says which.
        ValueError: the folder cannot be made, or nothing can be written into it.
    """
    make_folder(folder)
    path = folder / NAME
    handle = _acquire(path)
    if handle is None:
        yield
        return
    try:
        with suppress(OSError):  # a full disk: the text is for people only
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """An open file whose lock is ours; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle, ours = _open(path)
        try:  # POSIX's locks: they work over NFS and are not inherited by a fork
            fcntl.lockf(handle, (fcntl.LOCK_EX if ours else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise FolderInUse(
                f"{path.parent}: in use by {holder or 'another process'}; "
                "wait for it, stop it, or choose another --output"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                if ours:
                    return handle
                try:
                    path.unlink()  # nobody holds it: left over
                except OSError:
                    return handle  # not ours to remove, but what we hold keeps others out
        os.close(handle)  # removed between our open and our lock, or by us


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether it can be written to: another user's may only be read, which is enough for a look."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), True
    except PermissionError:
        if not path.exists():
            raise ValueError(f"{path.parent}: nothing can be written into this folder (permission denied)") from None
    try:
        return os.open(path, os.O_RDONLY), False
    except PermissionError:
        raise FolderInUse(
            f"{path}: a lock file of another user, and not readable; if nobody works in this folder, remove it"
        ) from None
