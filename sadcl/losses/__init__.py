"""The losses as modules, a file each; the equations are in :mod:`sadcl.functional`, in files of the same names."""

from .asl import AsymmetricLoss
from .dual import DEFAULT_WEIGHTS, DualContrastiveLoss, DualContrastiveLossOutput
from .mlc import MultiLabelSupConLoss
from .pscl import PrototypeContrastiveLoss
from .queue import KeyQueue
from .sscl import SampleContrastiveLoss
from .supcon import SupConLoss
from .two_way import TwoWayLoss
from .zlpr import ZLPRLoss

__all__ = [
    "DEFAULT_WEIGHTS",
    "AsymmetricLoss",
    "DualContrastiveLoss",
    "DualContrastiveLossOutput",
    "KeyQueue",
    "MultiLabelSupConLoss",
    "PrototypeContrastiveLoss",
    "SampleContrastiveLoss",
    "SupConLoss",
    "TwoWayLoss",
    "ZLPRLoss",
]
