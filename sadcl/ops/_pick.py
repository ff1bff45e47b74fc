"""Functions that pick the parts of a call's tuples, compiled once an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def compiled(arguments: str, parts: list[str], make: Any = None) -> Callable[..., Any]:
    """A function of ``arguments`` that gives ``make(*parts)``, or the row of them: expressions, as namedtuple makes its
    own. Loops over the fields of a call's tuples would cost a small loss a tenth of its time."""
    return eval(f"lambda {arguments}: {'make' if make else ''}{row(parts)}", {"make": make})


def row(parts: list[str]) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"


def several(output: Any) -> tuple[Any, ...]:
    """What an op returned as a row: nothing, one tensor, or a tuple of them."""
    if output is None:
        return ()
    return (output,) if isinstance(output, Tensor) else tuple(output)
