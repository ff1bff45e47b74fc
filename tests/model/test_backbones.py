"""Backbones by name: layout, freezing, weights that packages carry, preprocessing."""

from __future__ import annotations

import os

import pytest
import torch

from sadcl.backbones import Preprocessing, build_backbone

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from sadcl.model import SADCL  # noqa: E402
from tests import forks  # noqa: E402

SMALL = {
    "hidden_dim": 16,
    "ffn_dim": 16,
    "proj_dim": 8,
    "bank_slots": 2,
    "encoder_layers": 0,
    "decoder_layers": 1,
}


@pytest.mark.parametrize(
    ("name", "size", "channels", "grid"),
    [
        ("resnet18", (64, 96), 512, (2, 3)),  # torchvision
        ("timm:resnet10t", (64, 96), 512, (2, 3)),
        ("convnext_atto", (64, 96), 320, (2, 3)),
        ("test_efficientnet", (64, 64), 256, (2, 2)),
        ("vit_tiny_patch16_224", (48, 64), 192, (3, 4)),  # a class token
        ("test_vit", (48, 64), 64, (3, 4)),
        ("vit_small_patch14_reg4_dinov2", (28, 42), 384, (2, 3)),  # register tokens
        ("swin_tiny_patch4_window7_224", (64, 64), 768, (2, 2)),  # NHWC
        ("vit_tiny_r_s16_p8_224", (64, 96), 192, (2, 3)),  # a network of convolutions before the patches
        ("levit_128s", (64, 96), 384, (1, 2)),  # tokens that become fewer on the way
        ("xcit_nano_12_p16_224", (48, 64), 128, (3, 4)),
        ("gmlp_ti16_224", (48, 64), 128, (3, 4)),
        ("test_mambaout", (64, 96), 64, (2, 3)),  # NHWC
        ("torchvision:swin_t", (64, 96), 768, (2, 3)),
        ("torchvision:mobilenet_v3_small", (64, 96), 576, (2, 3)),
    ],
)
def test_every_layout_gives_nchw(name, size, channels, grid):
    torch.manual_seed(0)
    model = SADCL(3, name, image_size=size, **SMALL).eval()
    backbone = model.backbone
    assert (backbone.channels, backbone.feature_size) == (channels, grid)
    with torch.no_grad():
        images = torch.randn(2, 3, *size)
        maps = backbone(images)
        assert maps.shape == (2, channels, *grid)
        assert model(images).logits.isfinite().all()
    assert model.head.position.size == grid


