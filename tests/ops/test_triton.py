"""The Triton backend without a GPU: kernels under the interpreter, op registration on meta tensors, no syncs."""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sadcl import _checks
from sadcl.head import SADCLHead
from sadcl.ops import compact
from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, SMALL, Maker
from tests import forks

TESTS = Path(__file__).parents[1]
OP = torch.ops.sadcl
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("path", sorted((TESTS / "interpreted").glob("test_*.py")), ids=lambda path: path.stem)
def test_under_the_interpreter(path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("SADCL_BACKEND", None)
    code = "import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-x", "-p", "no:cacheprovider", str(path)]
    imported = ["torch", "triton", "torch._dynamo", "pytest"]
    done = forks.run(code, *options, environment=environment, cwd=TESTS.parent, timeout=900, imported=imported)
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
    assert imported <= {"_checks", "_dtypes", "_thresholds"}


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


@pytest.mark.parametrize(
    "name",
    ["label_attention_core", "group_classifier", "bank", "pscl", "sscl", "asl", "compact", "mlc", "zlpr", "two_way"],
)
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

    monkeypatch.setenv("SADCL_CHECK", "1" if asked else "0")
    on_a_gpu = FakeTensorMode().from_tensor(torch.empty(1)).new_empty(1, device="cuda")
    answer = _checks.reads_values(on_a_gpu)
    assert answer == asked and not _checks.reads_values(torch.empty(1, device="meta"))
    monkeypatch.setattr(_checks, "reads_values", lambda labels: answer)
    read: list[str] = []
    monkeypatch.setattr(_checks, "check_label_values", lambda labels: read.append("compact"))
    monkeypatch.setattr(_checks, "check_soft_labels", lambda labels: read.append("asl"))
    labels = torch.empty(4, 5, device="meta")
    of_asl = next(EXAMPLES["asl"](Maker(SMALL, torch.float32, "meta")))
    with _launch.recording(_launch.PARTS["sm_90"]) as launches:
        OPS["compact"].run(compact.Inputs(labels, 20), "triton")
        OPS["asl"].run(of_asl, "triton")
    assert read == (["compact", "asl"] if asked else [])
    assert [launch.name for launch in launches] == ["_compact_small_kernel", "_asl_kernel"]

    # More pairs than a bound: five here.
    def five(x: compact.Inputs, out: compact.Active) -> None:
        pass

    bounded = compact._bounded(five)
    made = compact.allocate(compact.Inputs(labels, 20))
    monkeypatch.setattr(compact, "allocate", lambda x: made._replace(class_ptr=torch.tensor([0, 1, 2, 3, 4, 5])))
    if asked:
        with pytest.raises(ValueError, match="capacity: the labels have 5 active pairs, more than 4"):
            bounded(compact.Inputs(labels, 4))
    else:
        assert bounded(compact.Inputs(labels, 4)).pairs.shape == (4,)


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


TRITON = sorted(name for name, op in OPS.items() if "triton" in op.backends)


def run_op(name: str, device: str) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """An op, forward and backward called directly, on its examples; what comes out."""
    op, outputs = OPS[name], []
    for x in EXAMPLES[name](Maker(SMALL, torch.bfloat16, device)):
        out = op(x, "triton")
        outputs += out
        if op.derivative is not None:
            given = op.derivative.pack(out[: op.results], x, out)
            made = getattr(OP, f"{name}_backward")(*given, "triton")
            outputs += [made] if isinstance(made, torch.Tensor) else made
    return [(tuple(x.shape), x.dtype, x.device.type) for x in outputs]


@pytest.mark.parametrize("name", TRITON)
def test_fake_cuda_tensors_pass_through_every_op(name: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        outputs = run_op(name, "cuda")
    assert {device for _, _, device in outputs} <= {"cuda"}
    meta = run_op(name, "meta")
    assert [entry[:2] for entry in outputs] == [entry[:2] for entry in meta]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [name for name in TRITON if OPS[name].backward is not None])
def test_autograd_traces_on_meta_tensors(name: str, compiled: bool) -> None:
    op = OPS[name]
    torch._dynamo.reset()
    for x in EXAMPLES[name](Maker(SMALL, torch.float32, "meta")):
        given = {field: getattr(x, field) for field in op.backward.gradients}
        fields = [field for field, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        leaves = [getattr(x, field).clone().requires_grad_() for field in fields]

        def total(*leaves: torch.Tensor, x: Any = x, fields: list[str] = fields) -> torch.Tensor:
            out = op(x._replace(**dict(zip(fields, leaves, strict=True))), "triton")
            return sum(part.sum() for part in out[: op.results])

        function = torch.compile(total, fullgraph=True, backend="aot_eager") if compiled else total
        grads = torch.autograd.grad(function(*leaves), leaves)
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
