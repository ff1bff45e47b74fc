"""``sadcl bench [--device cuda]``: every op on one device, against eager torch, torch.compile and the dense form.

Each entry's value and gradients are first compared with the float64 oracle; what is wrong is named, not timed, and
makes the command end with 1. Then rounds in which every entry runs once: on a GPU between two events, the L2 cache
flushed before; on a CPU by the clock (``benchmarks.harness``). Medians, peak memory beyond the inputs, one JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sadcl
from benchmarks import (
    bench_asl,
    bench_bank,
    bench_dual,
    bench_group_classifier,
    bench_label_attention,
    bench_mlc,
    bench_pscl,
    bench_sscl,
    bench_supcon,
    bench_zlpr,
    harness,
)
from sadcl import functional as F
from sadcl import reference
from sadcl.bank import MemoryBank
from sadcl.functional.group_classifier import group_classifier
from sadcl.reference.label_attention import label_attention as attention_oracle
from sadcl.testing import Shape, make_features, make_labels

Function = Callable[..., Any]
L2_BYTES = 256 << 20  # larger than any part's last-level cache


@dataclass(frozen=True)
class Workload:
    """One op at one size.

    Attributes:
        name: of the op.
        shape: in words.
        inputs: what the entries are called with; the first ``differentiable`` of them get gradients.
        differentiable: how many.
        oracle: the float64 truth, called with the same inputs.
        entries: the ways to compute it; ``"sadcl"`` is ours.
        parameters: of an entry, those of its module, which get gradients too; under ``"oracle"`` the oracle's.
    """

    name: str
    shape: str
    inputs: tuple[Any, ...]
    differentiable: int
    oracle: Function
    entries: dict[str, Function]
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class Row:
    """What was measured of one entry; ``error`` says why it was not timed."""

    op: str
    shape: str
    entry: str
    backend: str
    median_ms: float | None = None
    fastest_ms: float | None = None
    peak_mb: float | None = None
    error: str | None = None


def workloads(device: torch.device, quick: bool = False) -> list[Workload]:
    """Every op at its published size (``quick``: at a size for tests)."""

    def move(*inputs: Any) -> tuple[Any, ...]:
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)

    result = []

    def sscl(shape: Shape, entries: dict[str, Function]) -> None:
        inputs = move(*bench_sscl.Case(shape).problem())
        oracle = lambda x, y: F.sample_contrastive_loss(x, y, backend="reference")  # noqa: E731
        result.append(Workload("sscl", str(shape), inputs, 1, oracle, entries))

    coco = Shape(6, 2, 8, 32) if quick else bench_sscl.COCO
    sscl(coco, bench_sscl.ENTRIES)
    if not quick:
        no_dense = {k: f for k, f in bench_sscl.ENTRIES.items() if k not in ("dense N x N", "sadcl torch")}
        sscl(Shape(64, 2, 500, 1024, labels_per_image=14), no_dense)  # Visual Genome 500

    b, c, d = coco.b, coco.c, coco.d
    labels = make_labels(b, c)
    x, p = make_features(b, c, d), make_features(c, d, seed=5)
    contrast = lambda x, p, y: F.prototype_contrastive_loss(x, p, y, backend="reference")  # noqa: E731
    result.append(Workload("pscl", f"[{b}, {c}, {d}]", move(x, p, labels), 2, contrast, bench_pscl.ENTRIES))

    both = bench_dual.torch_form(
        lambda x, y: F.sample_contrastive_loss(x, y, backend="reference"),
        lambda x, p, y: F.prototype_contrastive_loss(x, p, y, backend="reference"),
    )
    views = move(x, make_features(b, c, d, seed=3), p, labels)
    result.append(Workload("dual", str(coco), views, 3, both, bench_dual.ENTRIES))

    rows, many = (8, 100) if quick else (bench_asl.BATCH, bench_asl.CLASSES)
    logits = 2 * torch.randn(rows, many, generator=torch.Generator().manual_seed(0)) - 2
    wanted = lambda x, y: F.asymmetric_loss(x.double(), y, backend="reference")  # noqa: E731
    soft = move(logits, make_labels(rows, many, labels_per_image=6.0))
    result.append(Workload("asl", f"[{rows}, {many}]", soft, 1, wanted, bench_asl.ENTRIES))

    logits = move(*bench_zlpr.problem(*(8, 100) if quick else ()))
    for name, loss in (("zlpr", F.zlpr_loss), ("two_way", F.two_way_loss)):
        exact = lambda x, y, f=loss: f(x.double(), y, backend="reference")  # noqa: E731
        result.append(Workload(name, f"{list(logits[0].shape)}", logits, 1, exact, bench_zlpr.ENTRIES[name]))

    for size, weightings in bench_mlc.PROBLEMS.items():
        checked = bench_mlc.CHECKED[1 if size.k else 0] if quick else size
        result += [_mlc(checked, weighting, move) for weighting in weightings]

    single = move(*(t[:64] for t in bench_supcon.problem())) if quick else move(*bench_supcon.problem())
    truth = lambda x, y: F.supcon_loss(  # noqa: E731
        x[:, None], y, temperature=bench_supcon.TEMPERATURE, base_temperature=None, backend="reference"
    )
    ours_and_plain = {k: f for k, f in bench_supcon.ENTRIES.items() if k != "pytorch-metric-learning"}
    result.append(Workload("supcon", f"{list(single[0].shape)}", single, 1, truth, ours_and_plain))

    case = bench_label_attention.Case(8, True, 2, 9, 32, 4) if quick else bench_label_attention.CASES["coco"]
    result.append(_attention(case, device))

    wide = Shape(6, 1, 8, 32) if quick else Shape(32, 1, 80, 2048)
    result.append(_classifier(wide, move))
    result.append(_bank(wide, device))
    return result


def _mlc(size: bench_mlc.Problem, weighting: str, move: Callable[..., tuple[Any, ...]]) -> Workload:
    """The oracle walks over anchors; the dense formula in float64 is the truth here."""
    entries = {name: partial(_last, entry, weighting) for name, entry in bench_mlc.ENTRIES.items()}

    def oracle(x: Tensor, *rest: Tensor | None) -> Tensor:
        return bench_mlc.dense(x.double(), *(None if t is None else t.double() for t in rest), weighting)  # type: ignore[arg-type,misc]

    return Workload("mlc", f"{size} {weighting}", move(*size.parts()), 1, oracle, entries)


def _last(function: Function, last: Any, *inputs: Any) -> Any:
    return function(*inputs, last)


def _attention(case: bench_label_attention.Case, device: torch.device) -> Workload:
    block = bench_label_attention.Block(case)
    for module in (block.ours, block.mha):
        module.to(device)
    known = {name: block.entries()[name] for name in ("nn.MultiheadAttention", "SDPA", "sadcl")}
    parameters = {name: list(module.parameters()) for name, (module, _) in known.items()}
    inputs = tuple(t.to(device) for t in (block.query, block.memory, block.pos))
    wide = [p.detach().double().requires_grad_() for p in block.ours.parameters()]

    def oracle(query: Tensor, memory: Tensor, pos: Tensor) -> Tensor:
        q, m, s = query.double(), memory.double(), pos.double()
        return attention_oracle(q, m, *wide, case.heads, memory_pos=s)[0].float()

    entries = {name: entry for name, (_, entry) in known.items()}
    if device.type == "cuda":
        entries["FlexAttention"], parameters["FlexAttention"] = block.flex, parameters["SDPA"]
    return Workload("label_attention", str(case), inputs, 2, oracle, entries, {**parameters, "oracle": wide})


def _classifier(s: Shape, move: Callable[..., tuple[Any, ...]]) -> Workload:
    x, w = make_features(s.b, s.c, s.d), make_features(s.c, s.d, seed=3) / s.d**0.5
    entries = {k: f for k, f in bench_group_classifier.ENTRIES.items() if k != "sadcl"}
    inputs = move(x, w, torch.zeros(s.c))
    entries["sadcl"] = partial(group_classifier, backend="cpp" if inputs[0].device.type == "cpu" else "triton")
    oracle = lambda *t: reference.group_classifier(*t).float()  # noqa: E731
    return Workload("group_classifier", f"[{s.b}, {s.c}, {s.d}]", inputs, 3, oracle, entries)


def _bank(s: Shape, device: torch.device) -> Workload:
    """The update is in place: entries work on a bank of their own and return its slots."""
    labels = make_labels(s.b, s.c)
    scores = 4 * labels + torch.randn(s.b, s.c, generator=torch.Generator().manual_seed(0))
    inputs = tuple(t.to(device) for t in (make_features(s.b, s.c, s.d), scores, labels))
    start = MemoryBank(s.b, s.c, s.d).slots.to(device)

    def own(update: Function) -> Function:
        bank = MemoryBank(s.b, s.c, s.d).to(device)

        def run(*arguments: Tensor) -> Tensor:
            update(bank, *arguments)
            return bank.slots

        return run

    oracle = lambda *t: reference.bank_update(start, *t, bench_bank.THRESHOLD, False)  # noqa: E731
    entries = {name: own(update) for name, update in bench_bank.ENTRIES.items()}
    return Workload("bank_update", f"[{s.b}, {s.c}, {s.d}]", inputs, 0, oracle, entries)


def step(work: Workload, name: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and backward where the op has one, with a fixed upstream gradient, of an entry or ``"oracle"``."""
    function = work.oracle if name == "oracle" else work.entries[name]
    if work.differentiable == 0:
        return lambda: (function(*work.inputs),)
    leaves = [t.detach().requires_grad_() for t in work.inputs[: work.differentiable]]
    wanted = [*leaves, *work.parameters.get(name, [])]
    rest = work.inputs[work.differentiable :]
    upstream: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        value = function(*leaves, *rest)
        if not upstream:
            generator = torch.Generator().manual_seed(1)
            upstream.append(torch.rand(value.shape, generator=generator).to(value) + 0.5)
        return value.detach(), *torch.autograd.grad(value, wanted, upstream[0])

    return run


