"""Fused kernels and models for multi-label classification with label-level attention and dual contrastive losses."""

from ._backends import BackendInfo, backends
from .attention import LabelAttention
from .bank import MemoryBank
from .losses import (
    AsymmetricLoss,
    DualContrastiveLoss,
    PrototypeContrastiveLoss,
    SampleContrastiveLoss,
    SupConLoss,
)
from .model import SADCL, SADCLHead, SADCLOutput

__version__ = "0.1.0"

__all__ = [
    "SADCL",
    "AsymmetricLoss",
    "BackendInfo",
    "DualContrastiveLoss",
    "LabelAttention",
    "MemoryBank",
    "PrototypeContrastiveLoss",
    "SADCLHead",
    "SADCLOutput",
    "SampleContrastiveLoss",
    "SupConLoss",
    "backends",
]
