"""One seed of a study on a table: how an arm is trained and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sadcl import functional as F
from sadcl.losses import KeyQueue, MultiLabelSupConLoss
from sadcl.metrics import multilabel_report
from sadcl.study.table.config import ARMS, Arm, TableConfig
from sadcl.study.table.data import Side, Table

__all__ = ["FIGURES", "Encoder", "TableBench", "figures"]

FIGURES = {  # name -> is more better?
    "mAP": True,
    "micro F1": True,
    "macro F1": True,
    "label ranking AP": True,
    "ranking loss": False,
    "coverage": False,
    "one-error": False,
}
_THRESHOLDS = 101


def _one(loss: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(loss, Tensor)
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda x, y: binary_cross_entropy_with_logits(x, y.clamp(min=0), weight=(y >= 0).to(x.dtype)),
    "asl": lambda x, y: F.asymmetric_loss(x, y, reduction="sum") / len(x),
    "zlpr": F.zlpr_loss,
    "two-way": lambda x, y: _one(F.two_way_loss(x, y)),
}


class Encoder(nn.Module):
    """A perceptron, and on top of it a projection into the space of the contrastive loss."""

    def __init__(self, features: int, config: TableConfig) -> None:
        super().__init__()
        sizes = [features, *config.widths]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.body = nn.Sequential(*layers)
        self.projection = nn.Linear(sizes[-1], config.proj_dim)
        self.width = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Vectors ``[n, proj_dim]`` to contrast; :attr:`body` gives what a classifier sees."""
        projected: Tensor = self.projection(self.body(x))
        return projected


class Trained(NamedTuple):
    """An encoder's body and a classifier on it, at the epoch that was best on the validation rows."""

    body: nn.Module
    classifier: nn.Module
    val_map: float

    def scores(self, side: Side) -> Tensor:
        """Probabilities ``[n, C]``."""
        with torch.no_grad():
            scores: Tensor = torch.sigmoid(self.classifier(self.body(side.features)))
        return scores


