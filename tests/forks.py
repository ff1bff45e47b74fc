"""Processes of their own that cost no import: forked from a server that has imported torch and done nothing else.

Many tests want a new process, and few of them for torch's sake, whose import is seconds of a processor.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run(
    code: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
    imported: Sequence[str] = ("torch",),
) -> subprocess.CompletedProcess[str]:
    """What ``python -c code *arguments`` does and prints, in a process that has imported some modules.

    Args:
        code: run as ``__main__``.
        arguments: of the command line.
        environment: all of it; this process's by default. What Python and the imported modules read of it when they
            start is the server's, this process's.
        cwd: this process's by default.
        timeout: seconds after which the process is ended and ``subprocess.TimeoutExpired`` raised.
        imported: modules that are there from the start.
    """
    environment = dict(os.environ if environment is None else environment)
    command = [sys.executable, "-c", code, *arguments]
    if sys.platform != "linux":
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout)
    server = _server(tuple(imported), environment.get("TRITON_INTERPRET"))
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/out", f"{folder}/err"]
        request = {"code": code, "argv": command[1:2] + command[3:], "environment": environment, "files": files}
        assert server.stdin is not None
        server.stdin.write(json.dumps({**request, "cwd": str(cwd or Path.cwd())}).encode() + b"\n")
        pid = int(_answer(server))
        ended = _answer(server, timeout)
        if not ended:
            os.kill(pid, 9)
            _answer(server)
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess(command, int(ended), out, err)


@functools.cache
def _server(imported: tuple[str, ...], interpreted: str | None) -> subprocess.Popen[bytes]:
    """One for each set of modules; Triton reads how it runs when it is imported."""
    environment = {**os.environ} if interpreted is None else {**os.environ, "TRITON_INTERPRET": interpreted}
    # Without buffers: what waited in one would not be seen by select.
    server = subprocess.Popen(
        [sys.executable, __file__, *imported], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
    )
    atexit.register(server.kill)
    return server


def _answer(server: subprocess.Popen[bytes], timeout: float | None = None) -> bytes:
    """The next line, or nothing after ``timeout`` seconds."""
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    return server.stdout.readline() if ready and server.stdout else b""


def _serve() -> dict[str, Any]:
    """Fork for every line of the input; returns in the child, with what it shall do."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def _become(request: dict[str, Any]) -> dict[str, Any]:
    """Take over a request's folder, environment, files and command line; the names of a new ``__main__``."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, file in enumerate([os.devnull, *request["files"]]):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv[:] = request["argv"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    return vars(sys.modules["__main__"])


if __name__ == "__main__":
    sys.path[0] = ""  # as `python -c` has it, and not this folder
    for name in sys.argv[1:]:
        __import__(name)
    gc.freeze()
    asked = _serve()
    exec(compile(asked["code"], "<string>", "exec"), _become(asked))
