"""``python -m benchmarks.compare A.json B.json``: what became slower or faster from A to B, and what is only noise.

Two runs meet two moods of a machine. So each entry's change is a ratio of medians with an interval (a bootstrap over
the rounds), and what all peers changed by, whose code is the same in both runs, is taken for the machine's doing and
divided out; by how much peers differ among themselves widens every interval. A verdict other than "same" needs the
whole interval beyond the threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Timing
from benchmarks.results import Results, load

DRAWS, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Change:
    """One entry of one row, later over earlier, the machine's own change divided out.

    Attributes:
        row: its name.
        entry: its name.
        ratio: of the medians.
        low: lower end of the interval.
        high: upper end.
        verdict: "slower", "faster" or "same".
    """

    row: str
    entry: str
    ratio: float
    low: float
    high: float
    verdict: str


def changes(before: Results, after: Results, threshold: float = 0.03, ours: str = "sadcl") -> list[Change]:
    """Changes of what is in both, ours only; see the head of this file.

    Args:
        before: the earlier run.
        after: the later run.
        threshold: a change below it is none, however sure.
        ours: the entries that are judged; the others tell what the machine did. An entry of ours under another name
            (``"sadcl, float32"``) is neither.
    """
    earlier = {row.name: row for row in before.rows}
    rng = np.random.default_rng(0)
    logs: dict[tuple[str, str], np.ndarray] = {}
    for row in after.rows:
        if row.name in earlier:
            old = earlier[row.name].timings
            for entry, timing in row.timings.items():
                if entry in old:
                    logs[row.name, entry] = _log_ratios(old[entry], timing, rng)
    peers = np.array([np.median(drawn) for (_, entry), drawn in logs.items() if not entry.startswith(ours)])
    drift = float(np.median(peers)) if peers.size else 0.0
    # A normal's standard deviation from the median distance, so that one odd peer does not hide everything.
    spread = 1.4826 * float(np.median(np.abs(peers - drift))) if peers.size > 2 else 0.0
    found = []
    tail = 50 * (1 - CONFIDENCE)
    for (name, entry), drawn in logs.items():
        if entry != ours:
            continue
        moved = drawn - drift + spread * rng.standard_normal(drawn.size)
        low, middle, high = np.exp(np.percentile(moved, [tail, 50, 100 - tail]))
        verdict = "slower" if low > 1 + threshold else "faster" if high < 1 / (1 + threshold) else "same"
        found.append(Change(name, entry, float(middle), float(low), float(high), verdict))
    return found


def _log_ratios(old: Timing, new: Timing, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap draws of log(median of new / median of old)."""

    def medians(timing: Timing) -> np.ndarray:
        samples = np.array(timing.samples or (timing.fastest, timing.median, timing.slowest))
        return np.median(rng.choice(samples, (DRAWS, samples.size)), axis=1)

    return np.log(medians(new) / medians(old))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something became slower, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.03, help="smallest change that counts (default 0.03)")
    options = parser.parse_args(arguments)
    before, after = load(options.before), load(options.after)
    print(f"before: {before.title()}; {before.rates()}\nafter:  {after.title()}; {after.rates()}\n")
    found = changes(before, after, options.threshold)
    if not found:
        raise SystemExit(f"benchmarks.compare: {options.before} and {options.after} have no row in common")
    width = max(len(change.row) for change in found)
    for c in sorted(found, key=lambda change: -change.ratio):
        print(f"{c.row:{width}s}  {c.ratio:6.3f}x  [{c.low:.3f}, {c.high:.3f}]  {c.verdict}")
    return int(any(change.verdict == "slower" for change in found))


if __name__ == "__main__":
    raise SystemExit(main())
