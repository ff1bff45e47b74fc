"""``python -m benchmarks.gpu_table JSON``: README's GPU table out of what ``make gpu`` wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import roofline
from benchmarks.roofline import Part, Problem

# What the timed row of an op is, counted by the roofline's functions; the COCO shape at 32 images.
COUNTS = {
    "sscl": ("sscl", "sscl backward"),
    "mlc": ("mlc", "mlc backward"),
    "pscl": ("pscl", "pscl backward"),
    "label_attention": ("label_attention", "label_attention backward"),
    "group_classifier": ("group_classifier, both passes",),
    "bank_update": ("bank_update",),
}


def bound(op: str, part: Part) -> float | None:
    """Milliseconds that no version can beat on a part, from its data sheet; None where nothing was counted."""
    names = COUNTS.get(op)
    if names is None:
        return None
    problem = Problem("COCO", 32, 80, 2.9)
    return 1e3 * sum(roofline.OPS[name](problem).seconds(part)[0] for name in names)


def table(content: dict[str, Any]) -> str:
    """Markdown: one line an op, ours beside the best peer, and what was checked.

    Raises:
        ValueError: if nothing was timed on a GPU.
    """
    if content["dry"] or not content["rows"]:
        raise ValueError("expected what make gpu timed on a GPU, got a dry run or no row")
    part = next((p for p in roofline.PARTS if p.name.split()[0] in content["gpu"]), None)
    lines = [
        f"{content['gpu']}; " + ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
        "",
        "| op | shape | ours | best peer | ours is faster by | peak MB, ours and peer | bound by the data sheet |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, shape in dict.fromkeys((row["op"], row["shape"]) for row in content["rows"]):
        here = [row for row in content["rows"] if (row["op"], row["shape"]) == (op, shape)]
        ours = next(row for row in here if row["entry"] == "sadcl")
        peers = [r for r in here if r["median_ms"] and not r["entry"].startswith("sadcl")]
        if ours["median_ms"] is None:
            lines.append(f"| {op} | {shape} | not timed: {ours['error']} | | | | |")
            continue
        best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
        floor = bound(op, part) if part else None
        cells = [op, shape, f"{ours['median_ms']:.3f} ms"]
        if best is not None:
            cells += [
                f"{best['entry']}: {best['median_ms']:.3f} ms", f"{best['median_ms'] / ours['median_ms']:.2f}x",
                f"{ours['peak_mb']:.0f}, {best['peak_mb']:.0f}",
            ]  # fmt: skip
        else:
            cells += ["", "", f"{ours['peak_mb']:.0f}"]
        cells.append(f"{floor:.3f} ms ({floor / ours['median_ms']:.0%} reached)" if floor else "")
        lines.append("| " + " | ".join(cells) + " |")
    states = [f"{name}: {result['state']}" for name, result in content["steps"].items() if not name.startswith("time")]
    return "\n".join([*lines, "", "Checks of the same run: " + ", ".join(states) + "."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_table", description=__doc__)
    parser.add_argument("json", type=Path)
    path = parser.parse_args(arguments).json
    try:
        print(table(json.loads(path.read_text())))
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise SystemExit(f"benchmarks.gpu_table: {path}: {error}") from error


if __name__ == "__main__":
    main()
