"""What a rank sends, counted by a wrapper around the collectives, is what docs/scaling.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import ranks

from benchmarks.bench_group import Size, bytes_sent, counted, pscl_bytes_sent
from sadcl import functional as F
from sadcl.testing import make_features, make_labels

B, V, C, D = 6, 2, 4, 8


def step(rank: int, world: int, loss: str, options: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """Bytes of a forward and of a backward, collectives of both, most active pairs of a rank."""
    images = B - rank
    x = make_features(images, V, C, D, dtype=options.pop("dtype", torch.float32), seed=rank).requires_grad_()
    labels = make_labels(images, C, "random", seed=rank)
    more = {"group": "world", **options}
    calls = {
        "sscl": lambda: F.sample_contrastive_loss(x, labels, **more),
        "pscl": lambda: F.prototype_contrastive_loss(x[:, 0], make_features(C, D).to(x.dtype), labels, **more),
        "supcon": lambda: F.supcon_loss(x[:, :, 0], labels[:, 0], **more),
        "mulsupcon": lambda: F.multilabel_supcon_loss(x[:, :, 0], labels, **more),
    }
    with counted() as sent:
        value = calls[loss]()
        forward = sent["bytes"]
        value.backward()
    return {"forward": forward, "backward": sent["bytes"] - forward}, sent["calls"], int((labels == 1).sum())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["sscl", "supcon", "mulsupcon"])
def test_bytes_are_the_formulas(loss: str, world: int, ring: bool, dtype: torch.dtype) -> None:
    """Header and one gather forward, four numbers a row backward; vectors in their own dtype, once (ring: twice)."""
    answers = ranks(world).run(step, world, loss, {"ring": ring, "dtype": dtype})
    most = max(pairs for *_, pairs in answers)
    items, tag = {"sscl": (most, 4), "supcon": (B, 8), "mulsupcon": (B, C)}[loss]
    expected = bytes_sent(Size(world, items * V, D, items, tag, dtype.itemsize), ring)
    for sent, calls, _ in answers:
        assert sent == expected
        assert calls == 3 + (2 * (world - 1) if ring else 0)


def test_prototypes_cost_numbers_of_classes_alone() -> None:
    for sent, calls, _ in ranks(3).run(step, 3, "pscl", {}):
        assert sent == pscl_bytes_sent(3, C) and calls == 3


def test_keys_alone_need_no_vectors_of_others() -> None:
    assert ranks(2).run(keys_alone) == [56, 56]  # the header


def keys_alone(rank: int) -> int:
    x, keys = make_features(B, D).requires_grad_(), make_features(5, D)
    with counted() as sent:
        F.multilabel_supcon_loss(
            x, make_labels(B, C), keys=keys, key_labels=make_labels(5, C), include_batch=False, group="world"
        ).backward()
    return sent["bytes"]
