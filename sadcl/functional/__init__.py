"""The losses as functions: validate, compact, op, reduce.

Weights multiply the elements that ``reduction="none"`` returns; the divisor of ``reduction="mean"`` stays the count
(``|I|``, ``sum(y)``), as in ``torch.nn.BCEWithLogitsLoss``.
"""

from ..ops.compact import Active
from .asl import asymmetric_loss
from .compact import ContrastiveStats, compact_labels, contrastive_stats
from .dual import DualParts, dual_contrastive_loss
from .label_attention import label_attention
from .mlc import WEIGHTINGS, check_multilabel_numbers, multilabel_supcon_loss
from .pscl import prototype_contrastive_loss
from .sscl import FORMULATIONS, sample_contrastive_loss
from .supcon import supcon_loss
from .two_way import two_way_loss
from .zlpr import zlpr_loss

__all__ = [
    "FORMULATIONS",
    "WEIGHTINGS",
    "Active",
    "ContrastiveStats",
    "DualParts",
    "asymmetric_loss",
    "check_multilabel_numbers",
    "compact_labels",
    "contrastive_stats",
    "dual_contrastive_loss",
    "label_attention",
    "multilabel_supcon_loss",
    "prototype_contrastive_loss",
    "sample_contrastive_loss",
    "supcon_loss",
    "two_way_loss",
    "zlpr_loss",
]
