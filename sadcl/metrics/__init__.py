"""Multi-label metrics: average precision in three protocols, the CP/CR/CF1/OP/OR/OF1 table, a streaming form.

Scores ``[n, C]`` and labels ``[n, C]`` belong to n images and C classes. Every result is a fraction in 0..1,
accumulated in float64. Labels are 1 (positive), 0 (negative) or -1 (ignored). A place that is masked in either
(``numpy.ma``, ``torch.masked``) is an ignored pair. Sparse labels are 0 where they store nothing.

An ignored pair takes no part:

- AP: its image is no positive, no negative and no threshold in that class's ranking;
- CP, CR, CF1, OP, OR, OF1: it is neither predicted nor true, whatever its score;
- top3: its score takes none of its image's three places, they go to the other classes.

Its score must still be a number: NaN is an error anywhere.
"""

from sadcl.metrics._average_precision import average_precision
from sadcl.metrics._report import MultilabelReport, Protocol, multilabel_report
from sadcl.metrics._streaming import MultilabelAccumulator

__all__ = ["MultilabelAccumulator", "MultilabelReport", "Protocol", "average_precision", "multilabel_report"]