def check(work: Workload, name: str, want: Sequence[Tensor]) -> None:
    """Raise AssertionError unless value and gradients are the oracle's, to 1e-4 of the largest entry."""
    for got, truth in zip(step(work, name)(), want, strict=True):
        size = float(truth.double().abs().max())
        torch.testing.assert_close(got.double(), truth.double(), rtol=1e-3, atol=1e-4 * max(size, 1e-30))


def time_cuda(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, harness.Timing]:
    """Interleaved, each run between two events after the L2 cache was overwritten."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-5, rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if number >= 0:
                samples[name].append(start.elapsed_time(end))
    return {name: harness.Timing.of(s) for name, s in samples.items()}


def peak(run: Callable[[], object], device: torch.device) -> float:
    """Megabytes that one run needs beyond what is there already."""
    if device.type == "cpu":
        return harness.peak_memory(run) / 1e6
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(work: Workload, device: torch.device, rounds: int) -> list[Row]:
    """Gate, then time, every entry of one workload."""
    backend = "triton" if device.type == "cuda" else "cpp"
    rows = {name: Row(work.name, work.shape, name, backend if name == "sadcl" else "") for name in work.entries}
    want = step(work, "oracle")()
    runs = {}
    for name in work.entries:
        try:
            check(work, name, want)
        except (AssertionError, RuntimeError) as error:  # wrong, out of memory, or not able to run here
            rows[name].error = " ".join(str(error).split())[:300]
        else:
            runs[name] = step(work, name)
    del want
    timings = time_cuda(runs, rounds) if device.type == "cuda" else harness.interleave(runs, rounds, slow_every=1)
    for name, timing in timings.items():
        rows[name].median_ms, rows[name].fastest_ms = round(timing.median, 4), round(timing.fastest, 4)
        rows[name].peak_mb = round(peak(runs[name], device), 3)
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line an entry, the ratio to ours beside it."""
    ours = {(r.op, r.shape): r.median_ms for r in rows if r.entry == "sadcl"}
    lines = ["| op | shape | entry | median ms | / sadcl | peak MB |", "|---|---|---|---|---|---|"]
    for r in rows:
        base = ours.get((r.op, r.shape))
        ratio = f"{r.median_ms / base:.2f}" if r.median_ms and base else ""
        time = f"{r.median_ms:.3f}" if r.median_ms is not None else f"not timed: {r.error}"
        memory = f"{r.peak_mb:.1f}" if r.peak_mb is not None else ""
        lines.append(f"| {r.op} | {r.shape} | {r.entry} | {time} | {ratio} | {memory} |")
    return "\n".join(lines)