def test_vit_tokens_go_back_to_their_places():
    backbone = build_backbone("vit_tiny_patch16_224", image_size=(48, 64)).eval()
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        tokens = backbone.body.forward_features(images)
        maps = backbone(images)
    assert torch.equal(maps[0, :, 1, 2], tokens[0, 1 + 1 * 4 + 2])


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_r_s16_p8_224", "levit_128s", "xcit_nano_12_p16_224", "test_vit", "test_vit_relpos", "cait_xxs24_224"],
)
def test_tokens_lie_where_the_network_itself_puts_them(name):
    backbone = build_backbone(name, image_size=(64, 96)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        (own,) = backbone.body.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(backbone(images), own, rtol=1e-4, atol=1e-4)


# Of every kind of network that timm has, by its shapes alone (the meta device computes nothing).
FAMILIES = {
    "beit_base_patch16_224": (768, (14, 14)),
    "convit_tiny": (192, (14, 14)),
    "deit_tiny_distilled_patch16_224": (192, (14, 14)),
    "efficientformer_l1": (448, (7, 7)),
    "hiera_tiny_224": (768, (7, 7)),
    "mixer_s32_224": (512, (7, 7)),
    "mvitv2_tiny": (768, (7, 7)),
    "nest_tiny": (384, (14, 14)),
    "pvt_v2_b0": (256, (7, 7)),
    "samvit_base_patch16_224": (768, (14, 14)),
    "tnt_s_legacy_patch16_224": (384, (14, 14)),
    "twins_svt_small": (512, (7, 7)),
    "vit_base_r50_s16_224": (768, (14, 14)),
    "vit_small_r26_s32_224": (384, (7, 7)),
    "vit_tiny_patch16_dinov3_qkvb": (192, (14, 14)),
    "vitamin_small_224": (384, (14, 14)),
    "volo_d1_224": (384, (14, 14)),
    "xcit_tiny_12_p8_224": (192, (28, 28)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_grids_are_the_networks_own(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        backbone = build_backbone(name, image_size=224)
        maps = backbone(torch.empty(2, 3, 224, 224))
    channels, grid = FAMILIES[name]
    assert (backbone.channels, backbone.feature_size) == (channels, grid)
    assert maps.shape == (2, channels, *grid)


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("coat_tiny", 224, "CoaT gives a list"),
        ("crossvit_tiny_240", 240, "CrossVit gives a list"),
        ("pit_ti_224", 224, "PoolingVisionTransformer gives 1 tokens and its grid is 7 x 7"),
        ("vit_tiny_patch16_224", 8, "cannot take images of 8 x 8|cannot build"),
        ("levit_128s", 7, "cannot take images of 7 x 7|cannot build"),
    ],
)
def test_what_gives_no_map_is_refused_by_name(name, size, why):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"), pytest.raises(ValueError, match=f"backbone: .*({why})"):
        build_backbone(name, image_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_family_gives_a_map_or_says_why_not(family):
    for name in timm.list_models(module=family)[::5]:
        size = timm.get_pretrained_cfg(name).input_size[1:]
        with torch.device("meta"):
            try:
                backbone = build_backbone(f"timm:{name}", image_size=size)
            except ValueError as error:
                assert str(error).startswith("backbone: "), name
                continue
            maps = backbone(torch.empty(1, 3, *size))
        assert maps.shape == (1, backbone.channels, *backbone.feature_size), name


def test_other_sizes_have_their_own_grids():
    backbone = build_backbone("test_vit", image_size=(48, 64)).eval()
    with torch.device("meta"):
        hybrid = build_backbone("vit_tiny_r_s16_p8_224", image_size=64).eval()
        twins = build_backbone("twins_svt_small", image_size=64).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 32, 80)).shape == (1, 64, 2, 5)
        assert hybrid(torch.empty(1, 3, 128, 96, device="meta")).shape == (1, 192, 4, 3)
        for size in ((64, 96), (96, 64), (96, 96)):
            assert twins(torch.empty(1, 3, *size, device="meta")).shape == (1, 512, size[0] // 32, size[1] // 32)


@pytest.mark.parametrize("name", ["resmlp_12_224", "visformer_tiny", "gcvit_xxtiny", "convit_tiny", "test_vit"])
def test_sizes_that_a_network_cannot_take_are_refused_by_name(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        backbone = build_backbone(f"timm:{name}", image_size=64)
        backbone.check_size((64, 64))
        backbone(torch.empty(1, 3, 64, 64))
        for refused in (lambda: backbone(torch.empty(1, 3, 104, 96)), lambda: backbone.check_size((104, 96))):
            with pytest.raises(ValueError, match="backbone: .* cannot take images of 104 x 96: .*Error: "):
                refused()


def test_what_fails_at_a_size_that_it_can_take_is_not_blamed_on_the_size():
    backbone = build_backbone("test_vit", image_size=(48, 64)).eval()
    backbone.body.blocks[0].register_forward_hook(lambda *_: 1 / 0 if len(_[1][0]) > 1 else None)
    for size in ((48, 64), (64, 64)):
        with pytest.raises(ZeroDivisionError):
            backbone(torch.randn(2, 3, *size))


def test_a_count_that_fits_no_grid_is_an_error():
    backbone = build_backbone("test_vit", image_size=(48, 64)).eval()
    forward = backbone.body.forward_features
    backbone.body.forward_features = lambda images: forward(images)[:, :-1]
    with torch.no_grad(), pytest.raises(ValueError, match=r"11 tokens, no grid of 3 x 4; expected.*\(48, 64\)"):
        backbone(torch.randn(1, 3, 48, 64))


@pytest.mark.parametrize("computed", [True, False])
def test_compiled_and_exported_grids(computed):
    backbone = build_backbone("test_vit", image_size=(64, 96)).eval()
    if not computed:
        backbone._computed = None  # as of a network whose patch embedding computes none
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = backbone(images)
        compiled = torch.compile(backbone, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), want, rtol=1e-4, atol=1e-4)
        program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim("b")},), strict=False)
        torch.testing.assert_close(program.module()(images[:1].repeat(3, 1, 1, 1))[2], want[0], rtol=1e-4, atol=1e-4)


def test_swin_maps_are_permuted_not_reshaped():
    backbone = build_backbone("swin_tiny_patch4_window7_224", image_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images)[0, :, 1, 0], backbone.body.forward_features(images)[0, 1, 0])


