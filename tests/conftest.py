"""Fixtures that every test file uses."""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Workers share the processors: more threads than those would wait for each other. Before numpy and torch read them.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# inductor takes from its cache what it made for another width of vectors, and computes nonsense.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = f"torchinductor_{os.getuid()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / cache))

import numpy as np
import pytest
import torch

from sadcl._backends import triton_interprets
from sadcl.ops._library import OPS
from tests.here import instruction_sets

# torch starts no more threads than there are processors, whatever OMP_NUM_THREADS says; `make races` wants them.
if "SADCL_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["SADCL_THREADS"]))

# Triton reads the variable when it decorates a kernel, so these tests need a process of their own:
# tests/ops/test_triton.py starts one for each file. By hand: ``TRITON_INTERPRET=1 pytest tests/interpreted``.
# Compiled for a GPU and executed by tests/ptx: ``SADCL_EXECUTE_PTX=1 pytest tests/interpreted``.
collect_ignore = [] if triton_interprets() or os.environ.get("SADCL_EXECUTE_PTX") else ["interpreted"]


# Files of tests/ops that are named after an op (``test_sscl.py``, ``test_cpp_sscl.py``) or one of these hold its tests.
OF_OPS = {*OPS, "bank", "average_precision", "supcon", "bf16", "golden", "safety", "empty", "large_scores", "registry"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of ops on a CPU ``op``: the sanitizers and the wheel's tests take them."""
    for item in items:
        if item.path.parent.name == "ops" and item.path.stem.removeprefix("test_").removeprefix("cpp_") in OF_OPS:
            item.add_marker("op")


def pytest_collection_finish() -> None:
    """What thousands of tests and torch consist of stays: the collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """Triton's interpreter evaluates both sides of a ``where`` in numpy, which warns of the side it discards."""
    with np.errstate(all="ignore" if triton_interprets() else "warn"):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=instruction_sets() or [pytest.param("", marks=pytest.mark.skip(reason="the CPU extension is not built"))]
)
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn."""
    extension = importlib.import_module("sadcl._C")
    before = extension.isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Thread counts, through torch's setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and the pictures it was trained on, made by `sadcl train`; not to be written into."""
    for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
        pytest.importorskip(needed)
    from PIL import Image

    from sadcl.cli import main

    folder = tmp_path_factory.mktemp("trained")
    for number in range(8):
        Image.new("RGB", (64, 48), ((0, 200, 0) if number % 2 else (200, 0, 0))).save(folder / f"{number}.png")
    rows = [f"{number}.png,{'green' if number % 2 else 'red'}\n" for number in range(8)]
    (folder / "list.csv").write_text("".join(rows))
    (folder / "config.yaml").write_text(
        "plots: false\nbatch_size: 4\ncontrol: false\n"
        f"data: {{source: csv, train_csv: {folder}/list.csv, val_csv: {folder}/list.csv, image_size: 64, workers: 0}}\n"
        "model: {backbone: 'timm:test_resnet', pretrained: false, hidden_dim: 8, num_heads: 2, "
        "ffn_dim: 16, proj_dim: 4}\n"
        "step1: {epochs: 1}\nstep2: {epochs: 1}\n"
    )
    assert main(["train", "--config", str(folder / "config.yaml"), "--output", str(folder / "run")]) == 0
    return folder
