"""The benchmarks' peers compute the same losses: no straw man, no wrong formula."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from sadcl import functional as F
from sadcl.testing import make_features, make_labels, value_and_grads


@pytest.mark.parametrize("name", list(peers.SSCL))
@pytest.mark.parametrize("pattern", ["random", "empty_images"])
def test_sscl_peers(name: str, pattern: str) -> None:
    features, labels = make_features(6, 2, 7, 24), make_labels(6, 7, pattern)
    got = value_and_grads(lambda x: peers.SSCL[name](x, labels), features)
    want = value_and_grads(lambda x: F.sample_contrastive_loss(x, labels, backend="reference"), features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