def test_published_model_has_200037456_trainable_parameters():
    with torch.device("meta"):
        model = SADCL(80)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 200_037_456
    assert isinstance(model.head.input_proj, torch.nn.Identity)
    assert model.backbone.feature_size == (14, 14) and model.head.memory_bank.batch_slots == 32
    frozen = {n.split(".")[0] for n, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert {"conv1", "bn1", "layer1"} <= frozen
    assert all(p.requires_grad for n, p in model.backbone.body.named_parameters() if n == "layer2.0.conv1.weight")


def test_frozen_norms_stay_still_in_training():
    torch.manual_seed(0)
    model = SADCL(3, "resnet18", image_size=64, **SMALL).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)
    before = [m.running_mean.clone() for m in norms]
    model(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert all(torch.equal(a, m.running_mean) for a, m in zip(before, norms, strict=True))
    body = model.backbone.body
    assert body.layer1[0].conv1.weight.grad is None and body.layer2[0].conv1.weight.grad is not None
    free = build_backbone("resnet18", image_size=64, frozen="none", freeze_norm=False)
    assert free.body.bn1.training and all(p.requires_grad for p in free.parameters())


def test_frozen_parts_by_name_and_all():
    whole = build_backbone("test_vit", image_size=48, frozen="all").train()
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(m.training for m in whole.body.modules()) and whole.training
    part = build_backbone("resnet18", image_size=64, frozen=["layer4."]).train()
    assert {n.split(".")[0] for n, p in part.body.named_parameters() if not p.requires_grad and "conv" in n} == {
        "layer4"
    }
    with pytest.raises(ValueError, match="layer9"):
        build_backbone("resnet18", image_size=64, frozen=["layer9."])
    with pytest.raises(ValueError, match="frozen"):
        build_backbone("resnet18", image_size=64, frozen="some")


def test_config_rebuilds_the_model():
    model = SADCL(3, "resnet18", image_size=64, contrastive=False, **SMALL)
    model.head.init_contrastive(batch_slots=3)
    model.head.extend_classes(2)
    twin = SADCL(**model.config())
    twin.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images).logits, twin.eval()(images).logits)
    assert model.num_classes == 5 and model.config()["bank_slots"] == 3


def test_preprocessing_resizes_and_round_trips():
    preprocessing = Preprocessing((6, 8))
    picture = torch.full((3, 20, 10), 255, dtype=torch.uint8)
    out = preprocessing(picture)
    assert out.shape == (3, 6, 8) and preprocessing(picture[None]).shape == (1, 3, 6, 8)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor((1 - 0.485) / 0.229))
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    with pytest.raises(ValueError, match="keys"):
        Preprocessing.from_dict({"size": [3, 3]})
    with pytest.raises(ValueError, match="images"):
        preprocessing(torch.zeros(1, 20, 10))
    with pytest.raises(AttributeError):
        preprocessing.size = (1, 1)


def test_weights_from_a_path(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    path = tmp_path / "weights.pth"
    for prefix in ("module.", "_orig_mod.", "model.module."):
        torch.save({"state_dict": {f"{prefix}{k}": v for k, v in network.state_dict().items()}}, path)
        backbone = build_backbone("resnet18", path, 64)
        assert torch.equal(backbone.body.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match=r"weights.pth does not fit this backbone: missing"):
        build_backbone("resnet34", path, 64)
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html>")
    with pytest.raises(ValueError, match=r"page.pth: a web page"):
        build_backbone("resnet18", page, 64)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights.pth is truncated"):
        build_backbone("resnet18", path, 64)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        build_backbone("resnet18", str(tmp_path / "nothing.pth"), 64)


def test_bad_names():
    with pytest.raises(ValueError, match="nothing is downloaded"):
        build_backbone("resnet18", True, 64)
    with pytest.raises(ValueError, match="timm has no model 'resnext_tiny_9'"):
        build_backbone("resnext_tiny_9", image_size=64)
    with pytest.raises(ValueError, match="torchvision has no model"):
        build_backbone("resnet19", image_size=64)
    with pytest.raises(ValueError, match="timm:vit_b_16"):
        build_backbone("torchvision:vit_b_16", image_size=64)
    with pytest.raises(ValueError, match="hub:resnet18"):
        build_backbone("hub:resnet18", image_size=64)
    with pytest.raises(ValueError, match="image_size"):
        build_backbone("resnet18", image_size=0)
    with pytest.raises(ValueError, match="images"):
        build_backbone("resnet18", image_size=64)(torch.zeros(3, 64, 64))


def test_torch_alone_suffices_until_a_backbone_is_built():
    code = """
import sys
for name in ("timm", "torchvision", "triton", "matplotlib"):
    sys.modules[name] = None
import sadcl.attention, sadcl.model, sadcl.prototypes, sadcl.bank
try:
    sadcl.model.SADCL(3, "resnet18")
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = forks.run(code, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "needs torchvision: pip install 'sadcl[train]'" in done.stdout
