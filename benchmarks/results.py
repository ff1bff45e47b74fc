"""What a run measured, as JSON: read and written here alone, so that pages, tables and comparisons see one thing."""

from __future__ import annotations

import datetime
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import sadcl
from benchmarks import harness
from benchmarks.harness import Record, Row, Series, Timing
from sadcl import _json
from sadcl.checkpoint import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """One run: where it ran, and what came out.

    Attributes:
        about: date, versions, processor, threads, rates measured in the run.
        rows: work with peers.
        series: tables over something that grows.
    """

    about: dict[str, Any]
    rows: list[Row]
    series: list[Series]

    def title(self) -> str:
        """Where the numbers come from, in a line."""
        a = self.about
        return (
            f"{a['processor']}, {a['threads']} threads, {a['isa']}, torch {a['torch']}, sadcl {a['sadcl']}"
            f"{' at ' + a['commit'] if a['commit'] else ''}, {a['date']}"
        )

    def rates(self) -> str:
        """What the machine could do in that run."""
        return (
            f"float32 FMA peak {self.about['fma_peak'] / 1e9:.0f} GFLOP/s, "
            f"copy {self.about['copy_bandwidth'] / 1e9:.0f} GB/s (512 MB)"
        )


def about() -> dict[str, Any]:
    """Where the figures of this process come from."""
    cpp = sadcl.backends()["cpp"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": _commit(),
        "sadcl": sadcl.__version__,
        "torch": torch.__version__,
        "processor": harness.processor(),
        "threads": torch.get_num_threads(),
        "isa": cpp.detail.partition(" (")[0] if cpp.available else f"no C++ ({cpp.reason})",
        "fma_peak": harness.fma_peak(),
        "copy_bandwidth": harness.copy_bandwidth(),
    }


def _commit() -> str:
    """The checkout's commit, a plus behind it if something was changed since; empty outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def save(record: Record, path: Path) -> None:
    """Write what was recorded so far, whole or not at all."""
    rows, series = ([asdict(part) for part in parts] for parts in (record.rows, record.series))
    content = {"format": FORMAT, "about": about(), "rows": rows, "series": series}
    write_atomically(path, lambda file: file.write(_json.dumps(content, indent=1).encode()))


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: with the path, if it is something else.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this reads {FORMAT}")
        rows = [Row(**{**row, "timings": _timings(row["timings"])}) for row in content["rows"]]
        series = [
            Series(s["name"], s["about"], tuple(s["columns"]), [tuple(line) for line in s["lines"]])
            for s in content["series"]
        ]
        return Results(content["about"], rows, series)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON of python -m benchmarks --report, got {error}") from error


def _timings(entries: dict[str, Any]) -> dict[str, Timing]:
    return {name: Timing(**{**t, "samples": tuple(t["samples"])}) for name, t in entries.items()}
