"""The losses as modules, a file each; the equations are in :mod:`sadcl.functional`, in files of the same names."""

from .asl import AsymmetricLoss
from .dual import DEFAULT_WEIGHTS, DualContrastiveLoss, DualContrastiveLossOutput
from .pscl import PrototypeContrastiveLoss
from .sscl import SampleContrastiveLoss
from .supcon import SupConLoss

__all__ = [
    "DEFAULT_WEIGHTS",
    "AsymmetricLoss",
    "DualContrastiveLoss",
    "DualContrastiveLossOutput",
    "PrototypeContrastiveLoss",
    "SampleContrastiveLoss",
    "SupConLoss",
]
