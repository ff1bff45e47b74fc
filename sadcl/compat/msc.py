"""MSC's name (arXiv 2404.08720): prototypes of the classes among the columns.

The published code adds ``1e-8`` to two divisors and makes an image without labels NaN or 0 by them; here it adds 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import multilabel_supcon_loss


class LossContrastiveMSC(nn.Module):
    """:func:`sadcl.functional.multilabel_supcon_loss` with ``weighting="msc"``.

    Args:
        alpha: weight of rows and keys among the positives, >= 0.
        beta: weight of rows and keys in the denominator, >= 0.
        temp: temperature > 0.
    """

    def __init__(self, alpha: float, beta: float, temp: float = 0.07) -> None:
        super().__init__()
        self.alpha, self.beta, self.temp = alpha, beta, temp

    def forward(
        self,
        output_query: Tensor,
        labels_query: Tensor,
        prototype: Tensor,
        queue_feats: Tensor | None = None,
        queue_labels: Tensor | None = None,
        key_feats: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``output_query [B, D]`` with ``labels_query [B, C]`` and ``prototype [C, D]``; keys and a queue, each
        with its labels, are detached and join the batch as columns."""
        pairs = ((key_feats, key_labels), (queue_feats, queue_labels))
        given = [(x.detach().to(output_query.dtype), y) for x, y in pairs if x is not None and y is not None]
        keys, of_keys = None, None
        if given:
            keys = torch.cat([x for x, _ in given])
            of_keys = torch.cat([y.to(labels_query.dtype) for _, y in given])
        return multilabel_supcon_loss(
            output_query, labels_query, weighting="msc", temperature=self.temp, alpha=self.alpha, beta=self.beta,
            prototypes=prototype, keys=keys, key_labels=of_keys,
        )  # fmt: skip
