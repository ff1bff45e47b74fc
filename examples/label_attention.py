"""Label attention on top of any timm backbone: a query for every label looks for its own evidence.

    python examples/label_attention.py                               # a tiny network without pretrained weights
    python examples/label_attention.py --backbone vit_base_patch16_dinov3 --weights weights.safetensors --size 448

Networks that end in a map and networks that end in tokens are both read as ``[B, channels, H, W]``.
"""

from __future__ import annotations

import argparse

import torch
from generated import NAMES, pictures
from torch import Tensor, nn

from sadcl import AsymmetricLoss, LabelAttention
from sadcl.backbones import build_backbone
from sadcl.metrics import multilabel_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backbone", default="test_resnet", help="any name out of timm.list_models()")
parser.add_argument("--weights", help="a file of timm's weights; without it the network starts from random ones")
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--pictures", type=int, default=600)
options = parser.parse_args()


class Recogniser(nn.Module):
    """Backbone, one attention block of label queries, and one linear classifier a label."""

    def __init__(self, num_classes: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        name, weights = f"timm:{options.backbone}", options.weights or False
        self.backbone = build_backbone(name, weights, options.size, frozen="none", freeze_norm=False)
        self.project = nn.Conv2d(self.backbone.channels, width, 1)
        self.positions = nn.Parameter(torch.zeros(self.backbone.feature_size[0] * self.backbone.feature_size[1], width))
        self.queries = nn.Parameter(torch.randn(num_classes, width))
        self.attention = LabelAttention(width, heads)
        self.weight = nn.Parameter(torch.randn(num_classes, width) * width**-0.5)
        self.bias = nn.Parameter(torch.full((num_classes,), -2.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Preprocessed images to logits ``[B, C]`` and, in eval mode, maps ``[B, heads, C, L]``."""
        memory = self.project(self.backbone(images)).flatten(2).transpose(1, 2)  # [B, L, width]
        found, maps = self.attention(self.queries, memory, self.positions, need_weights=not self.training)
        return (found * self.weight).sum(-1) + self.bias, maps


torch.manual_seed(0)
images, labels = pictures(options.pictures, options.size)
held_out, truth = pictures(200, options.size, seed=1)
model = Recogniser(len(NAMES))
normalize = model.backbone.preprocessing.normalize
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
loss_of = AsymmetricLoss(gamma_neg=2, gamma_pos=0, clip=0.0, reduction="mean")
for _ in range(options.epochs):
    model.train()
    for chosen in torch.randperm(len(images)).split(32):
        logits, _ = model(normalize(images[chosen]))
        loss = loss_of(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    logits, maps = model(normalize(held_out))
print(f"mAP on held-out pictures: {multilabel_report(logits.sigmoid(), truth).mAP:.3f}")
side = model.backbone.feature_size
where = maps[0].mean(0)[truth[0].bool()].unflatten(1, side)
for name, map_of in zip([n for n, there in zip(NAMES, truth[0], strict=True) if there], where, strict=True):
    row, column = divmod(int(map_of.argmax()), side[1])
    print(f"picture 0: {name} looked at most in row {row}, column {column} of {side[0]} x {side[1]}")
