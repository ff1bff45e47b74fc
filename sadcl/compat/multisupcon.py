"""MultiSupCon's name (NeurIPS workshop 2022): positives by the Jaccard similarity of label sets.

Where the published code divides by zero (an anchor without a positive makes its loss NaN), an anchor adds 0 here; its
``1e-8`` beside the union is not added.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from ..functional import multilabel_supcon_loss


class MultiSupConLoss(nn.Module):
    """:func:`sadcl.functional.multilabel_supcon_loss` with ``weighting="jaccard"``; features are not normalised again.

    Args:
        temperature: number > 0.
        contrast_mode: ``"all"``, or ``"one"``: only the first view of an image is an anchor.
        base_temperature: the loss is scaled by ``temperature / base_temperature``.
        c_treshold: the least similarity of a positive (spelt as published).
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        c_treshold: float = 0.3,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.base_temperature = base_temperature
        self.c_treshold = c_treshold

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, multi: bool = True
    ) -> Tensor:
        """Loss of unit vectors ``features [B, V, ...]`` with ``labels [B, C]``; ``mask`` must be ``None``.

        Raises:
            ValueError: without labels, with a mask, or ``multi=False`` (:class:`sadcl.SupConLoss` has both).
        """
        if labels is None or mask is not None or not multi:
            raise ValueError("MultiSupConLoss: expected labels [B, C], mask=None and multi=True; else see SupConLoss")
        if isinstance(features, Tensor) and features.dim() > 3:
            features = features.flatten(2)
        check.check_tensor("features", features, (3,), "[B, V, D] or [B, V, ...]")
        rows = multilabel_supcon_loss(
            features, labels, weighting="jaccard", temperature=self.temperature, threshold=self.c_treshold,
            base_temperature=self.base_temperature, normalize=False, reduction="none",
        )  # fmt: skip
        return (rows[:, :1] if self.contrast_mode == "one" else rows).mean()
