"""Lines and progress for people: in a terminal, a file or a pipe of any encoding, or a program without a console."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from sadcl.train import distributed

__all__ = ["Lines", "bar", "say"]

EVERY = 10.0  # seconds between two lines of progress


def say(line: str) -> None:
    """Write a line to standard output, above the bars; what its encoding lacks is escaped. No output: nothing."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(line)
    except UnicodeEncodeError as error:
        tqdm.write(line.encode(error.encoding, "backslashreplace").decode(error.encoding))


def bar(iterable: Any = None, **options: Any) -> Any:
    """Progress on standard error: tqdm's bar in a terminal, gone when it is done; elsewhere :class:`Lines`.

    None without standard error, and none of a process that is silent.
    """
    silent = sys.stderr is None or not distributed.is_main()
    if silent or getattr(sys.stderr, "isatty", bool)():  # a program's own stream may have write() alone
        return tqdm(iterable, leave=False, disable=silent, **options)
    return Lines(iterable, **options)


class Lines:
    """Progress as whole lines, one in :data:`EVERY` seconds; what is done sooner leaves none. Used as tqdm's bar is.

    Args:
        iterable: handed on.
        total: how many there will be; by default the iterable's length.
        initial: how many there are already.
        desc: what is done.
        unit: what is counted.
    """

    def __init__(
        self, iterable: Any = None, total: int | None = None, initial: int = 0, desc: str = "", unit: str = ""
    ) -> None:
        self.iterable, self.desc, self.unit, self.initial, self.n = iterable, desc, unit, initial, initial
        self.total = len(iterable) if total is None else total
        self.began = self.last = time.monotonic()
        self.more = ""

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        """Values that a line ends with."""
        self.more = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.n += count
        now = time.monotonic()
        if now - self.last < EVERY or self.n >= self.total:
            return
        self.last = now
        left = (now - self.began) / (self.n - self.initial) * (self.total - self.n)
        line = f"  {self.desc}: {self.unit} {self.n} of {self.total}, about {left:.0f} s left{self.more}"
        print(line, file=sys.stderr)
