"""``make gpu``: build, check, sanitize and time everything on a machine with a GPU, without a network; one JSON.

Steps run in processes of their own, in this order: ``build`` (into build/gpu, with what is installed: nothing is
fetched, no environment is changed), ``gate DTYPE`` (all at once: every op that Triton or CUDA C++ has, values and
gradients on its examples, against the float64 oracle within its budget), ``memcheck``, ``racecheck`` and ``initcheck``
(the float32 gate under compute-sanitizer, where that is on the PATH), ``time OP`` (``sadcl bench``: gate, then
interleaved rounds against eager torch, torch.compile, SDPA and FlexAttention). What a step gave is in the JSON as soon
as it ends: a run that is stopped, or that ran out of ``--minutes``, goes on where it was, and comes last to what took
too long. On another part, with other versions or other sources all begins again.

``python -m benchmarks.gpu_table JSON`` makes README's table of it. ``--dry`` runs the same script without a GPU:
Triton's interpreter, CUDA C++ executed by tests/ptx, tiny sizes, no sanitizer; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device as bench
from sadcl import _json
from sadcl.checkpoint import write_atomically
from sadcl.cuda import _nvrtc
from sadcl.ops._library import OPS
from sadcl.testing import assert_within_budget, error_budgets
from sadcl.testing.examples import EXAMPLES, SMALL, Maker
from sadcl.testing.oracles import ORACLES

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "gpu" / "lib"  # sadcl.kernels is a package there, in a checkout it is not
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
BACKENDS = ("triton", "cuda")
FAMILY = {"asl_total": "asl", "dual_mean": "dual"}  # fewer launches for what the other op gives
TAIL = 4000  # characters of a step's output that are kept


# -- the gate --


def gate(dtype: torch.dtype, device: torch.device, ops: Sequence[str] = ()) -> int:
    """Hold every op against its oracle; returns how many examples were wrong, each of them printed."""
    wrong: list[str] = []
    backends = BACKENDS
    if _nvrtc.path() is None:
        print("no NVRTC: CUDA C++ is left out")
        backends = ("triton",)
    for backend, name in ((backend, name) for backend in backends for name in sorted(OPS)):
        if backend not in OPS[name].backends or (ops and FAMILY.get(name, name) not in ops):
            continue
        for number, x in enumerate(EXAMPLES[name](Maker(SMALL, dtype))):
            if _has_no_oracle(name, x):
                continue
            try:
                with _running(backend, device):
                    _check(name, x, device, backend)
            except Exception as error:  # compilers have their own
                if isinstance(error, ValueError) and "use 'triton'" in str(error):  # a weighting that CUDA C++ has not
                    print(f"not by {backend}: {name}, example {number}")
                    continue
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                wrong.append(f"WRONG {name} by {backend}, example {number}: {what}")
            else:
                print(f"right {name} by {backend}, example {number}")
    print("\n".join(wrong))  # last: the end of what a step says is kept
    return len(wrong)


def _running(backend: str, device: torch.device) -> Any:
    """Without a GPU Triton's kernels are interpreted, and CUDA C++ is executed as sm_80's PTX."""
    if backend != "cuda" or device.type == "cuda":
        return contextlib.nullcontext()
    from tests.ptx.launching_cuda import executing_cuda

    return executing_cuda()


def _has_no_oracle(name: str, x: Any) -> bool:
    """Unnormalised SSCL is SupCon, whose oracle takes groups; dropout's draws are the kernel's own."""
    return (name == "sscl" and not x.normalize) or (name == "label_attention_core" and x.dropout > 0)


def _check(name: str, x: Any, device: torch.device, backend: str) -> None:
    op = OPS[name]
    moved = type(x)(*(v.to(device, copy=True) if isinstance(v, Tensor) else v for v in x))
    if op.mutates or op.backward is None:
        out = op.run(moved, backend)
        got = (getattr(moved, op.mutates),) if op.mutates else out
        for field, ours, truth in zip(op.outputs._fields or ("slots",), got, ORACLES[name](x), strict=False):
            torch.testing.assert_close(ours.double().cpu(), truth.double(), rtol=1e-6, atol=1e-6, msg=f"{name}.{field}")
        return
    wide = {f: v.double() for f, v in x._asdict().items() if isinstance(v, Tensor) and v.is_floating_point()}
    wanted = [field for field in op.backward.gradients if field in wide]
    results = ORACLES[name](x)[: op.results]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5 for value in results]

    def truth() -> list[Tensor]:
        leaves = {field: wide[field].clone().requires_grad_() for field in wanted}
        values = ORACLES[name](x._replace(**{**wide, **leaves}))[: len(weights)]
        grads = torch.autograd.grad(_total(values, weights), list(leaves.values()), materialize_grads=True)
        return [*(v.detach() for v in values), *grads]

    budgets = error_budgets(truth, x[0].dtype)
    leaves = {field: getattr(moved, field).requires_grad_() for field in wanted}
    values = op(moved._replace(**leaves), backend)[: len(weights)]
    grads = torch.autograd.grad(_total(values, weights), list(leaves.values()), materialize_grads=True)
    fields = (*op.outputs._fields[: len(weights)], *(f"grad_{field}" for field in wanted))
    for field, ours, budget in zip(fields, (*values, *grads), budgets, strict=True):
        assert_within_budget(f"{name}.{field}", ours.detach().cpu(), budget)


def _total(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A number whose gradient asks for every result."""
    total = values[0].new_zeros((), dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        if value.requires_grad and value.numel() > 0:
            total = total + (weight.to(value.device) * value.double()).sum()
    return total


# -- the steps --


@dataclass(frozen=True)
class Step:
    """A process of the run.

    Attributes:
        name: the key in the JSON.
        command: what to run in the checkout.
        why_not: a reason to leave it out.
        share: of the minutes that it may take, while others wait.
    """

    name: str
    command: list[str]
    why_not: str = ""
    share: float = 1.0


def steps(dry: bool, ops: Sequence[str], rows: Path) -> Iterator[Step]:
    """All of them, in their order."""
    python, this = sys.executable, [sys.executable, "-m", "benchmarks.gpu"]
    place = "cpu" if dry else "cuda"
    build = [python, "setup.py", "-q", "build", "--build-base", str(BUILT.parent), "--build-lib", str(BUILT)]
    yield Step("build", build, "a dry run builds nothing" if dry else "")
    chosen = ["--ops", *ops] if ops else []
    for dtype in DTYPES:
        # The interpreter is numpy's, which has no bfloat16.
        why_not = "the interpreter cannot multiply bfloat16" if dry and dtype == "bfloat16" else ""
        yield Step(f"gate {dtype}", [*this, "--gate", dtype, "--on", place, *chosen], why_not)
    tool = shutil.which("compute-sanitizer")
    missing = "a dry run has no GPU" if dry else "" if tool else "compute-sanitizer is not on the PATH"
    for name in SANITIZERS:
        command = [tool or "", "--tool", name, "--error-exitcode", "86", *this, "--gate", "float32", "--on", place]
        yield Step(name, [*command, *chosen], missing, share=0.2)
    names = dict.fromkeys(work.name for work in bench.workloads(torch.device("cpu"), quick=True))
    for name in names:
        if not ops or name in ops:
            quick = ["--quick", "--rounds", "1"] if dry else []
            output = rows / f"{name}.json"
            command = [python, "-m", "benchmarks.device", "--device", place, "--ops", name, "--output", str(output)]
            yield Step(f"time {name}", [*command, *quick])


def where(dry: bool) -> dict[str, Any]:
    """The part, and what drives it."""
    versions = {}
    for package in ("torch", "triton", "pytorch-triton", "sadcl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    top = ("sadcl", "kernels", "csrc", "benchmarks")
    files = sorted(f for name in top for f in (ROOT / name).rglob("*") if f.suffix in (".py", ".cpp", ".h", ".cu"))
    versions["sources"] = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    if dry:
        return {"versions": versions, "gpu": "none: a dry run, interpreted; its times mean nothing"}
    properties = torch.cuda.get_device_properties(0)
    gpu = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 1e9:.0f} GB"
    return {"versions": versions, "gpu": gpu, "cuda": torch.version.cuda}


def run(step: Step, seconds: float, env: dict[str, str], folder: Path) -> dict[str, Any]:
    """The step's result in ``folder``; one that ran out of time has none, and is run again by the next call."""
    if "--tool" in step.command:  # torch's cache of memory would hide what is out of bounds
        env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"state": "out of time", "seconds": round(seconds, 1)}
    finally:  # what it started too: compute-sanitizer's program outlives it
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    state = "passed" if process.returncode == 0 else "failed"
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "output": output[-TAIL:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a step failed or is left, else 0."""
    options = _options(arguments)
    if options.gate:
        return int(gate(DTYPES[options.gate], torch.device(options.on), options.ops) > 0)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("make gpu: torch finds no GPU here; DRY=1 runs the script without one")
    output = options.output.resolve()
    rows = output.parent / "gpu_rows"
    content = _begun(output, options.dry)
    end, left = time.monotonic() + 60 * options.minutes, 0
    for batch in _batches(content, list(steps(options.dry, options.ops, rows))):
        seconds = end - time.monotonic()
        if seconds < 5:
            left += len(batch)
            continue
        made = rows / f"{batch[0].name.removeprefix('time ')}.json"  # what is timed is a batch of its own
        made.unlink(missing_ok=True)
        results = _together(batch, content, seconds, options)
        left += sum(result["state"] == "out of time" for result in results)
        content["steps"] |= {step.name: result for step, result in zip(batch, results, strict=True)}
        if made.is_file():
            timed = json.loads(made.read_text())["rows"]
            content["rows"] = [row for row in content["rows"] if row["op"] != timed[0]["op"]] + timed
        write_atomically(output, lambda file: file.write(_json.dumps(content, indent=1).encode()))
        if batch[0].name == "build" and results[0]["state"] != "passed":
            break  # nothing else runs without it
    return _told(content, left, output)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu.json"), help="JSON (default build/gpu.json)")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop then; the next run goes on (default 8)")
    parser.add_argument("--dry", action="store_true", help="without a GPU: interpreted, tiny")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="only these")
    parser.add_argument("--gate", choices=list(DTYPES), help=argparse.SUPPRESS)
    parser.add_argument("--on", choices=["cpu", "cuda"], default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _begun(output: Path, dry: bool) -> dict[str, Any]:
    """The content of ``output`` if it is of this part and these versions, else that of a run that begins."""
    content = {"format": 1, "dry": dry, **where(dry), "steps": {}, "rows": []}
    if output.is_file():
        known = json.loads(output.read_text())
        if all(known.get(key) == content[key] for key in ("format", "dry", "gpu", "versions")):
            return known
    return content


def _state(content: dict[str, Any], step: Step) -> Any:
    return content["steps"].get(step.name, {}).get("state")


def _batches(content: dict[str, Any], all_steps: Sequence[Step]) -> Iterator[list[Step]]:
    """What has not passed yet: the gates at once, the others alone, last what took too long."""
    pending = [step for step in all_steps if _state(content, step) != "passed"]
    content["steps"] |= {s.name: {"state": "left out", "why": s.why_not} for s in pending if s.why_not}
    pending = sorted((s for s in pending if not s.why_not), key=lambda s: _state(content, s) == "out of time")
    for _, group in itertools.groupby(pending, key=lambda s: "gate" if s.name.startswith("gate ") else s.name):
        yield list(group)


def _together(
    batch: Sequence[Step], content: dict[str, Any], seconds: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Results of steps that run at the same time; those that once took too long may have all ``seconds``."""
    env = dict(os.environ)
    if options.dry:
        env |= {"TRITON_INTERPRET": "1", "SADCL_BACKEND": "triton"}
    else:
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])

    def result_of(step: Step) -> dict[str, Any]:
        again = _state(content, step) == "out of time"
        limit = seconds if again else min(seconds, 60 * options.minutes * step.share)
        return run(step, limit, env, ROOT if options.dry or step.name == "build" else BUILT)

    print(f"{', '.join(step.name for step in batch)} ...", end=" ", flush=True)
    with ThreadPoolExecutor(len(batch)) as pool:
        results = list(pool.map(result_of, batch))
    print(", ".join(f"{result['state']} ({result['seconds']} s)" for result in results), flush=True)
    return results


def _told(content: dict[str, Any], left: int, output: Path) -> int:
    """Say what failed and what is left; what :func:`main` returns."""
    failed = [name for name, result in content["steps"].items() if result["state"] == "failed"]
    for name in failed:
        print(f"\n{name} failed:\n{content['steps'][name]['output']}")
    if left:
        print(f"\n{left} steps are left: run it again, it goes on where it was")
    print(f"\nwritten to {output}; python -m benchmarks.gpu_table {output} makes README's table of it")
    return int(bool(failed) or left > 0)


if __name__ == "__main__":
    raise SystemExit(main())
