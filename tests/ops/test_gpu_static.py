"""``python -m benchmarks.gpu_static``: what it reads off a compiled kernel, on a few of them."""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks import gpu_static
from benchmarks.gpu_static import examine
from benchmarks.launches import Job, job_of, jobs_of, record
from sadcl.ops import asl, mlc
from sadcl.testing.examples import PUBLISHED, Size


def job(arch: str, name: str) -> Job:
    return next(job for job in jobs_of(arch, False) if job.name == name)


def test_jobs_cross_processes_and_are_told_apart() -> None:
    jobs = list(jobs_of("sm_90", False))
    again = pickle.loads(pickle.dumps(jobs))
    assert [job.fingerprint() for job in again] == [job.fingerprint() for job in jobs]
    other = dataclasses.replace(jobs[0], max_registers=64), dataclasses.replace(jobs[0], arch="sm_100")
    assert len({one.fingerprint() for one in (jobs[0], *other)}) == 3
    names = {job.name for job in jobs}
    assert {kernel.rpartition(".")[2] for kernel in gpu_static.PRODUCTS} <= names


@pytest.mark.parametrize("arch, limit", [("sm_90", None), ("gfx942", None), ("gfx942", 32)])
def test_a_kernel_compiles_for_a_part_that_is_not_here(arch: str, limit: int | None) -> None:
    """A bound on registers is NVIDIA's; AMD's compiler is not asked."""
    result = examine(dataclasses.replace(job(arch, "_asl_backward_kernel"), max_registers=limit))
    assert not result.faults and result.registers > 0 and result.wide > 0 and result.programs > 0


def test_kernels_assign_to_flat_tuples() -> None:
    """Triton 3.6 refuses ``a, (b, c) = ...`` when it hashes a kernel, before anything is compiled."""
    nested = []
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py"):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                targets = [t for n in ast.walk(function) if isinstance(n, ast.Assign) for t in n.targets]
                tuples = [t for t in targets if isinstance(t, ast.Tuple)]
                nested += [f"{path.name}:{t.lineno}" for t in tuples if any(isinstance(e, ast.Tuple) for e in t.elts)]
    assert not nested


def test_spills_are_found() -> None:
    result = examine(dataclasses.replace(job("sm_90", "_pair_maximum_kernel"), max_registers=40))
    assert result.registers <= 40 and result.spilled > 0 and result.faults == (f"spills {result.spilled} bytes",)


STACK = """.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 to, .param .u64 at) {{
  .local .align 4 .b8 depot[64];
  .reg .b64 %d<5>;
  .reg .b32 %r<2>;
  ld.param.u64 %d1, [to];
  ld.param.u64 %d2, [at];
  mov.u64 %d3, depot;
  add.u64 %d4, %d3, %d2;
  mov.u32 %r1, %tid.x;
  {store}
  {load}
  st.global.u32 [%d1], %r1;
  ret;
}}"""


@pytest.mark.parametrize("used", [False, True])
def test_a_stack_that_nothing_uses_is_no_spill(used: bool, tmp_path: Path) -> None:
    import triton

    store, load = ("st.local.u32 [%d4], %r1;", "ld.local.u32 %r1, [depot+8];") if used else ("", "")
    (tmp_path / "a.ptx").write_text(STACK.format(store=store, load=load))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([tool, "-arch=sm_90", tmp_path / "a.ptx", "-o", tmp_path / "a.cubin"], check=True)
    cubin = tmp_path / "a.cubin"
    assert "STACK:64" in gpu_static._cuobjdump("--dump-resource-usage", cubin)
    assert gpu_static.nvidia_usage(cubin.read_bytes())[1] == (64 if used else 0)


def test_results_are_kept_and_faults_end_in_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [job("sm_90", "_asl_backward_kernel"), job("sm_90", "_asl_kernel")]
    log = tmp_path / "log"
    monkeypatch.setattr(sys, "argv", ["gpu_static", "--check", "--arch", "sm_90", "--jobs", "1", "--log", str(log)])
    monkeypatch.setattr(gpu_static, "jobs_of", lambda arch, everything: [*two, two[0]])  # one of them twice
    assert gpu_static.main() == 0 and "2 kernels compiled, 0 faults" in capsys.readouterr().out
    log.write_text(log.read_text().replace('"faults": []', '"faults": ["spills 8 bytes"]'))
    monkeypatch.setattr(gpu_static, "examine", None)  # nothing is compiled again
    assert gpu_static.main() == 1 and "_asl_kernel" in capsys.readouterr().out


@pytest.mark.parametrize("size", [PUBLISHED, Size(32, v=3, c=7, d=33, e=36, length=50, heads=4)], ids=["coco", "odd"])
def test_a_kernel_is_compiled_a_few_times_for_all_batch_sizes(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch of an epoch, or buckets, must not stop for a compiler: no constant follows the batch closely."""
    # Most of the time goes to what portable torch adds to the kernels' gradients, which launches none.
    whole = [launch.name for launch in record("sm_90", torch.float16, dataclasses.replace(size, b=5))]
    monkeypatch.setattr(mlc, "_fill_rare", lambda *_: None)
    monkeypatch.setattr(asl.portable, "rare_gradients", lambda *_: None)
    assert [launch.name for launch in record("sm_90", torch.float16, dataclasses.replace(size, b=5))] == whole
    versions: dict[tuple[str, str, int], set[tuple[object, ...]]] = {}
    for b in range(1, 257):
        calls: collections.Counter[str] = collections.Counter()  # calls with other options are other versions anyway
        for launch in record("sm_90", torch.float16, dataclasses.replace(size, b=b)):
            one = job_of(launch, "sm_90", "")
            name = f"{one.module}.{one.name}"
            versions.setdefault((one.module, one.name, calls[name]), set()).add(one.version())
            calls[name] += 1
    assert {kernel: len(found) for kernel, found in versions.items() if len(found) > 6} == {}
