"""Contrast with more rows than a batch holds: a momentum encoder's keys in a queue (MoCo), for rows of several labels.

    python examples/momentum_queue.py

The momentum encoder is torch's own ``AveragedModel``. A queue starts empty, and an empty queue is a loss of 0.
"""

from __future__ import annotations

import argparse

import torch
from generated import table
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sadcl import KeyQueue, MultiLabelSupConLoss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", type=int, default=512, help="keys that the queue holds")
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()

torch.manual_seed(0)
features, labels = table(rows=1000)
width, classes = 64, labels.shape[1]
encoder = nn.Sequential(nn.Linear(features.shape[1], 256), nn.ReLU(), nn.Linear(256, width))
average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.99))
queue = KeyQueue(options.size, width, classes)
loss_of = MultiLabelSupConLoss("mulsupcon", temperature=0.1, include_batch=False)  # the keys alone are columns
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

for step in range(options.steps):
    chosen = torch.randperm(len(features))[:32]
    rows = features[chosen]
    view, other = (rows + 0.1 * torch.randn_like(rows) for _ in range(2))
    loss = loss_of(encoder(view), labels[chosen], queue.keys, queue.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(encoder)
    with torch.no_grad():
        queue.enqueue(average(other), labels[chosen])  # after the backward: it writes into queue.keys
    if step % 25 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}, {len(queue.keys)} keys")
