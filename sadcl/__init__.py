"""Fused kernels and models for multi-label classification with label-level attention and dual contrastive losses."""

import importlib
from typing import Any

from ._backends import BackendInfo, backends
from .attention import LabelAttention
from .bank import MemoryBank
from .losses import (
    AsymmetricLoss,
    DualContrastiveLoss,
    KeyQueue,
    MultiLabelSupConLoss,
    PrototypeContrastiveLoss,
    SampleContrastiveLoss,
    SupConLoss,
    TwoWayLoss,
    ZLPRLoss,
)
from .model import SADCL, SADCLHead, SADCLOutput

__version__ = "0.1.0"

__all__ = [
    "SADCL",
    "AsymmetricLoss",
    "BackendInfo",
    "DualContrastiveLoss",
    "KeyQueue",
    "LabelAttention",
    "MemoryBank",
    "MultiLabelSupConLoss",
    "PrototypeContrastiveLoss",
    "SADCLHead",
    "SADCLOutput",
    "SampleContrastiveLoss",
    "SupConLoss",
    "TwoWayLoss",
    "ZLPRLoss",
    "backends",
]

_LATER = ("checkpoint", "compat", "metrics", "prototypes", "testing")


def __getattr__(name: str) -> Any:
    """Import a module of the package when ``sadcl.<name>`` is first asked for: ``import sadcl`` stays light."""
    if name in _LATER:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
