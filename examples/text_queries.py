"""Label queries from text: a label that no training picture has is recognised by its words.

    python examples/text_queries.py

Pictures show coloured shapes; one combination is left out of training. Queries and classifier rows are made from the
labels' text alone, so the class set can change after training: here to all nine, the unseen one included. The text
embeddings are the labels' words; put those of your text encoder (CLIP, SigLIP) in their place.
"""

from __future__ import annotations

import argparse

import torch
from generated import NAMES, pictures
from torch import Tensor, nn

from sadcl import AsymmetricLoss, LabelAttention
from sadcl.metrics import average_precision

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--unseen", default="blue square", choices=NAMES)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--pictures", type=int, default=800)
options = parser.parse_args()

WORDS = sorted({word for name in NAMES for word in name.split()})


def embed(names: list[str]) -> Tensor:
    """Text embeddings ``[names, words]``."""
    return torch.tensor([[float(word in name.split()) for word in WORDS] for name in names])


class TextRecogniser(nn.Module):
    """Picture and text embeddings of the labels to logits; has no parameter that belongs to one label."""

    def __init__(self, text_width: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.to_query = nn.Linear(text_width, width, bias=False)
        self.to_weight = nn.Linear(text_width, width, bias=False)
        self.attention = LabelAttention(width, num_heads=2)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """``[B, 3, H, W]`` and ``[C, text_width]`` to ``[B, C]``."""
        memory = self.body(images).flatten(2).transpose(1, 2)
        found, _ = self.attention(self.to_query(text), memory)
        return (found * self.to_weight(text)).sum(-1) + self.bias


torch.manual_seed(0)
seen = [index for index, name in enumerate(NAMES) if name != options.unseen]
images, labels = pictures(options.pictures, size=24, allowed=seen)
images, text = images / 255 - 0.5, embed(NAMES)
model = TextRecogniser(text.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_of = AsymmetricLoss(gamma_neg=2, gamma_pos=0, clip=0.0, reduction="mean")
for _ in range(options.epochs):
    for chosen in torch.randperm(len(images)).split(50):
        loss = loss_of(model(images[chosen], text[seen]), labels[chosen][:, seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

held_out, truth = pictures(400, size=24, seed=1)
with torch.no_grad():
    scores = model(held_out / 255 - 0.5, text)
ap = average_precision(scores, truth)
share = truth.mean(0)
for index, name in enumerate(NAMES):
    note = "  <- not in any training picture" if index not in seen else ""
    print(f"{name:>13}: AP {ap[index]:.3f} (chance {share[index]:.2f}){note}")
