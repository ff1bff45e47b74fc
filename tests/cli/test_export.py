"""Exported programs: plain operators, any batch size, the same numbers as eager, nothing written that is not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "yaml"):
    pytest.importorskip(needed)

import sadcl.commands.export  # noqa: E402
from sadcl import SADCL  # noqa: E402
from sadcl.checkpoint import (  # noqa: E402
    load_checkpoint,
    restore_model,
    save_checkpoint,
)
from sadcl.cli import main  # noqa: E402
from sadcl.commands.export import ExportError, export_model, plain_operators  # noqa: E402


@pytest.fixture(params=["onnx", "torch-export"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "onnx":
        for needed in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(needed)
    return request.param


def runner(path: Path, kind: str) -> Callable[[Tensor], list[Tensor]]:
    """What a user without this library would call."""
    if kind == "torch-export":
        module = torch.export.load(path).module()
        return lambda images: list(module(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def test_checkpoint_by_the_command(
    trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = trained / "run" / "step2.pt", tmp_path / "new" / "model.bin"
    assert main(["export", str(checkpoint), "--format", kind, "--output", str(output)]) == 0
    assert "on 8 random images" in (said := capsys.readouterr().out) and "on 8 real images" in said
    assert sorted(os.listdir(output.parent)) == ["model.bin", "model.bin.json"]
    facts = json.loads(Path(f"{output}.json").read_text())
    content = load_checkpoint(checkpoint)
    model = restore_model(content)
    assert facts["classes"] == content["classes"] and facts["checkpoint"]["stage"] == "step2"
    assert facts["thresholds"]["tuned"] == content.get("thresholds")
    assert facts["preprocessing"]["size"] == [64, 64] and facts["input"]["dtype"] == "uint8"
    assert facts["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    run = runner(output, kind)
    for batch in (1, 3, 33):
        images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            expected = model(model.preprocessing(images), contrastive=False).logits
        logits, probabilities = run(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probabilities, expected.sigmoid(), rtol=1e-4, atol=1e-4)
    if kind == "onnx":
        import onnx
        import onnxruntime

        metadata = onnxruntime.InferenceSession(output).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["classes"]) == content["classes"]
        assert json.loads(metadata["preprocessing"]) == facts["preprocessing"]
        assert {node.domain for node in onnx.load(output).graph.node} == {""}


def test_published_shape_of_the_head(tmp_path: Path) -> None:
    """Encoder, two decoder layers (the second one's queries differ by image), no input projection, a ResNet."""
    pytest.importorskip("torchvision")
    model = SADCL(5, "resnet18", image_size=(64, 96), ffn_dim=16, proj_dim=4, bank_slots=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    facts = export_model(model, tmp_path / "model.pt2", "torch-export", pictures=pictures)
    assert 0 < facts["checked"]["real"] < 1e-4 and facts["checked"]["real_images"] == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.head.projection is not None
    program = torch.export.load(tmp_path / "model.pt2")
    called = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "sadcl" not in called and "aten" in called
    assert not [name for name in program.state_dict if "projection" in name or "memory_bank" in name]


def tiny() -> SADCL:
    torch.manual_seed(1)
    return SADCL(3, "timm:test_resnet", image_size=32, hidden_dim=8, num_heads=2, ffn_dim=8, contrastive=False)


def test_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = sadcl.commands.export._runner

    def wrong(path: Path, kind: str) -> Any:
        run = runs(path, kind)
        return lambda images: tuple(out + 2e-4 for out in run(images))

    monkeypatch.setattr(sadcl.commands.export, "_runner", wrong)
    (tmp_path / "model.pt2").write_bytes(b"the one before")
    with pytest.raises(ExportError, match="logits of random images differ from eager by 0.0002"):
        export_model(tiny(), tmp_path / "model.pt2", "torch-export")
    assert os.listdir(tmp_path) == ["model.pt2"] and (tmp_path / "model.pt2").read_bytes() == b"the one before"


def test_operators_of_ours_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sadcl.backends()["cpp"].available:
        pytest.skip("the CPU extension is not built")
    monkeypatch.setattr(sadcl.commands.export, "plain_operators", torch.no_grad)
    monkeypatch.setenv("SADCL_BACKEND", "cpp")  # without a wish, what is exported is plain anyway
    with pytest.raises(ExportError, match=r"operators of this library alone: sadcl\.group_classifier"):
        export_model(tiny(), tmp_path / "model.pt2", "torch-export")


def test_switches_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", "reference")
    monkeypatch.delenv("SADCL_LINEAR", raising=False)
    with pytest.raises(KeyError), plain_operators():
        assert os.environ["SADCL_BACKEND"] == os.environ["SADCL_LINEAR"] == "torch"
        raise KeyError
    assert os.environ["SADCL_BACKEND"] == "reference" and "SADCL_LINEAR" not in os.environ


def test_unknown_kind_and_missing_pictures(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="kind: expected one of onnx, torch-export"):
        export_model(tiny(), tmp_path / "model", "coreml")
    content = load_checkpoint(trained / "run" / "step2.pt")
    content["config"]["data"]["val_csv"] = str(tmp_path / "gone.csv")
    save_checkpoint(tmp_path / "moved.pt", content)
    arguments = ["export", str(tmp_path / "moved.pt"), "--format", "torch-export"]
    assert main(arguments) == 2
    assert "name some with --images" in capsys.readouterr().err
    assert main([*arguments, "--images", str(trained)]) == 0
    assert (tmp_path / "moved.pt2").is_file() and (tmp_path / "moved.pt2.json").is_file()
