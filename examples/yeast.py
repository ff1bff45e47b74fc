"""Multi-label SupCon on yeast: 2,417 genes, 103 features, 14 labels, 4.2 labels a gene.

    python examples/yeast.py                   # a small generated table of the same kind
    python examples/yeast.py --openml          # scikit-learn fetches yeast from OpenML
    python examples/yeast.py --csv yeast.csv   # your copy: a header, features, then the 14 labels (0/1 or FALSE/TRUE)

An encoder is pretrained with each weighting of shared labels; a linear classifier on its frozen output is then compared
with one on the raw features, by mean average precision on held-out rows.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from generated import table
from torch import Tensor, nn

from sadcl import MultiLabelSupConLoss
from sadcl.metrics import multilabel_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
source = parser.add_mutually_exclusive_group()
source.add_argument("--openml", action="store_true", help="fetch yeast through scikit-learn")
source.add_argument("--csv", help="path of a table with a header")
parser.add_argument("--labels", type=int, default=14, help="how many of the table's last columns are labels")
parser.add_argument("--weightings", nargs="+", default=["mulsupcon", "any", "jaccard"])
parser.add_argument("--epochs", type=int, default=30)
options = parser.parse_args()


def read() -> tuple[Tensor, Tensor]:
    """Features and labels of the table that was asked for."""
    if options.openml:
        from sklearn.datasets import fetch_openml

        features, labels = fetch_openml("yeast", version=4, return_X_y=True, as_frame=False)
        return torch.from_numpy(features.astype(np.float32)), torch.from_numpy((labels == "TRUE").astype(np.float32))
    if options.csv:
        cells = np.genfromtxt(options.csv, delimiter=",", skip_header=1, dtype=str)
        positive = np.isin(np.char.upper(cells[:, -options.labels :]), ("1", "1.0", "TRUE"))
        return torch.from_numpy(cells[:, : -options.labels].astype(np.float32)), torch.from_numpy(positive).float()
    return table(rows=800)


def batches(rows: int) -> tuple[Tensor, ...]:
    """A shuffle of the rows in parts of 128."""
    return torch.randperm(rows).split(128)


def linear_map(features: Tensor, labels: Tensor, held_out: Tensor, truth: Tensor) -> float:
    """mAP of a linear classifier that is trained on the features and asked about the held-out ones."""
    mean, spread = features.mean(0), features.std(0) + 1e-6
    features, held_out = (features - mean) / spread, (held_out - mean) / spread
    probe = nn.Linear(features.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-1)
    for _ in range(options.epochs):
        for chosen in batches(len(features)):
            loss = nn.functional.binary_cross_entropy_with_logits(probe(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return multilabel_report(probe(held_out).detach().sigmoid(), truth).mAP


def pretrain(weighting: str, features: Tensor, labels: Tensor) -> nn.Module:
    """An encoder trained with the contrastive loss alone; two views are two dropouts of the same row."""
    encoder = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(features.shape[1], 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 128)
    )
    head = nn.Sequential(nn.ReLU(), nn.Linear(128, 64))
    loss_of = MultiLabelSupConLoss(weighting, temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=1e-2)
    for _ in range(options.epochs):
        for chosen in batches(len(features)):
            rows = features[chosen]
            views = torch.stack([head(encoder(rows)), head(encoder(rows))], dim=1)  # [batch, views, width]
            loss = loss_of(views, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder.eval()


torch.manual_seed(0)
x, y = read()
order = torch.randperm(len(x))
train, test = order[: len(x) * 3 // 4], order[len(x) * 3 // 4 :]
print(f"{len(x)} rows, {x.shape[1]} features, {y.shape[1]} labels, {y.sum(1).mean():.1f} labels a row")
print(f"{'raw features':>14}: mAP {linear_map(x[train], y[train], x[test], y[test]):.3f}")
for name in options.weightings:
    encode = pretrain(name, x[train], y[train])
    with torch.no_grad():
        parts = encode(x[train]), encode(x[test])
    print(f"{name:>14}: mAP {linear_map(parts[0], y[train], parts[1], y[test]):.3f}")
