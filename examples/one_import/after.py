"""The script of ``before.py`` with one import replaced: the same losses, without an N x N matrix."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generated import table

from sadcl import SampleContrastiveLoss

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
torch.manual_seed(0)
features, labels = table(rows=512)
encoder = nn.Sequential(
    nn.Linear(features.shape[1], 128), nn.ReLU(), nn.Linear(128, 14 * 64), nn.Unflatten(1, (14, 64))
)
loss_of = SampleContrastiveLoss(temperature=0.2)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

start = time.perf_counter()
for step in range(steps):
    chosen = torch.randperm(len(features))[:64]
    views = torch.stack([features[chosen], features[chosen] + 0.1 * torch.randn(64, features.shape[1])], dim=1)
    embeddings = encoder(views.flatten(0, 1)).unflatten(0, (64, 2))  # [images, views, labels, width]
    loss = loss_of(embeddings, labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, steps - 1):
        print(f"step {step}: loss {loss.item():.4f}")
print(f"{steps} steps in {time.perf_counter() - start:.1f} s")
