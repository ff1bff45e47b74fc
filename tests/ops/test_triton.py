"""The Triton backend without a GPU: kernels under the interpreter, op registration on meta tensors, no syncs."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sadcl import _checks
from sadcl.head import SADCLHead
from sadcl.ops import asl, bank, compact, group_classifier, label_attention, pscl, sscl  # noqa: F401 (all register)

TESTS = Path(__file__).parents[1]
OP = torch.ops.sadcl
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("path", sorted((TESTS / "interpreted").glob("test_*.py")), ids=lambda path: path.stem)
def test_under_the_interpreter(path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("SADCL_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# What makes the host wait for the device, or a launch depend on data.
_SYNCS = {"item", "tolist", "nonzero", "cpu", "numpy", "synchronize", "unique", "masked_select", "argwhere"}
_HOST_CONVERSIONS = {"int", "float", "bool"}


def calls_in(path: Path, skipped: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """The calls in a file, but for conversions of a literal (``float("-inf")``) and in functions for other backends."""
    tree, found = ast.parse(path.read_text()), []
    tree.body = [node for node in tree.body if not any(word in getattr(node, "name", "") for word in skipped)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not all(
            isinstance(argument, ast.Constant) for argument in node.args or [node]
        ):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((node.lineno, name))
    return found


KERNELS = TESTS.parent / "kernels"
LAUNCHERS = sorted({path.stem for path in KERNELS.glob("*.py")} - {"__init__", "_device", "_tiles", "_tune"})


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_nothing_above_them(path: Path) -> None:
    """Beside each other they know torch, triton, and what every backend shares; no op, function or oracle."""
    imported = {
        name.removeprefix("sadcl.").split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        if name.startswith("sadcl.")
    }
    assert imported <= {"_checks", "_dtypes"}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_are_read_on_a_few_screens(path: Path) -> None:
    """Few arguments a kernel, few lines a file, and one place that knows how the rows' tables lie."""
    text = path.read_text()
    arguments = {
        node.name: len(node.args.args)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert not {name: count for name, count in arguments.items() if count > 15}
    assert len(text.splitlines()) <= 400
    assert path.stem == "_rows" or not any(place in text for place in ("_plane(", "table.stat +", "table.segment +"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_never_wait_for_the_device(name: str) -> None:
    path = KERNELS / f"{name}.py"
    bad = [(line, call) for line, call in calls_in(path) if call in _SYNCS]
    # float() of the loss's own constants, never of a tensor.
    bad += [(line, call) for line, call in calls_in(path) if call in _HOST_CONVERSIONS and name != "asl"]
    assert not bad, f"{path.name}: {bad}"
    assert "atomic" not in path.read_text().replace("no atomics", "").replace("no float atomics", "")


@pytest.mark.parametrize("name", ["label_attention_core", "group_classifier", "bank", "pscl", "sscl", "asl", "compact"])
def test_the_ops_around_them_do_not_either(name: str) -> None:
    """The check of values, which waits, is another test's."""
    path = TESTS.parent / "sadcl" / "ops" / f"{name}.py"
    bad = [(line, call) for line, call in calls_in(path, ("cpp", "torch", "check_", "_bounded")) if call in _SYNCS]
    assert not bad, f"{path.name}: {bad}"


@needs_triton
@pytest.mark.parametrize("asked", [False, True])
def test_label_values_on_a_device_are_read_only_when_asked(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand for a GPU's: they are not on a CPU, and nothing can be read from them."""
    from sadcl.kernels import _launch
    from sadcl.kernels import asl as asl_kernel
    from sadcl.kernels import compact as compact_kernel

    monkeypatch.setenv("SADCL_CHECK", "1" if asked else "0")
    read: list[str] = []
    monkeypatch.setattr(_checks, "check_label_values", lambda labels: read.append("compact"))
    monkeypatch.setattr(_checks, "check_soft_labels", lambda labels: read.append("asl"))
    labels = torch.empty(4, 5, device="meta")
    with _launch.recording(_launch.PARTS["sm_90"]) as launches:
        pairs, _, target = compact_kernel.compact(labels)
        asl_kernel.asl(labels, labels, None, 4.0, 1.0, 0.05, 1e-8, False, True, True)
    assert read == (["compact", "asl"] if asked else [])
    assert [launch.name for launch in launches] == ["_compact_small_kernel", "_asl_kernel"]
    # More pairs than a bound: five here.
    bounded = compact._bounded(lambda labels: (pairs, torch.tensor([0, 2, 5]), target))
    if asked:
        with pytest.raises(ValueError, match="capacity: the labels have 5 active pairs, more than 4"):
            bounded(labels, 4)
    else:
        assert bounded(labels, 4)[0].shape == (4,)


@needs_triton
@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_traces_on_meta_tensors(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", "triton")
    with torch.device("meta"):
        head = SADCLHead(8, 3, num_heads=2, ffn_dim=8, decoder_layers=1, proj_dim=4, feature_size=(2, 3))
        x = torch.empty(2, 8, 2, 3)
    function = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
    out = function(x)
    parameters = list(head.parameters())
    grads = torch.autograd.grad(sum(part.square().mean() for part in out[:5]), parameters)
    assert [grad.shape for grad in grads] == [parameter.shape for parameter in parameters]
    assert out.logits.shape == (2, 3) and out.logits.device.type == "meta"


def arguments(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    b, v, c, d = 4, 2, 5, 24
    return {
        "features": torch.empty(b, v, c, d, dtype=dtype, device=device),
        "pairs": torch.empty(b * c, dtype=torch.int32, device=device),
        "class_ptr": torch.empty(c + 1, dtype=torch.int32, device=device),
        "target": torch.empty(b, c, dtype=torch.int8, device=device),
        "labels": torch.empty(b, c, device=device),
        "prototypes": torch.empty(c, d, dtype=dtype, device=device),
        "logits": torch.empty(b, c, dtype=dtype, device=device),
        "tau": torch.empty((), device=device),
        "bias": torch.empty(c, device=device),
        "memory": torch.empty(b, 7, d, dtype=dtype, device=device),
        "padded": torch.empty(b, 7, dtype=torch.bool, device=device),
        "seed": torch.empty(1, dtype=torch.int64, device=device),
        "slots": torch.empty(b, c, d, device=device),
    }


def run_label_attention(
    memory: torch.Tensor, padded: torch.Tensor, seed: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The folded form with positions and dropout, the plain one with weights."""
    b, length, e = memory.shape
    memory = memory.to(dtype)
    outputs: list[torch.Tensor] = []
    for query, keys, values, pos in (
        (memory.new_empty(1, 5, 2, e), memory[:, :, None], None, memory),
        (memory.new_empty(b, 5, 2, e // 2), *[memory.view(b, length, 2, -1)] * 2, None),
    ):
        need = values is not None
        inputs = (query, keys, values, pos, padded, None if need else seed)
        forward = OP.label_attention_core(*inputs, 0.25, 0.0 if need else 0.1, need, "triton")
        outputs += forward
        outputs += OP.label_attention_core_backward(
            forward[0], forward[1], forward[2] if need else None, *inputs, *forward, 0.25, 0.0 if need else 0.1,
            [True, True, need], "triton",
        )  # fmt: skip
    return outputs


def run_ops(a: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Every op, forward and backward called directly; what comes out."""
    active = OP.compact(a["labels"], a["labels"].numel(), "triton")
    outputs = list(active)
    x, tau = a["features"], a["tau"]
    forward = OP.sscl(x, *active[:2], tau, True, False, 0, "triton")
    outputs += [*forward, *OP.sscl_backward(forward[0], x, *active[:2], tau, *forward[1:], True, "triton")]
    forward = OP.pscl(x[:, 0], a["prototypes"], active[2], tau, False, "triton")
    outputs += [
        *forward,
        *OP.pscl_backward(forward[0], x[:, 0], a["prototypes"], active[2], tau, *forward[1:], False, "triton"),
    ]
    loss, grad = OP.asl(a["logits"], a["labels"], None, 4.0, 1.0, 0.05, 1e-8, False, True, True, "triton")
    outputs += [loss, grad, OP.asl_backward(loss, grad, a["logits"], "triton")]
    h, weight = x[:, 0], a["prototypes"]
    logits = OP.group_classifier(h, weight, a["bias"], "triton")
    outputs += [logits, *OP.group_classifier_backward(logits, h, weight, True, True, "triton")]
    OP.bank_update(a["slots"], h, logits, a["labels"], 0.8, False, "triton")
    outputs += run_label_attention(a["memory"], a["padded"], a["seed"], x.dtype)
    return [(tuple(x.shape), x.dtype, x.device.type) for x in outputs]


def test_fake_cuda_tensors_pass_through_every_op() -> None:
    with FakeTensorMode(), torch.no_grad():
        outputs = run_ops(arguments("cuda"))
    assert {device for _, _, device in outputs} == {"cuda"}
    meta = run_ops(arguments("meta"))
    assert [entry[:2] for entry in outputs] == [entry[:2] for entry in meta]


def total(a: dict[str, torch.Tensor]) -> torch.Tensor:
    """A training step's losses, with autograd."""
    pairs, class_ptr, target = OP.compact(a["labels"], a["labels"].numel(), "triton")
    samples = OP.sscl(a["features"], pairs, class_ptr, a["tau"], True, False, 0, "triton")[0]
    classes = OP.pscl(a["features"][:, 0], a["prototypes"], target, a["tau"], False, "triton")[0]
    images = OP.asl(a["logits"], a["labels"], None, 4.0, 1.0, 0.05, 1e-8, False, True, True, "triton")[0]
    logits = OP.group_classifier(a["features"][:, 1], a["prototypes"], a["bias"], "triton")
    e = a["memory"].shape[-1]
    weights = a["prototypes"].new_empty(3 * e, e), a["bias"].new_empty(3 * e), a["prototypes"].new_empty(e, e), None
    attended = [
        label_attention.label_attention(
            a["prototypes"], a["memory"], *weights, 2, memory_pos=a["memory"][0], key_padding_mask=a["padded"],
            dropout=0.1, form=form, backend="triton",
        )[0].sum()
        for form in label_attention.FORMS
    ]  # fmt: skip
    return samples.sum() + classes.sum() + images.sum() + logits.sum() + attended[0] + attended[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_traces_on_meta_tensors(compiled: bool) -> None:
    a = arguments("meta", torch.float32)
    leaves = [a[name].requires_grad_() for name in ("features", "prototypes", "logits", "tau", "bias", "memory")]
    function = torch.compile(total, fullgraph=True, backend="aot_eager") if compiled else total
    grads = torch.autograd.grad(function(a), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
