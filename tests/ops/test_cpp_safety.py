"""What a training process does to the CPU kernels: several Python threads at once, forked workers, huge tensors."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from teams import jobs
from torch import Tensor

from sadcl import functional as F
from sadcl.ops._library import OPS
from sadcl.testing import make_features
from tests import forks

_C = pytest.importorskip("sadcl._C", reason="the CPU extension is not built")

NAMES = tuple(jobs())


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_LINEAR", "cpp")


def test_every_op_is_a_job() -> None:
    """But for the one that runs another's kernel between its collectives."""
    ours = {name.removesuffix("_update") for name, op in OPS.items() if "cpp" in op.backends}
    assert ours - {"group_pscl"} <= {name.split("-")[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_several_python_threads_at_once(name: str) -> None:
    want = jobs()[name]()
    failures: list[str] = []
    start = threading.Barrier(4)

    def work() -> None:
        run = jobs()[name]
        start.wait()
        for _ in range(8):
            if not all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(run(), want, strict=True)):
                failures.append(name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _sums() -> dict[str, list[float]]:
    return {name: [float(t.double().sum()) for t in run()] for name, run in jobs().items()}


def _in_child(queue: multiprocessing.Queue[dict[str, list[float]]]) -> None:
    torch.set_num_threads(1)  # torch's own regions, as a DataLoader worker does
    torch.get_num_threads = lambda: 3  # ours must not need it
    queue.put(_sums())


def after_fork() -> None:
    """Every job in this process, then in a child of it."""
    want = _sums()
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[dict[str, list[float]]] = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        for name, sums in queue.get(timeout=120).items():
            assert sums == pytest.approx(want[name], rel=1e-4, abs=1e-4, nan_ok=True), name
    finally:
        child.join(10)
        child.kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork() -> None:
    """The parent's thread pool does not exist in the child: a parallel region there would wait forever.

    From a process that has compiled nothing: torch.compile starts threads of the autograd engine, which refuses forks.
    """
    code = "import sys; sys.path[:] = sys.argv[1:]; import test_cpp_safety; test_cpp_safety.after_fork()"
    done = forks.run(code, str(Path(__file__).parent), *sys.path, timeout=200)
    assert done.returncode == 0, done.stderr


# Their blocks are as many as keep the threads busy.
FOLLOW_THREADS = {"sscl-blocks", "mlc", "mlc-batch", "mlc-queue", "mlc-classes", "group_rows"}


def bits(threads: int) -> dict[str, list[bytes]]:
    """Every job's results as they lie in memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {name: [t.numpy().tobytes() for t in run()] for name, run in jobs().items()}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_what_bits_depend_on(isa: str) -> None:
    """On build, instruction set and, for large contrastive losses, the number of threads; not on run or address."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        alone, several = bits(1), bits(3)
        shifted = torch.empty(5)  # the next allocations lie elsewhere
        assert bits(1) == alone and bits(3) == several and shifted.numel() == 5
        assert {name for name in alone if several[name] != alone[name]} <= FOLLOW_THREADS
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_team_of_any_size_gives_what_one_thread_gives(name: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    got = {}
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            got[threads] = jobs(dtype)[name]()
    finally:
        torch.set_num_threads(before)
    rounding = max(4 * torch.finfo(dtype).eps, 1e-12) if name in FOLLOW_THREADS else 0.0
    for threads in (3, 8):
        for mine, alone in zip(got[threads], got[1], strict=True):
            size = float(alone.double().nan_to_num().abs().max())
            torch.testing.assert_close(mine, alone, rtol=0, atol=rounding * size, equal_nan=True)


def test_a_wrong_instruction_set_is_an_error_and_not_another_backend() -> None:
    """What would have run on the extension says so; asked for by name, the others work; so does `sadcl doctor`."""
    code = """
import torch
from sadcl import cli, functional as F, metrics
x, y = torch.randn(4, 3, 2), torch.ones(4, 3)
for run in (
    lambda: F.sample_contrastive_loss(x, y),
    lambda: F.sample_contrastive_loss(x, y, backend="cpp"),
    lambda: metrics.average_precision(x[..., 0], y),
):
    try:
        print("no error:", run())
    except ValueError as error:
        print(error)
print(F.sample_contrastive_loss(x, y, backend="torch").isfinite().item(), cli.main(["doctor"]))
"""
    message = f"SADCL_CPU_ISA: expected one of {', '.join(_C.supported_isas())}, got 'avx521'"
    environment = {**os.environ, "SADCL_CPU_ISA": "avx521", "SADCL_BACKEND": ""}
    lines = forks.run(code, environment=environment).stdout.splitlines()
    assert lines[:3] == [message] * 3
    assert lines[-1] == "True 0" and any(line.split()[:2] == ["cpp", "no"] and message in line for line in lines)


@pytest.mark.parametrize("missing", sorted({*_C.build_info()["isas"]} - {*_C.supported_isas()}) or [None])
def test_an_instruction_set_that_this_processor_lacks(missing: str | None) -> None:
    if missing is None:
        pytest.skip("this processor runs every instruction set of the build")
    with pytest.raises(ValueError, match=f"expected one of .*, got '{missing}' \\(which this processor cannot run\\)"):
        _C.set_isa(missing)


@pytest.mark.parametrize(
    "address, shape, strides, message",
    [
        (0, (2, 3), (3, 1), r"expected an address, got null for shape \[2, 3\]"),
        (64, (2, -3), (3, 1), r"expected no negative size, got shape \[2, -3\]"),
        (64, (1 << 40, 1 << 40), (1, 1), "sizes and strides that memory can have"),
        (64, (1 << 40, 1 << 40, 0), (1, 1, 1), "sizes and strides that memory can have"),
        (64, (3, 2), (1 << 62, 1), "sizes and strides that memory can have"),
        (64, (3, 2), (-(1 << 63), 1), "sizes and strides that memory can have"),
        (64, (3, 2), (1,), "as many strides as sizes"),
        (64, (1,) * 7, (1,) * 7, "at most 6 dimensions"),
    ],
)
def test_arrays_that_cannot_be(address: int, shape: tuple[int, ...], strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Array: .*{message}"):
        _C.Array(address, 0, shape, strides)
    with pytest.raises(ValueError, match="^Array: unknown dtype code 9"):
        _C.Array(64, 9, (1,), (1,))


def test_arrays_without_elements_need_no_address() -> None:
    _C.Array(0, 0, (3, 0), (1, 1))
    _C.Array(64, 0, (1 << 40, 3), (0, 1))  # expanded


@pytest.mark.slow
def test_offsets_past_two_to_the_31() -> None:
    """2.3e9 bfloat16 elements, 4.6 GB and as much gradient: offsets past 32 bits are read and written."""
    b, c, d = 2250, 1000, 1024
    features = torch.zeros(b, c, d, dtype=torch.bfloat16)
    labels = torch.zeros(b, c)
    rows = [(0, 0), (1, 0), (2, 999), (b - 3, 0), (b - 2, 999), (b - 1, 999)]
    small, small_labels = torch.zeros(len(rows), 2, d, dtype=torch.bfloat16), torch.zeros(len(rows), 2)
    values = make_features(len(rows), 1, d)[:, 0].bfloat16()
    for i, (image, label) in enumerate(rows):
        features[image, label] = small[i, int(label > 0)] = values[i]
        labels[image, label] = small_labels[i, int(label > 0)] = 1
    assert (b - 1) * c * d > 2**31

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.requires_grad_()
        sample = F.sample_contrastive_loss(leaf, y, backend="cpp")
        (grad,) = torch.autograd.grad(sample, leaf)
        return sample.detach(), grad

    got, want = run(features, labels), run(small, small_labels)
    torch.testing.assert_close(got[0], want[0])
    for i, (image, label) in enumerate(rows):
        torch.testing.assert_close(got[1][image, label], want[1][i, int(label > 0)])
    others = got[1].flatten(0, 1).any(dim=1)
    assert others.sum() == len(rows)  # nothing was written anywhere else
