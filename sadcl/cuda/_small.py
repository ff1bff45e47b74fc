"""Which problems on a GPU ``backend=None`` gives to these kernels: the small ones, which cost what their launches cost.

The limits are predictions, none was timed on a GPU: each says what it was reckoned from, until ``make gpu`` has timed
both backends.
"""

from __future__ import annotations

import math
from pathlib import Path

# Op -> (the largest problem, as the product of the sizes that its function gives to resolve(); why there).
LIMITS: dict[str, tuple[int, str]] = {
    "compact": (
        1 << 16,
        "B C: one block of 1,024 threads, 64 rounds of a label each. Triton's is one launch up to 256 images, as here, "
        "then three (6 us)",
    ),
    "asl": (
        1 << 18,
        "B C: one launch, as Triton's; up to C = 128 a thread has one element and no loop. Above, both wait for memory",
    ),
    "pscl": (
        1 << 23,
        "B C D: one launch in place of two each way (3 us). C blocks read all of it: 16 MB in bfloat16 are 9 us at "
        "half of an H100's bandwidth, beyond which more blocks are worth the second launch",
    ),
    "sscl": (
        1 << 13,
        "rows that there is room for, B C V or less: one launch in place of 3 and 4. A COCO step has room for 5,120, "
        "of which 190 are active, 21 tiles of 32 x 32; a million products (1,024 active rows) are 4 tiles a processor",
    ),
    "dual": (1 << 13, "rows that there is room for: as SSCL alone; its means then come out of the launches too"),
    "supcon": (
        1 << 10,
        "rows, all of which are active: as above. Above, tiles of 128 and a pipeline are worth two launches more",
    ),
    "mlc": (
        1 << 10,
        "vectors, B V and keys, of the weightings that follow from a pair's labels: one launch in place of 6 or 7 each "
        "way. Above, Triton multiplies keys with anchors alone, and here it is all with all",
    ),
    "bank_update": (
        1 << 23,
        "B C E: one launch of a block a row, as Triton's; this one knows no threshold when compiled",
    ),
}


def implemented() -> tuple[str, ...]:
    """The files of ops that have such kernels, named as the ops are."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


def is_small(op: str, sizes: tuple[int, ...]) -> bool:
    """Whether an op with these sizes is one for these kernels."""
    return op in LIMITS and bool(sizes) and math.prod(sizes) <= LIMITS[op][0]
