"""``python -m benchmarks [name ...] [--quick] [--report FOLDER]``: the interleaved comparisons, all or those named.

Names are benches (``sscl``, ``pscl``, ...). ``--report`` also measures peak memory, and writes into the folder
``benchmarks.json`` (every sample; ``python -m benchmarks.compare A B`` compares two of them), ``report.html`` (one file
that needs nothing else) and its pictures as PNG.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path

from benchmarks import harness, results

# What --quick runs, and which cases of it: the rows that benchmarks.targets prints. None: all of the bench.
QUICK: dict[str, tuple[object, ...] | None] = {
    "label_attention": ("coco", "vg500", "coco bfloat16"),
    "sscl": ("coco", "tiny", "large", "bfloat16"),
    "pscl": None,
    "dual": None,
    "asl": None,
    "linear": None,
    "head": (8,),
    "supcon": None,
    "mlc": ("any", "queue"),
    "average_precision": None,
}

PEERS = ("pytorch_metric_learning", "sklearn", "timm", "torchmetrics")


def main(arguments: list[str] | None = None) -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(known)}")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write JSON, page and pictures there")
    parser.add_argument("--quick", action="store_true", help="README's rows alone, at most 3 rounds of what takes long")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(known)):
        raise SystemExit(f"benchmarks: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    if absent := [name for name in PEERS if importlib.util.find_spec(name) is None]:
        print(f"peers that are not installed are left out: {', '.join(absent)} (the extra bench brings them)")
    harness.RECORD.memory = options.report is not None and Path("/proc/self/clear_refs").exists()
    harness.RECORD.quick = options.quick
    for name in options.names or (QUICK if options.quick else known):
        cases = QUICK.get(name) if options.quick else None
        importlib.import_module(f"benchmarks.bench_{name}").main(*([] if cases is None else [cases]))
        if options.report is not None:  # after each, so that a run that is stopped leaves what it had
            results.save(harness.RECORD, options.report / "benchmarks.json")
    if options.report is not None:
        from benchmarks import report

        report.write(results.load(options.report / "benchmarks.json"), options.report)
        print(f"\nwritten to {options.report / 'report.html'}")


if __name__ == "__main__":
    main()