def about(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    where: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sadcl": sadcl.__version__,
        "torch": torch.__version__,
        "backends": {name: info.detail or info.reason for name, info in sadcl.backends().items()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where["device"] = {"name": properties.name, "capability": f"sm_{properties.major}{properties.minor}"}
        where["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        where["device"] = harness.machine()
    return where


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if an entry of ours was wrong, else 0."""
    parser = argparse.ArgumentParser(prog="sadcl bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these, e.g. sscl asl")
    parser.add_argument("--rounds", type=int, default=30, help="rounds to keep (default 30)")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="JSON file (default bench.json)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    device = torch.device(options.device)
    chosen = workloads(device, options.quick)
    names = list(dict.fromkeys(w.name for w in chosen))
    if unknown := sorted(set(options.ops or ()) - set(names)):
        raise ValueError(f"--ops: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    rows: list[Row] = []
    for work in chosen:
        if options.ops and work.name not in options.ops:
            continue
        print(f"{work.name}, {work.shape} ...", flush=True)
        rows += measure(work, device, options.rounds)
    content = {"about": about(device), "rows": [asdict(row) for row in rows]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1))
    print("\n" + table(rows) + f"\n\nwritten to {options.output}")
    return int(any(row.error for row in rows if row.entry == "sadcl"))


if __name__ == "__main__":
    raise SystemExit(main())
