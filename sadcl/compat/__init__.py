"""The released code's names: same calls, same numbers (``formulation="released"``), none of its N x N matrices.

Replace ``from models.loss... import MultiSupConLoss`` by ``from sadcl.compat import MultiSupConLoss``. What the
released formulation does differently from the paper is in docs/faithfulness.md.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from ..compat_checkpoints import head_from_released, load_released_checkpoint
from ..functional import asymmetric_loss, prototype_contrastive_loss, sample_contrastive_loss

__all__ = [
    "AsymmetricLossOptimized",
    "MultiSupConLoss",
    "Semantic2PrototypeConLoss",
    "head_from_released",
    "load_released_checkpoint",
]


class MultiSupConLoss(nn.Module):
    """The released SSCL: :func:`sadcl.functional.sample_contrastive_loss` with ``formulation="released"``.

    Args:
        temperature: number > 0.
        contrast_mode: only ``"all"`` (the released code has no other).
        base_temperature: the loss is scaled by ``temperature / base_temperature``.
    """

    def __init__(self, temperature: float = 0.2, contrast_mode: str = "all", base_temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = check.check_choice("contrast_mode", contrast_mode, ("all",))
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, multi: bool = True
    ) -> Tensor:
        """Loss of ``features [B, V, C, D]`` with ``labels [B, C]``; ``mask`` must be ``None`` and ``multi`` true."""
        if labels is None or mask is not None or not multi:
            raise ValueError("MultiSupConLoss: expected labels [B, C], mask=None and multi=True (the released use)")
        return sample_contrastive_loss(
            features,
            labels,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            formulation="released",
        )


class Semantic2PrototypeConLoss(nn.Module):
    """The released PSCL: :func:`sadcl.functional.prototype_contrastive_loss` with ``formulation="released"``.

    Args:
        metric: only ``"cos"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        temperature: number > 0.
    """

    def __init__(self, metric: str = "cos", reduction: str = "mean", temperature: float = 0.07) -> None:
        super().__init__()
        self.metric = check.check_choice("metric", metric, ("cos",))
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature

    def forward(self, semantic_embed: Tensor, proto_embed: Tensor, target: Tensor) -> Tensor:
        """Loss of ``semantic_embed [B, C, D]``, ``proto_embed [1, C, D]`` or ``[C, D]`` and ``target [B, C]``."""
        return prototype_contrastive_loss(
            semantic_embed,
            proto_embed,
            target,
            temperature=self.temperature,
            formulation="released",
            reduction=self.reduction,
        )


class AsymmetricLossOptimized(nn.Module):
    """The released ASL: :func:`sadcl.functional.asymmetric_loss` with ``reduction="released"``.

    Args:
        gamma_neg: exponent on negatives.
        gamma_pos: exponent on positives.
        clip: probability margin.
        eps: floor of the probabilities.
        disable_torch_grad_focal_loss: no gradient through the focusing weight.
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float | None = 0.05,
        eps: float = 1e-5,
        disable_torch_grad_focal_loss: bool = False,
    ) -> None:
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.eps = gamma_neg, gamma_pos, eps
        self.clip = 0.0 if clip is None else clip
        self.disable_torch_grad_focal_loss = disable_torch_grad_focal_loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of logits ``x [B, C]`` and labels ``y [B, C]``."""
        return asymmetric_loss(
            x,
            y,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            eps=self.eps,
            detach_focal_weight=self.disable_torch_grad_focal_loss,
            reduction="released",
        )
