"""Process groups for tests: processes that are forked once and then run many functions together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from processes import CONTEXT, _free_port

SECONDS = 120.0  # for one call; a rank that needs longer hangs


class RankError(AssertionError):
    """A rank raised what nobody expected."""


class Ranks:
    """``world`` processes in one gloo group.

    ``run(function, *args)`` calls ``function(rank, *args)`` in each of them (it must be importable) and gives the
    results in rank order. What a rank raises is its result where ``errors`` is true, and fails the test otherwise.
    """

    def __init__(self, world: int, timeout: float = SECONDS) -> None:
        self.world = world
        pipes = [CONTEXT.Pipe() for _ in range(world)]
        self.pipes: list[Connection] = [mine for mine, _ in pipes]
        port = _free_port()
        self.processes = [
            CONTEXT.Process(target=_serve, args=(theirs, rank, world, port, timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any, errors: bool = False) -> list[Any]:
        """Call ``function(rank, *args)`` in every rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results = [_received(process, pipe) for process, pipe in zip(self.processes, self.pipes, strict=True)]
        if not errors:
            for rank, result in enumerate(results):
                if isinstance(result, BaseException):
                    raise RankError(f"rank {rank}: {''.join(result.__notes__)}") from result
        return results

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()


def _received(process: Any, pipe: Connection) -> Any:
    """What a rank answered, or how it ended."""
    ready = wait([pipe, process.sentinel], SECONDS)
    if pipe in ready:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join(10)
    if not ready:
        return _noted(TimeoutError(f"no answer in {SECONDS:g} s"))
    return _noted(ChildProcessError(f"exit code {process.exitcode}"))


def _noted(error: BaseException) -> BaseException:
    error.__notes__ = [f"{type(error).__name__}: {error}"]  # add_note is Python 3.11's
    return error


def _serve(pipe: Connection, rank: int, world: int, port: int, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # without a word to the others
        try:
            result = function(rank, *args)
        except Exception as error:
            kind = type(error) if type(error) in (ValueError, TypeError, RuntimeError) else RuntimeError
            result = kind(str(error))
            result.__notes__ = [traceback.format_exc()]
        pipe.send(result)


_POOLS: dict[int, Ranks] = {}


def ranks(world: int) -> Ranks:
    """The processes of this size, which tests share."""
    if world not in _POOLS:
        _POOLS[world] = Ranks(world)
    return _POOLS[world]


def close_all() -> None:
    """At the end of the tests."""
    while _POOLS:
        _POOLS.popitem()[1].close()


def split_sizes(total: int, world: int, seed: int) -> Sequence[int]:
    """A drawn split of ``total`` images over ranks, some of which often get none."""
    generator = torch.Generator().manual_seed(1000 * world + seed)
    cuts = torch.randint(0, total + 1, (world - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
