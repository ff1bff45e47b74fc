"""`sadcl train` in processes of its own that cost no import: forked from a server that has imported everything."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from sadcl.cli import main
from sadcl.train.config import TrainConfig

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sadcl.commands.train", "sadcl.cli", "timm", "jsonargparse", "PIL"])

Kill = tuple[str, int, str]  # dotted name of a function, which of its calls, "before" or "after"


def start(
    config: TrainConfig,
    *options: str,
    kill: Kill | None = None,
    largest_file: int | None = None,
    processes: int = 1,
    function: Callable[..., int] = main,
) -> list[ForkServerProcess]:
    """Start `sadcl train` with a config; with several processes as torchrun would.

    Args:
        config: what to run.
        options: of the command line, besides the config.
        kill: when to die.
        largest_file: bytes that a file may have.
        processes: how many.
        function: called with the command line instead of sadcl's.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    given = folder.with_name(f"{folder.name}.yaml")
    given.write_text(config.as_yaml())
    arguments = ["train", "--config", str(given), *options]
    return _start(processes, folder, kill, largest_file, function, arguments)


def group(function: Callable[..., int | None], folder: Path, *arguments: Any, processes: int = 2) -> list[int | None]:
    """Call ``function(folder, *arguments)`` in several processes, as torchrun would; exit codes."""
    return finish(_start(processes, folder / "group", None, None, function, folder, *arguments))


def _start(
    processes: int,
    folder: Path,
    kill: Kill | None,
    largest_file: int | None,
    function: Callable[..., int | None],
    *arguments: Any,
) -> list[ForkServerProcess]:
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        said = folder.with_name(f"{folder.name}.{rank}.txt")
        said.unlink(missing_ok=True)
        life = (environment, said, kill, largest_file, function, *arguments)
        started.append(CONTEXT.Process(target=_child, args=life))
        started[-1].start()
    return started


def finish(started: list[ForkServerProcess], seconds: float = 240) -> list[int | None]:
    """Exit codes; what hangs is ended (and has code None)."""
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def run(config: TrainConfig, *options: str, **more: Any) -> list[int | None]:
    """:func:`start` and :func:`finish`."""
    return finish(start(config, *options, **more))


def wait_for(config: TrainConfig, words: str, seconds: float = 120) -> None:
    """Return when the last :func:`start` of a config has printed these words, or too much time has passed."""
    deadline = time.monotonic() + seconds
    while words not in said(config) and time.monotonic() < deadline:
        time.sleep(0.01)


def said(config: TrainConfig, rank: int = 0) -> str:
    """What the last :func:`start` of a config has printed."""
    folder = Path(config.output)
    path = folder.with_name(f"{folder.name}.{rank}.txt")
    return path.read_text() if path.exists() else ""


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested values differ, to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in [*a, *(b.keys() - a.keys())] for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if type(a) is type(b) and a == b else [where]


def _child(
    environment: dict[str, str],
    said: Path,
    kill: Kill | None,
    largest_file: int | None,
    function: Callable[..., int | None],
    *arguments: Any,
) -> None:
    """The life of a process: its own output file, one thread, perhaps a sudden end."""
    gc.freeze()  # what the server has imported stays
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kill is not None:
        _arm(*kill)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(function(*arguments))


def _arm(name: str, count: int, when: str) -> None:
    """Let the ``count``-th call of a function be this process's last deed, or what it does not come to."""
    module, _, rest = name.partition(":")
    *parents, last = rest.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, last), 0

    @functools.wraps(real)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, counted)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
