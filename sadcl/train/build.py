"""The network and the losses that a config describes."""

from __future__ import annotations

from sadcl.losses import AsymmetricLoss, DualContrastiveLoss
from sadcl.model import SADCL
from sadcl.train.config import LossConfig, TrainConfig

__all__ = ["build_model", "make_loss"]


def build_model(config: TrainConfig, num_classes: int) -> SADCL:
    """The step-1 model of a config: no projection, prototypes or bank yet.

    Raises:
        ValueError: the backbone cannot take pictures of this size, or of ``eval_image_size``.
    """
    m = config.model
    model = SADCL(
        num_classes,
        m.backbone,
        m.pretrained,
        image_size=config.data.image_size,
        hidden_dim=m.hidden_dim,
        num_heads=m.num_heads,
        ffn_dim=m.ffn_dim,
        encoder_layers=m.encoder_layers,
        decoder_layers=m.decoder_layers,
        proj_dim=m.proj_dim,
        dropout=m.dropout,
        contrastive=False,
        frozen=m.frozen if m.train_backbone else "all",
        strides=m.strides,
    )
    if config.eval_image_size:
        try:
            model.backbone.check_size((config.eval_image_size, config.eval_image_size))
        except ValueError as error:
            raise ValueError(f"eval_image_size: {error}") from error
    return model


def make_loss(config: LossConfig) -> DualContrastiveLoss:
    """The method's three losses with the run's weights and constants."""
    return DualContrastiveLoss(
        config.sample_weight,
        config.prototype_weight,
        config.classification_weight,
        sample_temperature=config.sample_temperature,
        prototype_temperature=config.prototype_temperature,
        formulation=config.formulation,
        classification=AsymmetricLoss(config.gamma_neg, config.gamma_pos, config.clip, 1e-5, True, "released"),
        group="world" if config.batch == "global" else None,
    )
