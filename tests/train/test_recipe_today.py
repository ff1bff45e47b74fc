"""Backbones of today, with random weights: tokens and several maps through whole runs, frozen and trained along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "torchvision", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml", "safetensors"):
    pytest.importorskip(needed)

import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_train import pictures, quiet, tiny  # noqa: E402, F401

from sadcl._backends import BackendInfo  # noqa: E402
from sadcl.checkpoint import load_checkpoint, restore_model  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.data import features  # noqa: E402
from sadcl.study.bench import PooledLinear, _width  # noqa: E402
from sadcl.train.loop import NonFiniteLoss  # noqa: E402
from sadcl.train.run import Run  # noqa: E402

SEVERAL = {"model__backbone": "test_convnext", "model__strides": "[16, 32]"}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("backbone", [SEVERAL, {"model__backbone": "test_vit"}], ids=["maps", "tokens"])
def test_a_run_from_a_local_file(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    frozen: bool,
    backbone: dict[str, str],
) -> None:
    torch.manual_seed(3)
    network = timm.create_model(backbone["model__backbone"], num_classes=5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    changes: dict[str, Any] = {**backbone, "model__pretrained": str(tmp_path / "model.safetensors")}
    changes |= {"step1__epochs": 1, "step2__epochs": 1, "plots": "true"}
    changes |= {} if frozen else {"model__train_backbone": "true", "step1__augment__flip": 0.5}
    metrics = train(tiny(pictures, tmp_path / "run", **changes), say=quiet)
    assert 0 <= metrics["mAP"] <= 1 and (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert bool(list((tmp_path / "run").glob("features/*/*.safetensors"))) == frozen
    model = restore_model(load_checkpoint(tmp_path / "run" / "step2.pt"))
    assert model.backbone.strides == ((16, 32) if backbone is SEVERAL else None)
    output = model(torch.randn(2, 3, 64, 64), need_weights=True)
    assert output.attention is not None and output.attention.shape[-2:] == (4, 4)
    ours, theirs = model.backbone.body.state_dict(), network.state_dict()
    first = next(iter(key for key in ours if "weight" in key))
    assert torch.equal(ours[first], theirs[first]) == frozen


def test_a_killed_extraction_goes_on(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 training pictures in shards of 8: the second is the last that was written."""
    monkeypatch.setattr(features, "SHARD_IMAGES", 8)
    config = tiny(pictures, tmp_path, **SEVERAL)
    real, left = features._write, [2]

    def write(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(features, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            Run(config, quiet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("train.*/*")}
    assert len(before) == 2
    run = Run(config, quiet)
    assert len(list((tmp_path / "features").glob("*/*"))) == 3 + 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [tuple(part.shape) for part in run.train_set[20][0]] == [(48, 4, 4), (64, 2, 2)]
    with torch.no_grad():
        direct = run.model.backbone(run.model.preprocessing(run.images.train[20][0])[None])
    for kept, fresh in zip(run.train_set[20][0], direct, strict=True):
        torch.testing.assert_close(kept, fresh[0], rtol=2e-3, atol=2e-3 * float(fresh.abs().max()))


def test_frozen_backbones_run_in_bfloat16_under_amp(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    exact, low = (Run(tiny(pictures, tmp_path / amp, **SEVERAL, amp=amp), quiet).val_set for amp in ("off", "bf16"))
    for want, got in zip(exact[3][0], low[3][0], strict=True):
        error = float((want - got).abs().max() / want.abs().max())
        assert 1e-4 < error < 0.05, "bfloat16 has 8 bits"


def test_a_run_without_the_extension_says_why(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"cpp": BackendInfo(False, reason="the C++ extension was not built: it needs a C++17 compiler")}
    monkeypatch.setattr("sadcl.train.run.backends", lambda: found)
    said: list[str] = []
    Run(tiny(pictures, tmp_path), said.append)
    assert "torch's operators do the work of the C++ kernels: the C++ extension was not built: it needs" in "".join(
        said
    )


def test_a_foreign_shard_ends_the_command_with_its_name(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(pictures, tmp_path, step1__epochs=1, step2__epochs=0)
    train(config, say=quiet)
    (file,) = (tmp_path / "features").glob("train.*/*")
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    err = capsys.readouterr().err
    assert f"{file}: cut off" in err and "delete it" in err and "Traceback" not in err


def test_a_batch_of_several_maps_is_written_down(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(NonFiniteLoss, match=r"its 8 inputs are finite .*largest magnitude"):
        train(tiny(pictures, tmp_path, **SEVERAL, step1__learning_rate=1e30), say=quiet)
    images = torch.load(tmp_path / "nonfinite.pt", weights_only=True)["images"]
    assert [part.shape[1] for part in images] == [48, 64]


def test_pooled_maps_stand_side_by_side() -> None:
    maps = (torch.randn(2, 4, 6, 6), torch.randn(2, 3, 3, 3))
    linear = PooledLinear(None, _width((4, 3)), 5)
    pooled = torch.cat([part.mean((2, 3)) for part in maps], 1)
    torch.testing.assert_close(linear(maps).logits, linear.linear(pooled))


def test_dry_run_says_which_weights_and_how_many_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.backbone", "convnext_tiny.dinov3_lvd1689m", "--model.strides", "[16, 32]"]
    options += ["--data.image_size", "224", "--data.train_images", "900", "--data.val_images", "100", "--dry-run"]
    assert main(["train", *options]) == 0
    said = capsys.readouterr().out
    assert "feature map 14 x 14 x 384 + 768, joined from strides (16, 32)" in said
    assert "no package carries these weights: this config would be refused" in said
    assert "hf download timm/convnext_tiny.dinov3_lvd1689m model.safetensors" in said and "dinov3-license" in said
    size = 2 * (384 * 14**2 + 768 * 7**2)
    assert f"1,000 images x {size / 1e3:,.0f} KB in float16 = {size * 1000 / 1e9:.1f} GB" in said
