"""Lines and progress bars for people: in a terminal, a file of any encoding, or a program without a console."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from sadcl.train import distributed

__all__ = ["bar", "say"]


def say(line: str) -> None:
    """Write a line to standard output, above the bars; what its encoding lacks is escaped. No output: nothing."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(line)
    except UnicodeEncodeError as error:
        tqdm.write(line.encode(error.encoding, "backslashreplace").decode(error.encoding))


def bar(iterable: Any = None, **options: Any) -> Any:
    """tqdm's bar on standard error, gone when it is done; none without that, and none of a process that is silent."""
    return tqdm(iterable, leave=False, disable=sys.stderr is None or not distributed.is_main(), **options)
