"""The log of a run: one JSON object a line, and the same numbers for TensorBoard where that is installed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["RunLog", "read_log"]

NAME = "log.jsonl"


class RunLog:
    """Appends to ``log.jsonl`` in a run's folder, a whole line at a time, flushed.

    A line holds ``kind`` ("epoch", "stage", ...), ``step`` (optimizer steps since the run began), ``time`` (seconds
    since 1970) and the values given. NaN and infinities become the strings "nan", "inf", "-inf", so that every line
    is JSON. Numbers also go to TensorBoard as ``kind/name`` (``kind/name/inner`` out of a dict) under
    ``folder/tensorboard``.

    Args:
        folder: of the run.
        tensorboard: mirror numbers if the package is there.
        resume_step: None for a new run, which starts both logs anew; a run that goes on from a checkpoint gives the
            checkpoint's step, and whatever was logged after it (and a line cut short by a kill) is dropped.
    """

    def __init__(
        self, folder: str | os.PathLike[str], tensorboard: bool = True, resume_step: int | None = None
    ) -> None:
        self.path = Path(folder) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [row for row in read_log(self.path) if row["step"] <= resume_step]
        draft = self.path.with_name(f".{NAME}")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(draft, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (until close)
        self._board = _board(Path(folder) / "tensorboard", resume_step) if tensorboard else None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line.

        Args:
            kind: what happened.
            step: optimizer steps since the run began.
            values: numbers, strings, lists, dicts of them.
        """
        row = {"kind": kind, "step": int(step), "time": round(time.time(), 3), **_finite(values)}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self._board is not None:
            for name, value in _numbers(values, kind):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Nothing can be written any more."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole lines of a log, in order; one that a kill cut short is left out. No file: no lines."""
    rows = []
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _board(folder: Path, resume_step: int | None) -> Any:
    """TensorBoard's writer, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if resume_step is None:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        return SummaryWriter(str(folder))
    return SummaryWriter(str(folder), purge_step=resume_step + 1)


def _finite(value: Any) -> Any:
    """The same value with strings for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """(path of the name, number) for every number in nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)
