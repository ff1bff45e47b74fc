"""MulSupCon's patterns (AAAI 2024) as one module.

The published code makes scores, masks and weights first and gives them to a loss; here the loss takes the vectors, so
that no matrix of scores is made. Its patterns ``"all"`` and ``"any"`` are NaN where an anchor has no positive; here
such an anchor adds 0.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from ..functional import multilabel_supcon_loss

_PATTERNS = {"all": "all", "any": "any", "MulSupCon": "mulsupcon"}


class MulSupConLoss(nn.Module):
    """:func:`sadcl.functional.multilabel_supcon_loss` with keys alone as columns (a queue).

    Args:
        pattern: ``"all"``, ``"any"`` or ``"MulSupCon"``.
        with_weight: of ``"MulSupCon"``: every image counts the same (``per_image``).
        temperature: number > 0.
    """

    def __init__(self, pattern: str = "MulSupCon", with_weight: bool = False, temperature: float = 0.1) -> None:
        super().__init__()
        self.pattern = check.check_choice("pattern", pattern, tuple(_PATTERNS))
        self.with_weight = with_weight
        self.temperature = temperature

    def forward(self, features: Tensor, batch_labels: Tensor, ref_features: Tensor, ref_labels: Tensor) -> Tensor:
        """Loss of ``features [B, D]`` with ``batch_labels [B, C]`` against ``ref_features [K, D]`` with
        ``ref_labels [K, C]``; cosines, so both may have any length."""
        weighting = _PATTERNS[self.pattern]
        return multilabel_supcon_loss(
            features, batch_labels, weighting=weighting, temperature=self.temperature, keys=ref_features,
            key_labels=ref_labels, include_batch=False, per_image=self.with_weight and weighting == "mulsupcon",
        )  # fmt: skip
