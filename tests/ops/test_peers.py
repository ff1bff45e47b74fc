"""The benchmarks' peers compute the same losses: no straw man, no wrong formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers, peers_mlc
from sadcl import functional as F
from sadcl.testing import make_features, make_labels, value_and_grads


@pytest.mark.parametrize("name", list(peers.SSCL))
@pytest.mark.parametrize("pattern", ["random", "empty_images"])
def test_sscl_peers(name: str, pattern: str) -> None:
    features, labels = make_features(6, 2, 7, 24), make_labels(6, 7, pattern)
    got = value_and_grads(lambda x: peers.SSCL[name](x, labels), features)
    want = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend="reference"), features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("peer", "weighting"),
    [(p, w) for p in (peers_mlc.dense, peers_mlc.leanest) for w in ("any", "jaccard", "mulsupcon", "simdis")]
    + [(peers_mlc.published, "jaccard")],
)
def test_image_level_peers(peer: Callable[..., Tensor], weighting: str) -> None:
    x, y, keys, key_labels = make_features(9, 24), make_labels(9, 5), make_features(7, 24, seed=2), make_labels(7, 5)
    for others in [(None, None)] if peer is peers_mlc.published else [(None, None), (keys, key_labels)]:
        got = value_and_grads(lambda x, o=others: peer(x, y, *o, weighting), x)
        options = {"keys": others[0], "key_labels": others[1], "include_batch": others[0] is None}
        want = value_and_grads(
            lambda x, o=options: F.multilabel_supcon_loss(
                x, y, weighting=weighting, temperature=peers_mlc.TEMPERATURE, backend="reference", **o
            ),
            x,
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
