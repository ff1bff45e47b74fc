"""ASL, forward + backward, 9,605 classes (Open Images size): ours against the plain formula, compiled and timm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from sadcl import functional as F
from sadcl.testing import make_labels, value_and_grads

BATCH, CLASSES, LABELS_PER_IMAGE = 256, 9605, 6.0


def plain(x: Tensor, y: Tensor, gamma_neg: float = 4, gamma_pos: float = 1, clip: float = 0.05) -> Tensor:
    """The formula as it is written down."""
    p = torch.sigmoid(x)
    q = (1 - p + clip).clamp(max=1)
    log_likelihood = y * p.clamp(min=1e-8).log() + (1 - y) * q.clamp(min=1e-8).log()
    weight = (1 - p * y - q * (1 - y)) ** (gamma_pos * y + gamma_neg * (1 - y))
    return -(log_likelihood * weight).sum()


def _entries() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    entries: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain formula": plain,
        "plain, torch.compile": torch.compile(plain),
        "sadcl torch": lambda x, y: F.asymmetric_loss(x, y, backend="torch"),
        "sadcl": F.asymmetric_loss,
    }
    try:
        from timm.loss import AsymmetricLossMultiLabel
    except ImportError:
        return entries
    timm = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05, disable_torch_grad_focal_loss=False)
    return {"timm": lambda x, y: timm(x, y) * x.shape[0], **entries}  # timm's is the mean over images


ENTRIES = _entries()


def problem() -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0)) - 2
    return logits, make_labels(BATCH, CLASSES, labels_per_image=LABELS_PER_IMAGE)


def gate(name: str) -> None:
    """Raise if the entry is not the loss."""
    logits, labels = problem()
    got = value_and_grads(lambda x: ENTRIES[name](x, labels), logits)
    want = value_and_grads(lambda x: F.asymmetric_loss(x.double(), labels, backend="reference").float(), logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_asl(benchmark: Callable[..., object], name: str) -> None:
    gate(name)
    logits, labels = problem()
    benchmark(harness.forward_backward(lambda x: ENTRIES[name](x, labels), logits))


def main() -> None:
    logits, labels = problem()
    for name in ENTRIES:
        gate(name)
    harness.compare(
        "asl",
        f"ASL forward + backward, [{BATCH}, {CLASSES}] float32; floor: read logits and labels, write the gradient",
        {name: harness.forward_backward(lambda x, f=entry: f(x, labels), logits) for name, entry in ENTRIES.items()},
        traffic=3 * logits.numel() * 4,
    )
    for dtype in (torch.bfloat16, torch.float16):
        narrow = {name: ENTRIES[name] for name in ("plain, torch.compile", "sadcl")}
        runs = {
            name: harness.forward_backward(lambda x, f=entry: f(x, labels), logits.to(dtype))
            for name, entry in narrow.items()
        }
        runs["sadcl, float32"] = harness.forward_backward(lambda x: ENTRIES["sadcl"](x, labels), logits)
        about = f"ASL forward + backward, [{BATCH}, {CLASSES}] {str(dtype)[6:]} logits, float32 labels"
        harness.compare(f"asl {str(dtype)[6:]}", about, runs, traffic=logits.numel() * (2 + 4 + 2))


if __name__ == "__main__":
    main()
