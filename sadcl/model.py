"""SADCL: a backbone and the head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .backbones import Backbone, Preprocessing, build_backbone
from .head import SADCLHead, SADCLOutput

__all__ = ["SADCL", "Backbone", "SADCLHead", "SADCLOutput"]


class SADCL(nn.Module):
    """The whole model: backbone feature map, then :class:`SADCLHead`.

    The defaults are the published sizes: ResNet-101 at 448 pixels, hidden width = its 2048 channels (so no
    input projection), 4 heads, feed-forward 8192, 1 encoder and 2 decoder layers, 1024-wide embeddings;
    with 80 classes 200,037,456 trainable parameters.

    Args:
        num_classes: C.
        backbone: name, see :func:`sadcl.backbones.build_backbone`.
        pretrained: False, True (weights that a package carries) or a path.
        image_size: side or (H, W) of the input.
        hidden_dim: E; by default the backbone's channels.
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward parts; by default 4 E.
        encoder_layers: encoder depth.
        decoder_layers: decoder depth.
        proj_dim: P.
        dropout: of the head.
        contrastive: False for step 1: no projection, prototypes, bank.
        bank_slots: batch size of one process.
        input_proj: see :class:`SADCLHead`.
        feature_size: (H, W) of the feature map; by default what the backbone makes of image_size.
        frozen: parts of the backbone not to train.
        freeze_norm: keep the backbone's batch norms in eval mode and untrained.
        strides: of the backbone's maps that the head reads, such as ``(16, 32)``; None: the last map (of
            ``efficientnet_lite2`` these two).
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        pretrained: bool | str | os.PathLike[str] = False,
        *,
        image_size: int | tuple[int, int] = 448,
        hidden_dim: int | None = None,
        num_heads: int = 4,
        ffn_dim: int | None = None,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        proj_dim: int = 1024,
        dropout: float = 0.1,
        contrastive: bool = True,
        bank_slots: int = 32,
        input_proj: bool | None = None,
        feature_size: tuple[int, int] | None = None,
        frozen: str | Sequence[str] = "default",
        freeze_norm: bool = True,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(
            backbone, pretrained, image_size, frozen=frozen, freeze_norm=freeze_norm, strides=strides
        )
        self.head = SADCLHead(
            self.backbone.channels,
            num_classes,
            hidden_dim,
            num_heads,
            ffn_dim,
            encoder_layers,
            decoder_layers,
            proj_dim,
            self.backbone.feature_size if feature_size is None else feature_size,
            dropout,
            contrastive=contrastive,
            bank_slots=bank_slots,
            input_proj=input_proj,
        )
        self._arguments: dict[str, Any] = {
            "backbone": backbone,
            "image_size": list(self.preprocessing.size),
            "hidden_dim": self.head.hidden_dim,
            "num_heads": num_heads,
            "ffn_dim": self.head.ffn_dim,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "proj_dim": proj_dim,
            "dropout": dropout,
            "input_proj": not isinstance(self.head.input_proj, nn.Identity),
            "feature_size": list(self.head.position.size),
            "frozen": frozen if isinstance(frozen, str) else list(frozen),
            "freeze_norm": freeze_norm,
            "strides": None if self.backbone.strides is None else list(self.backbone.strides),
        }

    @property
    def preprocessing(self) -> Preprocessing:
        """What images have to go through."""
        return self.backbone.preprocessing

    @property
    def num_classes(self) -> int:
        """C, as it is now."""
        return self.head.num_classes

    def config(self) -> dict[str, Any]:
        """Plain arguments: ``SADCL(**config)`` has this model's parameters and takes its state dict."""
        bank = self.head.memory_bank
        return {
            "num_classes": self.num_classes,
            **self._arguments,
            "contrastive": bank is not None,
            "bank_slots": 32 if bank is None else bank.batch_slots,
        }

    def forward(
        self, images: Tensor, need_weights: bool | Literal["all"] = False, contrastive: bool = True
    ) -> SADCLOutput:
        """Recognise the labels of preprocessed images ``[B, 3, H, W]``; see :meth:`SADCLHead.forward`."""
        return self.head(self.backbone(images), need_weights, contrastive)