class TableBench:
    """What the arms of one seed share: rows, initial weights, and each weighting's pretrained encoder."""

    def __init__(self, config: TableConfig, table: Table, seed: int) -> None:
        self.config, self.seed = config, seed
        self.sides = table.split(seed, config.resplit)
        train = self.sides["train"]
        self.classes = train.labels.shape[1]
        torch.manual_seed(seed)
        self.initial = Encoder(train.features.shape[1], config)
        self.classifier = nn.Linear(self.initial.width, self.classes)
        self._pretrained: dict[str, Encoder] = {}

    def train(self, name: str) -> dict[str, float]:
        """Train an arm from the beginning (or from its weighting's pretrained encoder) and measure it."""
        arm = ARMS[name]
        if arm.stage != "joint":
            return self._measured(self._fit(arm, 0.0))
        tried = {weight: self._fit(arm, weight) for weight in self.config.joint_weights}
        best = max(tried, key=lambda weight: tried[weight].val_map)
        return {**self._measured(tried[best]), "joint_weight": best}

    def _measured(self, trained: Trained) -> dict[str, float]:
        val, test = self.sides["val"], self.sides["test"]
        threshold = best_threshold(trained.scores(val), val.labels)
        found = figures(trained.scores(test), test.labels, threshold)
        return {**found, "threshold": threshold, "validation mAP": trained.val_map}

    def _masked(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x * (torch.rand(x.shape, generator=generator, device=x.device) >= self.config.masking)

    def _batches(self, generator: torch.Generator) -> Iterator[Side]:
        """One epoch in a random order; a last batch that is not whole is left out, unless it is the only one."""
        train = self.sides["train"]
        order = torch.randperm(len(train.features), generator=generator, device=generator.device)
        size = min(self.config.batch_size, len(order))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield Side(train.features[rows], train.labels[rows])

    def pretrained(self, weighting: str) -> Encoder:
        """An encoder trained by a contrastive loss alone: keys of a slow copy of it, and a queue of them."""
        if weighting in self._pretrained:
            return self._pretrained[weighting]
        config = self.config
        generator = torch.Generator().manual_seed(self.seed)
        encoder = copy.deepcopy(self.initial)
        slow = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(config.momentum))
        queue = KeyQueue(config.queue, config.proj_dim, self.classes)
        loss_of = MultiLabelSupConLoss(weighting, config.temperature, include_batch=False)
        prototypes = self._prototypes(weighting)
        parameters = [*encoder.parameters(), *([] if prototypes is None else [prototypes])]
        optimizer = torch.optim.Adam(parameters, config.learning_rate, fused=True)
        done = 0
        while done < config.pretrain_steps:
            for batch in self._batches(generator):
                with torch.no_grad():
                    keys = slow(self._masked(batch.features, generator))
                vectors = encoder(self._masked(batch.features, generator))
                columns = torch.cat([keys, queue.keys]), torch.cat([batch.labels, queue.labels.to(batch.labels.dtype)])
                loss = loss_of(vectors, batch.labels, *columns, prototypes=prototypes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                slow.update_parameters(encoder)
                queue.enqueue(keys, batch.labels)
                done += 1
                if done == config.pretrain_steps:
                    break
        self._pretrained = {weighting: encoder}  # arms of a weighting come one after another
        return encoder

    def _prototypes(self, weighting: str) -> nn.Parameter | None:
        if weighting != "msc":
            return None
        drawn = torch.Generator().manual_seed(self.seed)
        start = torch.randn(self.classes, self.config.proj_dim, generator=drawn, device=drawn.device)
        return nn.Parameter(start)

    def _fit(self, arm: Arm, joint_weight: float) -> Trained:
        """A classifier, with the encoder or (probe) alone, at its best epoch on the validation rows."""
        config = self.config
        generator = torch.Generator().manual_seed(self.seed + 1000)
        start = self.pretrained(str(arm.weighting)) if arm.stage in ("probe", "finetuned") else self.initial
        encoder, classifier = copy.deepcopy(start), copy.deepcopy(self.classifier)
        probe = arm.stage == "probe"
        encoder.body.requires_grad_(not probe)
        joint = MultiLabelSupConLoss(str(arm.weighting), config.temperature) if arm.stage == "joint" else None
        prototypes = self._prototypes(str(arm.weighting)) if joint else None
        parameters = [p for p in (*encoder.parameters(), *classifier.parameters(), prototypes) if p is not None]
        rate = config.probe_rate if probe else config.learning_rate
        optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], rate, fused=True)
        loss_of, best = LOSSES[arm.loss], Trained(encoder.body, classifier, -1.0)
        for _ in range(config.epochs):
            for x, y in ((batch.features, batch.labels) for batch in self._batches(generator)):
                loss = loss_of(classifier(encoder.body(self._masked(x, generator) if arm.masked else x)), y)
                if joint:
                    views = torch.stack([encoder(self._masked(x, generator)) for _ in range(2)], 1)
                    loss = loss + joint_weight * joint(views, y, prototypes=prototypes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            val = self.sides["val"]
            reached = multilabel_report(Trained(encoder.body, classifier, 0).scores(val), val.labels).mAP
            if reached > best.val_map:
                best = Trained(copy.deepcopy(encoder.body), copy.deepcopy(classifier), reached)
        return best


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The one threshold for all classes that gives the best micro F1."""
    known = labels >= 0
    true = labels == 1
    shares = torch.linspace(0, 1, _THRESHOLDS, dtype=torch.float64, device=scores.device)
    candidates = torch.quantile(scores.flatten().double(), shares)
    predicted = (scores.double() > candidates[:, None, None]) & known
    f1 = 2 * (predicted & true).sum((1, 2)) / (predicted.sum((1, 2)) + true.sum()).clamp(min=1)
    return float(candidates[f1.argmax()])


def figures(scores: Tensor, labels: Tensor, threshold: float) -> dict[str, float]:
    """The figures of :data:`FIGURES`. Rankings are of the rows that have both a positive and a negative."""
    report = multilabel_report(scores, labels, threshold=threshold)
    both = ((labels == 1).any(1)) & ((labels == 0).any(1)) & (labels >= 0).all(1)
    positive, negative = labels[both] == 1, labels[both] == 0
    ranked = scores[both].double()
    higher = ranked[:, None, :] >= ranked[:, :, None]  # [n, c, other]
    rank = higher.sum(2)
    above = (higher & positive[:, None, :]).sum(2)
    wrong = (higher & (positive[:, :, None] & negative[:, None, :])).sum((1, 2))
    pairs = positive.sum(1) * negative.sum(1)
    top = ranked.argmax(1, keepdim=True)
    return {
        "mAP": report.mAP,
        "micro F1": report.OF1,
        "macro F1": report.CF1,
        "label ranking AP": float(((above / rank * positive).sum(1) / positive.sum(1)).mean()),
        "ranking loss": float((wrong / pairs).mean()),
        "coverage": float((rank * positive).amax(1).double().mean()),
        "one-error": float((~positive.gather(1, top)).double().mean()),
    }
