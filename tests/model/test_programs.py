"""Modules of one's own that hold ours, made into programs: they run without this library, for any batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sadcl
from sadcl.commands.export import plain_operators
from sadcl.head import GroupClassifier
from tests import forks

C, E, L = 4, 16, 6


class Net(nn.Module):
    """Attention with positions and padding, and a classifier; the form left open."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = sadcl.LabelAttention(E, 2, backend=backend)
        self.queries = nn.Parameter(torch.randn(C, E))
        self.position = nn.Parameter(torch.randn(L, E))
        self.classifier = GroupClassifier(C, E)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        padded = memory[..., 0] > 1.0
        out, _ = self.attention(self.queries, memory, self.position, padded)
        return self.classifier(out)


def head() -> nn.Module:
    torch.manual_seed(0)
    whole = sadcl.SADCLHead(E, C, E, 2, 16, 1, 2, 4, (2, 3), contrastive=False)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = whole

        def forward(self, memory: torch.Tensor) -> torch.Tensor:
            return self.head(memory.transpose(1, 2).unflatten(2, (2, 3))).logits

    return Logits()


MODULES = {"attention": Net, "head": head}
BATCHES = (1, 2, 7)


def inputs(batch: int) -> torch.Tensor:
    return torch.randn(batch, L, E, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]().eval()


def assert_same(module: nn.Module, run) -> None:
    for batch in BATCHES:
        with torch.no_grad():
            want = module(inputs(batch))
        torch.testing.assert_close(run(inputs(batch)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_torch_export_with_any_batch(module: nn.Module, strict: bool, plain: bool) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)

    def trace() -> torch.export.ExportedProgram:
        return torch.export.export(module, (inputs(3),), dynamic_shapes=shapes, strict=strict)

    if plain:
        with plain_operators():
            program = trace()
    else:
        program = trace()
    assert not [str(node.target) for node in program.graph.nodes if "sadcl" in str(node.target)]
    assert_same(module, program.module())


def test_a_backend_by_name_is_kept() -> None:
    if not sadcl.backends()["cpp"].available:
        pytest.skip("the CPU extension is not built")
    program = torch.export.export(Net("cpp").eval(), (inputs(3),))
    assert "sadcl.label_attention.default" in {str(node.target) for node in program.graph.nodes}


def test_onnx_as_it_is(module: nn.Module, tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "module.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(module, (inputs(3),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    assert_same(module, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; what it traces is what counts
def test_a_trace_runs_in_a_process_without_the_library(module: nn.Module, tmp_path: Path) -> None:
    traced = torch.jit.trace(module, inputs(3), check_trace=False)
    assert_same(module, traced)
    traced.save(tmp_path / "module.pt")
    torch.save([inputs(batch) for batch in BATCHES], tmp_path / "inputs.pt")
    code = """
import sys, torch
sys.modules["sadcl"] = None
module = torch.jit.load(sys.argv[1] + "/module.pt")
torch.save([module(x).detach() for x in torch.load(sys.argv[1] + "/inputs.pt")], sys.argv[1] + "/outputs.pt")
"""
    done = forks.run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    outputs = dict(zip(BATCHES, torch.load(tmp_path / "outputs.pt"), strict=True))
    assert_same(module, lambda x: outputs[len(x)])


def test_compiling_is_not_exporting() -> None:
    """What torch.compile makes runs here: it keeps the fast operators."""
    if not sadcl.backends()["cpp"].available:
        pytest.skip("the CPU extension is not built")
    seen: set[str] = set()

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    module = Net().eval()
    compiled = torch.compile(module, backend=look, fullgraph=True, dynamic=True)
    assert_same(module, compiled)
    assert "sadcl.label_attention" in seen and "sadcl.group_classifier" in seen
