"""Checkpoints in the released format: golden heads, errors, whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sadcl.compat_checkpoints import head_from_released, load_released_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = {
    "logits": "logits",
    "label_features": "label_embed",
    "embeddings": "vis_embed",
    "bank_embeddings": "memory_embed",
    "prototype_embeddings": "prototype_embed",
}
STEP2 = ("prototype", "memorybank", "proj_head.")


def released(number: int):
    with np.load(GOLDEN / f"head_{number:03d}.npz") as file:
        fields = {k: torch.from_numpy(file[k]) for k in file.files}
    state = {k.removeprefix("sd::"): v for k, v in fields.items() if k.startswith("sd::")}
    height, breadth, heads = (int(fields["cfg"][i]) for i in (4, 5, 6))
    return state, fields, heads, (height, breadth)


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "module.module.",
        "model.module.",
    ],
)
def test_golden_heads(number, prefix):
    state, fields, heads, size = released(number)
    head = head_from_released({prefix + k: v for k, v in state.items()}, heads, size)
    assert not head.training
    with torch.no_grad():
        out = head(fields["x"])
    for ours, theirs in OUTPUTS.items():
        close(getattr(out, ours), fields[theirs])
    head.memory_bank.update(out.label_features, fields["bank_logits"], fields["bank_labels"])
    close(head.memory_bank.slots, fields["bank_after"])


def test_missing_input_proj_is_the_identity():
    state, fields, heads, size = released(1)
    eye = torch.eye(32)[:, :, None, None]
    state |= {"input_proj.weight": eye, "input_proj.bias": torch.zeros(32)}
    with_conv = head_from_released(state, heads, size)
    without = head_from_released({k: v for k, v in state.items() if "input_proj" not in k}, heads, size)
    assert isinstance(without.input_proj, torch.nn.Identity)
    close(without(fields["x"]).logits, with_conv(fields["x"]).logits)


def test_a_step_1_file_has_no_contrastive_outputs():
    state, fields, heads, size = released(0)
    head = head_from_released({k: v for k, v in state.items() if not k.startswith(STEP2)}, heads, size)
    out = head(fields["x"])
    close(out.logits, fields["logits"])
    assert out.embeddings is None and out.bank_embeddings is None and out.prototype_embeddings is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.b": None}, r"missing keys fc\.b"),
        ({"query_embed.weight": None}, r"missing query_embed\.weight"),
        (
            {"transformer.decoder.layers.1.norm3.bias": None},
            r"missing keys .*decoder\.layers\.1\.norm3\.bias",
        ),
        ({"memorybank": None}, "missing memorybank"),
        ({"fc.weight": torch.zeros(3)}, r"unexpected keys fc\.weight"),
        (
            {"transformer.encoder.layers.0.norm3.bias": torch.zeros(32)},
            r"unexpected keys .*layers\.0\.norm3\.bias",
        ),
        ({"prototype": torch.zeros(1, 7, 31)}, r"wrong shapes prototype \[7, 31\] instead of \[7, 32\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state, _, heads, size = released(0)
    state |= change
    with pytest.raises(ValueError, match=message):
        head_from_released({k: v for k, v in state.items() if v is not None}, heads, size)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole released-style file: data-parallel names, a ResNet body, a numpy best_mAP."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    body = models.resnet18(weights=None)
    state, _, heads, _ = released(0)
    state["input_proj.weight"] = torch.randn(32, 512, 1, 1)
    for key, value in body.state_dict().items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            state[f"backbone.0.body.{key}"] = value
    state["backbone.1.pe"] = torch.zeros(1, 32, 4, 5)
    path = tmp_path / "model_best.pth.tar"
    content = {"epoch": 3, "best_mAP": np.float64(85.67), "arch": "SADCL"}
    torch.save(content | {"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path, heads, body, state


def test_whole_file(checkpoint):
    path, heads, body, state = checkpoint
    model = load_released_checkpoint(path, heads, backbone="resnet18", image_size=64)
    assert not model.training and model.backbone.feature_size == (2, 2)
    images = torch.randn(2, 3, 64, 64)
    body.eval()
    features = torch.nn.Sequential(*list(body.children())[:-2])(images)
    torch.testing.assert_close(model.backbone(images), features)
    head = head_from_released(state, heads, (2, 2))
    torch.testing.assert_close(model(images).embeddings, head(features).embeddings)
    assert load_released_checkpoint(path, heads, (4, 5), backbone="resnet18").head.position.size == (4, 5)


def test_files_that_are_none(checkpoint, tmp_path):
    path, heads, _, state = checkpoint

    def load(name):
        return load_released_checkpoint(name, heads, backbone="resnet18", image_size=64)

    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load(tmp_path / "nothing.pth")
    whole = path.read_bytes()
    for size in (0, 10, 5000, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model_best\.pth\.tar: " + ("truncated" if size else "an empty file")):
            load(path)
    path.write_text("not a checkpoint\n" * 20)
    with pytest.raises(ValueError, match=r"model_best\.pth\.tar: a text, not a checkpoint"):
        load(path)
    torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match=r"model_best\.pth\.tar: holds no state dict"):
        load(path)
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"model_best\.pth\.tar: .*unexpected keys conv1\.weight"):
        load(path)
    torch.save({k: v for k, v in state.items() if k != "backbone.0.body.layer1.0.conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"missing keys backbone\.0\.body\.layer1\.0\.conv1\.weight"):
        load(path)
    torch.save(state, path)
    with pytest.raises(ValueError, match="512 channels, backbone 'resnet50' gives 2048"):
        load_released_checkpoint(path, heads, backbone="resnet50", image_size=64)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "best_mAP": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_released_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_numpy_1_scalar_is_read(tmp_path, checkpoint):
    """Files written with numpy 1 name numpy.core, those of numpy 2 numpy._core."""
    path, heads, *_ = checkpoint
    content = torch.load(path, weights_only=False)
    # Module names are plain lines in a protocol-2 pickle; the old file format has no checksums over them.
    torch.save(content, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    names = [b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"]
    (written,) = [name for name in names if name in raw]
    for name in names:
        path.write_bytes(raw.replace(written, name))
        load_released_checkpoint(path, heads, backbone="resnet18", image_size=64)
