"""The CPU extension's compaction, exponential and door, called through their bindings."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sscl_bindings import _C, compact, make
from torch import Tensor

from sadcl.ops._native import DTYPE_CODES, array


@pytest.mark.parametrize("dtype,low", [(torch.float32, -126.0), (torch.float64, -1022.0)])
def test_exponential(dtype: torch.dtype, low: float, every_isa: str) -> None:
    """One unit in the last place of the result with FMA, one and a half without, as csrc/simd.h states."""
    g = torch.Generator().manual_seed(0)
    near = torch.randn(200_000, generator=g, dtype=torch.float64)
    x = torch.cat([near, torch.linspace(low, -low, 200_001, dtype=torch.float64)]).to(dtype)
    out = torch.empty_like(x)
    _C.exp2(array(x), array(out))
    want = np.exp2(x.numpy().astype(np.longdouble))
    unit = np.spacing(want.astype(x.numpy().dtype)).astype(np.longdouble)
    assert (np.abs(out.numpy() - want) / unit).max() <= (1.5 if every_isa == "portable" else 1.0)
    edges = torch.tensor([-math.inf, -1e30, low * 1.01, 0.0, math.nan], dtype=dtype)
    out = torch.empty_like(edges)
    _C.exp2(array(edges), array(out))
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 1.0] and out[4].isnan()


# --- compaction ---


def compact_oracle(labels: np.ndarray):
    B, C = labels.shape
    columns = [[b * C + c for b in range(B) if labels[b, c] == 1] for c in range(C)]
    flat = [p for column in columns for p in column]
    return flat + [0] * (B * C - len(flat)), [0, *np.cumsum([len(column) for column in columns])]


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 80), (7, 1), (1, 19), (257, 300)])
@pytest.mark.parametrize("threads", [1, 3])
def test_compact(dtype: torch.dtype, shape: tuple[int, int], threads: int) -> None:
    choices = [0, 1] if dtype in (torch.bool, torch.uint8) else [-1, 0, 0, 1]
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice(choices, size=shape))
    for layout in (labels.to(dtype), labels.to(dtype).t().contiguous().t()):
        pairs, class_ptr, target = compact(layout, threads)
        want_pairs, want_ptr = compact_oracle(labels.numpy())
        assert pairs.tolist() == want_pairs and class_ptr.tolist() == want_ptr
        assert torch.equal(target, labels.to(torch.int8))


def test_compact_expanded() -> None:
    labels = torch.tensor([1, 0, -1, 1]).expand(3, 4)
    pairs, class_ptr, _ = compact(labels)
    assert pairs.tolist()[:6] == [0, 4, 8, 3, 7, 11] and class_ptr.tolist() == [0, 3, 3, 3, 6]


@pytest.mark.parametrize(
    "labels,shown",
    [
        (torch.tensor([[0.5, 1.0], [2.0, 0.5]]), "got values 0.5, 2$"),
        (torch.tensor([[float("nan"), 1.0]]), "got values nan$"),
        (torch.tensor([[float("nan"), 0.25]], dtype=torch.float16), "got values nan, 0.25$"),
        (torch.tensor([[1, 3]], dtype=torch.bfloat16), "got values 3$"),
        (torch.tensor([[-2, 255]]), "got values -2, 255$"),
        (torch.tensor([[255]], dtype=torch.uint8), "got values 255$"),
        (torch.arange(2, 10)[None], r"got values 2, 3, 4, 5, 6, \.\.\.$"),
    ],
)
def test_compact_names_bad_values(labels: Tensor, shown: str) -> None:
    with pytest.raises(ValueError, match=r"^labels: expected 0, 1 or -1 \(ignored\), " + shown):
        compact(labels)


# --- the door ---


def test_bad_arguments_name_themselves() -> None:
    x, labels, _ = make(3, 1, 4, 5)
    pairs, class_ptr, _ = compact(labels)
    row_loss, lse, norm = torch.empty(3, 1, 4), torch.empty(2, 12), torch.empty(12, dtype=torch.float64)

    def call(x=x, pairs=pairs, class_ptr=class_ptr, temperature=0.2, lse=lse, norm=norm):
        given = {
            "features": x, "pairs": pairs, "class_ptr": class_ptr, "temperature": torch.tensor(temperature),
            "row_loss": row_loss, "lse": lse, "norm": norm, "kept": torch.empty(0),
        }  # fmt: skip
        arrays = {name: array(tensor) for name, tensor in given.items() if tensor is not None}
        _C.sscl_forward(**arrays, normalize=True, released=False, threads=1)

    call()
    with pytest.raises(TypeError, match="^norm: missing"):
        call(norm=None)
    with pytest.raises(ValueError, match="^temperature: expected a finite number > 0"):
        call(temperature=0.0)
    with pytest.raises(TypeError, match="^norm: expected float64, got float32"):
        call(norm=lse)
    with pytest.raises(ValueError, match="^lse: expected 24 contiguous elements, got shape \\[2, 11\\]"):
        call(lse=lse[:, :11])
    with pytest.raises(ValueError, match="^pairs: expected values in \\[0, 12\\)"):
        call(pairs=pairs + 100)
    with pytest.raises(ValueError, match="^class_ptr: expected to start at 0"):
        call(class_ptr=class_ptr + 1)
    with pytest.raises(ValueError, match=r"^features: expected 4 dimensions, got shape \[3, 4, 5\]"):
        call(x=x[:, 0])


def test_isa_is_forced_by_the_environment() -> None:
    def isa_with(value: str) -> subprocess.CompletedProcess:
        # By path: importing the package would import torch, seconds that this test does not need.
        code = (
            "import importlib.util as u; s = u.spec_from_file_location('sadcl._C', %r);"
            "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.isa())"
        )
        return subprocess.run(
            [sys.executable, "-c", code % _C.__file__],
            env={**os.environ, "SADCL_CPU_ISA": value},
            capture_output=True,
            text=True,
        )

    for name in _C.supported_isas():
        assert isa_with(name).stdout.strip() == name
    wrong = isa_with("mmx")
    assert wrong.returncode != 0 and "SADCL_CPU_ISA: expected one of" in wrong.stderr and "'mmx'" in wrong.stderr


def test_unknown_isa() -> None:
    with pytest.raises(ValueError, match="^isa: expected one of .*portable, got 'mmx'"):
        _C.set_isa("mmx")
    info = _C.build_info()
    assert set(_C.supported_isas()) <= set(info["isas"]) and isinstance(info["openmp"], bool)
