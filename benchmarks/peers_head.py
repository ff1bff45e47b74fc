"""The published head and step as they are built from torch's own modules: nn.MultiheadAttention, dense losses, a loop
over labels for the bank. Parameters are named as :class:`sadcl.head.SADCLHead`'s, so that both run on the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from benchmarks.bench_asl import plain as plain_asl
from benchmarks.bench_pscl import loop as plain_pscl
from benchmarks.peers import sscl_dense
from sadcl.transformer import position_sine


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(relu(self.linear1(x)))


class Layer(nn.Module):
    """Post-norm attention and feed-forward; ``attention`` names the attribute, as in our modules."""

    def __init__(self, attention: str, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = attention
        setattr(self, attention, nn.MultiheadAttention(width, heads, batch_first=True))
        self.ffn = FeedForward(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = self.norm1(x + getattr(self, self.attention)(query, key, value, need_weights=False)[0])
        return self.norm2(x + self.ffn(x))


class PlainHead(nn.Module):
    """One encoder layer, two decoder layers, classifier, projection, prototypes and bank, without dropout."""

    def __init__(self, width: int, classes: int, heads: int, inner: int, proj_dim: int, slots: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Layer("self_attn", width, heads, inner)])
        self.decoder = nn.ModuleList([Layer("cross_attn", width, heads, inner) for _ in range(2)])
        self.decoder_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(classes, width))
        self.classifier = nn.ParameterDict({"weight": torch.empty(classes, width), "bias": torch.empty(classes)})
        self.projection = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.Linear(width, width), nn.Linear(width, proj_dim)])}
        )
        self.prototypes = nn.Parameter(torch.empty(classes, width))
        self.memory_bank = nn.Module()
        self.memory_bank.register_buffer("slots", torch.empty(slots, classes, width))

    def project(self, x: Tensor) -> Tensor:
        first, second = self.projection["layers"]
        return second(relu(first(x)))

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and label features ``[B, C, E]``."""
        batch, width, height, breadth = feature_map.shape
        memory = feature_map.flatten(2).transpose(1, 2)
        pos = position_sine(width, (height, breadth))
        for layer in self.encoder:
            memory = layer(memory, memory + pos, memory + pos, memory)
        target = torch.zeros(batch, *self.queries.shape)
        for layer in self.decoder:
            target = layer(target, target + self.queries, memory + pos, memory)
        features = self.decoder_norm(target)
        return (features * self.classifier["weight"]).sum(-1) + self.classifier["bias"], features

    def loss(self, feature_map: Tensor, labels: Tensor) -> Tensor:
        """One step's loss, bank update included."""
        logits, features = self(feature_map)
        embeddings, bank = self.project(features), self.project(self.memory_bank.slots[: len(labels)].clone())
        total = 10 * sscl_dense(torch.stack([embeddings, bank], dim=1), labels)
        total = total + 10 * plain_pscl(embeddings, self.project(self.prototypes), labels)
        total = total + plain_asl(logits, labels)
        confident = logits.sigmoid() > 0.8
        for b, c in (labels == 1).nonzero().tolist():
            if confident[b, c]:
                self.memory_bank.slots[b, c] = features[b, c].detach()
        return total
