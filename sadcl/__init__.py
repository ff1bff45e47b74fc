"""Fused kernels and models for multi-label classification with label-level attention and dual contrastive losses."""

from ._backends import BackendInfo, backends
from .losses import (
    AsymmetricLoss,
    DualContrastiveLoss,
    PrototypeContrastiveLoss,
    SampleContrastiveLoss,
    SupConLoss,
)

__version__ = "0.1.0"

__all__ = [
    "AsymmetricLoss",
    "BackendInfo",
    "DualContrastiveLoss",
    "PrototypeContrastiveLoss",
    "SampleContrastiveLoss",
    "SupConLoss",
    "backends",
]
