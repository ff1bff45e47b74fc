"""What belongs to an op, and what of it is missing: docs/architecture.md, "To add an op", as a list."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fuzz
import torch

from benchmarks import roofline
from benchmarks.device import workloads
from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, SMALL, Maker
from sadcl.testing.oracles import ORACLES

ROOT = Path(__file__).resolve().parents[2]

# (op, part) -> why the op has none.
EXEMPT = {
    ("compact", "workload"): "timed within every contrastive loss",
    ("compact", "benchmark"): "timed within every contrastive loss",
    ("label_attention_core", "workload"): "label attention's on a GPU",
    ("label_attention_core", "benchmark"): "label attention's on a GPU",
    ("label_attention_core", "roofline"): "label attention's counts hold its projections too",
    ("label_attention_core", "tests"): "tests/interpreted/test_triton_label_attention.py: it has no CPU kernel",
    ("label_attention_core", "fuzz"): "no CPU kernel; tests/interpreted/test_triton_label_attention.py has its cases",
    ("linear", "workload"): "on a GPU it is torch's product",
    ("linear", "benchmark"): "benchmarks/bench_head.py: it is most of a head's step",
    ("linear", "roofline"): "on a GPU it is torch's product",
    ("group_pscl", "workload"): "it needs several processes",
    ("group_pscl", "roofline"): "docs/scaling.md",
    ("group_pscl", "benchmark"): "benchmarks/bench_group.py",
    ("group_pscl", "tests"): "tests/group",
    ("group_pscl", "fuzz"): "tests/group draws the splits",
    ("group_rows", "workload"): "it needs several processes",
    ("group_rows", "roofline"): "docs/scaling.md",
    ("group_rows", "benchmark"): "benchmarks/bench_group.py",
    ("group_rows", "tests"): "tests/group",
    ("group_rows", "fuzz"): "tests/group draws the splits",
    ("two_way", "tests"): "tests/ops/test_zlpr.py: ZLPR's are its own too",
    ("two_way", "benchmark"): "benchmarks/bench_zlpr.py: both in one table",
    ("dual", "roofline"): "on a GPU it is the two ops",
    **{("dual_mean", part): "dual's, in fewer launches" for part in ("workload", "roofline", "fuzz")},
    **{("asl_total", part): "ASL's, in fewer launches" for part in ("workload", "roofline", "fuzz")},
    **{("sscl_mean", part): "SSCL's, in fewer crossings" for part in ("workload", "roofline", "fuzz")},
    **{("pscl_mean", part): "PSCL's, in fewer crossings" for part in ("workload", "roofline", "fuzz")},
}
# Files are named as an op is; these are older than the rule, or launch what another op has in fewer launches.
FILE = {"bank_update": "bank", "asl_total": "asl", "dual_mean": "dual", "sscl_mean": "sscl", "pscl_mean": "pscl"}
WITHOUT_PORTABLE = ("asl_total", "dual", "dual_mean", "label_attention", "label_attention_core", "linear", "pscl_mean")


def lacks(name: str) -> list[str]:
    """The parts that op ``name`` should have and has not, in the order in which they are written."""
    op, file = OPS[name], FILE.get(name, name)
    missing = []
    if name not in ORACLES:
        missing.append("oracle: an entry in sadcl.testing.oracles.ORACLES")
    if name not in EXAMPLES:
        missing.append("example: an entry in sadcl.testing.examples.EXAMPLES")
    if name not in fuzz.GENERATORS:
        missing.append("fuzz: an entry in tests/fuzz/losses.py or layers.py")
    if not {"torch"} & set(op.backends) and name not in WITHOUT_PORTABLE:
        missing.append(f"portable: sadcl/portable/{file}.py, as the implementation 'torch'")
    if not (list((ROOT / "tests" / "ops").glob(f"test_*{file}.py"))):
        missing.append(f"tests: tests/ops/test_{file}.py")
    if not (ROOT / "benchmarks" / f"bench_{file}.py").exists():
        missing.append(f"benchmark: benchmarks/bench_{file}.py")
    if name not in {work.name for work in workloads(torch.device("cpu"), quick=True)}:
        missing.append("workload: an entry in benchmarks.device.workloads")
    if name not in {row.split(",")[0].removesuffix(" backward") for row in roofline.OPS}:
        missing.append("roofline: a row in benchmarks.roofline.OPS")
    if "triton" in op.backends and name in EXAMPLES and not _launches(name):
        missing.append("launch: none is recorded from its examples, so benchmarks/gpu_static.py compiles nothing")
    return [part for part in missing if (name, part.split(":")[0]) not in EXEMPT]


def _launches(name: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        return True
    from sadcl.kernels import _launch

    with _launch.recording(_launch.PARTS["sm_90"]) as launches:
        for x in EXAMPLES[name](Maker(SMALL, torch.float32, "meta")):
            OPS[name].run(x, "triton")
    return bool(launches)
