"""``python -m benchmarks [name ...]``: run the interleaved comparisons, all or those named (``sscl``, ``pscl``)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(names: list[str]) -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"benchmarks: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    for name in names or known:
        importlib.import_module(f"benchmarks.bench_{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
