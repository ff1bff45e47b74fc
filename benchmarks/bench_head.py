"""Published-size step of the head: forward, the three losses, bank update, backward; ours against plain torch modules.

SADCLHead with E 2048, 4 heads, FFN 8192, one encoder and two decoder layers, 80 classes, 14 x 14 maps, float32. The
linear layers, which both sides leave to torch's matrix product here, are most of the work (:func:`flops` counts
them), so they bound the ratio; the plain step also pays for dense losses and for projecting every image's queries.

``python -m benchmarks.bench_head [8 32]`` names batch sizes; the step at 32 takes minutes in all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peers_head import PlainHead
from sadcl import AsymmetricLoss, DualContrastiveLoss, SADCLHead
from sadcl.testing import make_labels

WIDTH, HEADS, INNER, CLASSES, PROJECTED, SIDE = 2048, 4, 8192, 80, 1024, 14


def flops(batch: int) -> float:
    """Of the dense products of one step of ours: forward and backward, the attention cores in their cheaper form."""
    tokens, labels = batch * SIDE * SIDE, batch * CLASSES
    encoder = tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER + 2 * SIDE * SIDE * WIDTH)
    decoder = 2 * labels * 2 * WIDTH * INNER
    attention = 2 * labels * SIDE * SIDE * WIDTH * 2 * HEADS + 2 * 3 * labels * WIDTH * WIDTH
    projection = (2 * labels + CLASSES) * (WIDTH * WIDTH + WIDTH * PROJECTED)
    return 2.0 * 3 * (encoder + decoder + attention + projection)


class Step:
    """Both heads on the same weights, batch and bank."""

    def __init__(self, batch: int, width: int = WIDTH, inner: int = INNER, classes: int = CLASSES) -> None:
        torch.manual_seed(0)
        side = SIDE if width == WIDTH else 3
        sizes = {"num_heads": HEADS, "ffn_dim": inner, "proj_dim": width // 2, "feature_size": (side, side)}
        self.ours = SADCLHead(width, classes, dropout=0.0, bank_slots=batch, **sizes)
        self.plain = PlainHead(width, classes, HEADS, inner, width // 2, batch)
        self.plain.load_state_dict(self.ours.state_dict())
        self.map = torch.randn(batch, width, side, side, requires_grad=True)
        self.labels = make_labels(batch, classes)
        self.losses = DualContrastiveLoss(10, 10, 1, classification=AsymmetricLoss())

    def sadcl(self) -> Tensor:
        out = self.ours(self.map)
        losses = self.losses(out.embeddings, out.bank_embeddings, out.prototype_embeddings, self.labels, out.logits)
        self.ours.update_bank(out, self.labels)
        return losses.total

    def entries(self) -> dict[str, Callable[[], object]]:
        def step(loss: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], object]:
            leaves = [self.map, *module.parameters()]
            return lambda: torch.autograd.grad(loss(), leaves)

        return {
            "plain torch modules": step(lambda: self.plain.loss(self.map, self.labels), self.plain),
            "sadcl": step(self.sadcl, self.ours),
        }


def gate() -> None:
    """Raise if the two steps differ: losses, gradients and bank, on a narrow head with the same code."""
    step = Step(6, width=64, inner=128, classes=20)
    leaves = [dict(m.named_parameters()) for m in (step.ours, step.plain)]
    values = step.sadcl(), step.plain.loss(step.map, step.labels)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    names = list(leaves[0])
    got, want = (
        torch.autograd.grad(v, [step.map, *(x[n] for n in names)]) for v, x in zip(values, leaves, strict=True)
    )
    for name, a, b in zip(["map", *names], got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=f"gradient of {name}")
    torch.testing.assert_close(step.ours.memory_bank.slots, step.plain.memory_bank.slots, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["plain torch modules", "sadcl"])
@pytest.mark.parametrize("batch", [8, 32])
def test_head(benchmark: Callable[..., object], batch: int, name: str) -> None:
    gate()
    benchmark.pedantic(Step(batch).entries()[name], rounds=3, warmup_rounds=1)  # type: ignore[attr-defined]


def main(batches: Sequence[int] = (8, 32)) -> None:
    gate()
    for batch in batches:
        harness.compare(
            f"head {batch}",
            f"head + losses + bank + backward, B {batch}, published sizes, float32",
            Step(batch).entries(),
            flops=flops(batch),
            rounds=5 if batch <= 8 else 2,
            warmup=1,
            slow=0.0,
            slow_every=1,
        )


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or (8, 32))
