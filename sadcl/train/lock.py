"""One process a folder: two runs that write the same checkpoints would destroy both."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["FolderInUse", "locked"]

NAME = "lock"


class FolderInUse(ValueError):
    """Another process works in this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that works in ``folder``.

    The lock is the operating system's, on the file ``lock``, and belongs to this process: it ends with the process,
    however that ends, and worker processes do not inherit it. A file that a killed run left behind stops nobody.
    Windows, and file systems without locks, have none.

    Raises:
        FolderInUse: another process is at work; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """An open file whose lock is ours; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX's: works over NFS, is not inherited by a fork
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
                return handle
        os.close(handle)  # its owner removed the file between our open and our lock
