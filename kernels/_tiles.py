"""Tile choices as data: per op, part and kind of operand, the default first, what else is worth a search after it.

Kinds of operand: ``half`` (bfloat16, float16), ``single`` (float32 without tensor cores: ``ieee``), ``tf32`` (float32
through them: ``tf32``, ``tf32x3``) and ``double``. :mod:`._tune` takes the default, or searches. Nothing here has been
timed on a GPU: the reasons are counts (registers, shared memory, tensor-core shapes), checked by
``python -m benchmarks.gpu_static``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import triton

from sadcl._checks import check_choice

from ._launch import Part


@dataclass(frozen=True)
class Tile:
    """One choice.

    Attributes:
        block_m: rows of a score tile, held by the program while it sweeps over the columns.
        block_n: columns of a score tile.
        block_d: width of a step of a product.
        num_warps, num_stages: warps of a program, depth of the software pipeline.
        panel: column tiles of weights that the backward keeps before it multiplies them with z.
        registers: bound on a thread's registers, see :func:`._launch.launch`.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    panel: int = 4
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """A launch's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "registers": self.registers}


# Families of parts that share a table: those with little shared memory, and those that are one generation.
_FAMILY = {"sm_86": "small", "sm_87": "sm_80", "sm_89": "small", "sm_120": "small", "sm_121": "small",
           "sm_103": "sm_100", "gfx90a": "gfx942", "gfx950": "gfx942"}  # fmt: skip

# Forward. A tile of 128 x 128 with a width step of 64 reads 32 KB for 2 MFLOP: 64 FLOP a byte from L2. Its float32
# accumulator is 64 registers a thread at 8 warps. Every first row compiles without a spill on its parts.
SSCL: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        # 128 x 128 spills 8 bytes at this width step (mma.sync holds both operands in registers), 128 x 64 none;
        # 3 stages are 72 KB.
        "half": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
        # FFMA: a 64 x 64 tile is 16 outputs a thread, so operand reads from shared memory do not bind. A width step of
        # 32 spills 8 bytes with Triton 3.6.
        "single": (Tile(64, 64, 16, 8, 3), Tile(64, 64, 32, 8, 2)),
        "tf32": (Tile(64, 64, 16, 8, 3), Tile(64, 32, 32, 4, 3, registers=255)),
        "double": (Tile(32, 32, 16, 4, 2, registers=255),),  # else 8 bytes, to fit four
    },
    "sm_90": {
        # Two warpgroups, one wgmma m64n128 each; 4 x 32 KB of the 227.
        "half": (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
        # A width step of 32 spills 40 bytes with Triton 3.8, where ptxas aims at two programs.
        "single": (Tile(64, 64, 16, 8, 3), Tile(64, 32, 16, 8, 3)),
        "tf32": (Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "double": (Tile(32, 32, 16, 4, 2),),
    },
    "sm_100": {
        # As sm_90; the accumulator lies in tensor memory.
        "half": (Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "single": (Tile(64, 64, 16, 8, 2, registers=255), Tile(64, 64, 16, 8, 3)),  # else 32 bytes with Triton 3.9
        "tf32": (Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3, registers=255)),
        "double": (Tile(32, 32, 16, 4, 2, registers=255),),  # else 8 bytes
    },
    "gfx942": {
        # 64 KB of LDS hold two stages of 64 x 64 x 64; a wave is 64 threads, so 4 warps are 256 threads.
        "half": (Tile(64, 64, 64, 4, 2), Tile(128, 64, 32, 4, 2)),
        "single": (Tile(64, 64, 16, 4, 2),),
        "tf32": (Tile(64, 64, 16, 4, 2),),
        "double": (Tile(32, 32, 16, 4, 1),),
    },
    "small": {
        "half": (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 3), Tile(64, 64, 64, 4, 2)),
        "single": (Tile(64, 32, 16, 8, 2),),  # 64 x 64 spills 8 bytes (sm_75: 40)
        "tf32": (Tile(64, 64, 16, 8, 2),),
        "double": (Tile(32, 32, 16, 4, 1),),
    },
    "sm_75": {
        # No matrix instructions in Triton (nor tf32): products are FMA, as float32's; a step of 64 spills 408 bytes.
        "half": (Tile(64, 64, 16, 8, 2),),
        "single": (Tile(64, 32, 16, 8, 2),),
        "double": (Tile(32, 32, 16, 4, 1),),
    },
    # The least that dot takes, so that small tests cross tile borders.
    "interpret": {kind: (Tile(16, 16, 32, 4, 2, 2),) for kind in ("half", "single", "tf32", "double")},
}
# Backward. Two products share the registers with the exponentials: 128 x 128 spills 312 bytes on sm_80 and sm_90, 1,104
# on sm_100, so the tile is half as wide. A panel of 8 x 64 columns reads and writes the sums once for 512
# multiply-adds. In float64 a second stage spills 8 to 16 bytes on sm_90 and sm_100, even with all 255 registers.
SSCL_BACKWARD: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        # All 255 registers; float16 spills 8 bytes with Triton 3.6.
        "half": (Tile(128, 64, 64, 8, 3, 8), Tile(64, 64, 64, 4, 3, 8), Tile(64, 64, 64, 4, 2, 8)),
        # A width step of 32 spills 80 bytes.
        "single": (Tile(64, 64, 16, 8, 2, 8), Tile(64, 32, 32, 8, 2, 8)),
        "tf32": (Tile(64, 64, 16, 8, 3, 8), Tile(64, 32, 32, 4, 3, 8)),
        "double": (Tile(32, 32, 16, 4, 1, 8, 255),),
    },
    "sm_90": {
        "half": (Tile(128, 64, 64, 8, 3, 8), Tile(128, 64, 64, 8, 4, 8), Tile(64, 64, 64, 4, 3, 8)),
        "single": (Tile(64, 64, 16, 8, 2, 8),),
        "tf32": (Tile(64, 64, 32, 8, 3, 8), Tile(64, 64, 32, 8, 2, 8)),
        "double": (Tile(32, 32, 16, 4, 1, 8, 255),),
    },
    "sm_100": {
        # A width step of 64 spills 48 bytes with Triton 3.6.
        "half": (Tile(128, 64, 32, 8, 3, 8), Tile(128, 64, 64, 8, 3, 8), Tile(64, 64, 64, 4, 3, 8)),
        "single": (Tile(64, 64, 16, 8, 2, 8),),
        "tf32": (Tile(64, 64, 32, 8, 3, 8),),
        "double": (Tile(32, 32, 16, 4, 1, 8, 255),),
    },
    "gfx942": {
        "half": (Tile(64, 64, 64, 4, 2, 8),),
        "single": (Tile(64, 64, 16, 4, 2, 8),),
        "tf32": (Tile(64, 64, 16, 4, 2, 8),),
        "double": (Tile(32, 32, 16, 4, 1, 8),),
    },
    "small": {
        "half": (Tile(64, 64, 64, 4, 2, 8), Tile(64, 64, 32, 4, 2, 8)),
        "single": (Tile(64, 64, 16, 8, 2, 8),),  # 64 x 32 spills 8 bytes
        "tf32": (Tile(64, 64, 16, 8, 2, 8),),
        "double": (Tile(32, 32, 16, 4, 1, 8),),
    },
    "sm_75": {
        "half": (Tile(64, 64, 16, 8, 2, 8),),
        "single": (Tile(64, 64, 16, 8, 2, 8),),
        "double": (Tile(32, 32, 16, 4, 1, 8, 255),),
    },
    "interpret": SSCL["interpret"],
}
# Label attention, forward and score gradients. 64 rows: 320 (4 heads of 80 labels, folded) are 5 blocks without a
# remainder, and B=32 makes 160 items, more than one a processor. The same tile serves scores (keys across) and context
# (width across). 4 warps spill 8 to 552 bytes beside the positions' loads and dropout, 8 warps none.
LABEL_ATTENTION: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        "half": (Tile(64, 64, 64, 8, 3), Tile(64, 64, 32, 8, 3), Tile(32, 64, 64, 4, 3)),
        # The bound makes it one program; ptxas spills 8 bytes to fit two.
        "single": (Tile(64, 64, 16, 8, 2, registers=255),),
        "tf32": (Tile(64, 64, 16, 8, 3, registers=255),),
        "double": (Tile(32, 32, 16, 4, 2),),
    },
    "sm_90": {
        "half": (Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
        "single": (Tile(64, 64, 16, 8, 2, registers=255),),  # as on sm_80: 24 bytes
        "tf32": (Tile(64, 64, 32, 8, 3),),
        "double": (Tile(32, 32, 16, 4, 2),),
    },
    "sm_100": {
        "half": (Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
        "single": (Tile(64, 64, 16, 8, 2, registers=255),),  # as on sm_80: 40 bytes with Triton 3.8
        "tf32": (Tile(64, 64, 32, 8, 3),),
        "double": (Tile(32, 32, 16, 4, 1, registers=255),),  # a second stage spills 8 bytes
    },
    "gfx942": {
        "half": (Tile(64, 64, 64, 4, 2),),
        "single": (Tile(64, 64, 16, 4, 2),),
        "tf32": (Tile(64, 64, 16, 4, 2),),
        "double": (Tile(32, 32, 16, 4, 1),),
    },
    "small": {
        "half": (Tile(64, 32, 32, 8, 2),),  # 64 x 64 spills 16 bytes
        "single": (Tile(32, 64, 16, 8, 2),),  # 64 x 64 spills 8 bytes, 64 x 32 16
        "tf32": (Tile(64, 64, 16, 8, 2),),
        "double": (Tile(32, 32, 16, 4, 1, registers=255),),  # else 8 bytes with Triton 3.6
    },
    "sm_75": {
        "half": (Tile(64, 64, 16, 8, 2),),
        "single": (Tile(64, 32, 16, 8, 2),),  # 64 x 64 spills 8 bytes
        "double": (Tile(32, 32, 16, 4, 1),),
    },
    "interpret": {kind: (Tile(16, 16, 32, 4, 2),) for kind in ("half", "single", "tf32", "double")},
}
# Products of the backward, [rows or keys, width]: no epilogue to share registers with, so 4 warps do.
LABEL_ATTENTION_PRODUCT: dict[str, dict[str, tuple[Tile, ...]]] = {
    **LABEL_ATTENTION,
    "sm_80": {
        **LABEL_ATTENTION["sm_80"],
        "half": (Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3)),
        "single": (Tile(64, 32, 16, 8, 2), Tile(64, 32, 32, 8, 2)),  # 64 x 64 spills 8 bytes
    },
    "sm_90": {**LABEL_ATTENTION["sm_90"], "half": (Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 8, 3))},
    "sm_100": {
        **LABEL_ATTENTION["sm_100"],
        # Two programs by shared memory, which leaves each thread of 4 warps 255 registers.
        "half": (Tile(64, 128, 64, 4, 3, registers=255), Tile(64, 128, 64, 8, 3)),
        "single": (Tile(64, 64, 16, 8, 2), Tile(64, 32, 16, 8, 2)),
    },
}
# Image-level losses, both passes: beside the scores lie two or three tiles of counts and the labels' words, so a tile
# is smaller than SSCL's. 64 x 64 spills 16 to 144 bytes on sm_80, 120 to 224 on sm_100, and 24 to 56 on sm_90 with
# Triton 3.6 and 3.9 (with 3.8 it needs all registers); 128 rows spill 96 to 480. All 255 registers: where labels are
# counted alone, ptxas aims at three programs and spills 8.
_MLC = {
    "half": (Tile(64, 32, 64, 8, 3, 8, 255),),
    "single": (Tile(64, 32, 16, 8, 2, 8, 255),),
    "tf32": (Tile(64, 32, 32, 8, 3, 8, 255),),
    "double": (Tile(32, 32, 16, 8, 1, 8, 255),),
}
_LITTLE = {**_MLC, "half": (Tile(64, 32, 32, 8, 2, 8, 255),), "tf32": (Tile(64, 32, 16, 8, 2, 8, 255),)}
MLC: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": _MLC,
    "sm_90": _MLC,
    "sm_100": _MLC,
    "gfx942": _LITTLE,
    "small": _LITTLE,
    "sm_75": _LITTLE,
    "interpret": SSCL["interpret"],
}
# MSC multiplies through the classes beside it, in float32, whose operands lie in registers: half of that.
_SHORT = {kind: tuple(replace(tile, block_m=32) for tile in tiles) for kind, tiles in _MLC.items()}
MLC_MSC: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": _SHORT,
    "gfx942": {kind: (Tile(32, 32, 16, 4, 2, 8, 255),) for kind in _SHORT},
    **{arch: {kind: (Tile(32, 32, 16, 8, 2, 8, 255),) for kind in _SHORT} for arch in ("small", "sm_75")},
    "sm_90": _SHORT,
    "sm_100": _SHORT,
    "interpret": SSCL["interpret"],
}
TABLES = {
    "mlc": MLC,
    "mlc_msc": MLC_MSC,
    "sscl": SSCL,
    "sscl_backward": SSCL_BACKWARD,
    "label_attention_core": LABEL_ATTENTION,
    "label_attention_core_backward": LABEL_ATTENTION,
    "label_attention_core_product": LABEL_ATTENTION_PRODUCT,
}


PRECISIONS = ("ieee", "tf32x3", "tf32")
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Triton 3.6 and 3.7 give some float32 products to sm_100's tensor cores, as tf32, although `ieee` is asked. Those take
# 64 rows or more.
_EXACT = Tile(32, 32, 16, 4, 2, 8, registers=255)


def precision(dtype: torch.dtype, part: Part) -> str:
    """How float32 operands are multiplied: ``SADCL_TRITON_PRECISION``, ``ieee`` by default.

    ``ieee`` is exact float32, without tensor cores on NVIDIA parts; ``tf32`` rounds operands to 11 bits; ``tf32x3``
    adds the two first-order corrections, which restores nearly all of float32 at a third of tf32's rate. AMD's matrix
    cores multiply float32 as it is, so ``tf32x3`` is ``ieee`` there. Operands of 16 bits, or 64, have one way only.
    """
    if dtype != torch.float32:
        return "ieee"
    asked = check_choice("SADCL_TRITON_PRECISION", os.environ.get("SADCL_TRITON_PRECISION") or "ieee", PRECISIONS)
    if asked != "ieee" and part.arch == "sm_75":
        raise RuntimeError(f"SADCL_TRITON_PRECISION={asked}: tf32 needs sm_80 or later, this GPU is sm_75")
    return "ieee" if asked == "tf32x3" and part.arch.startswith("gfx") else asked


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of operand, see the module's docstring."""
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "single" if precision == "ieee" else "tf32"
    return "half"


def candidates(op: str, part: Part, kind: str) -> tuple[Tile, ...]:
    """The rows for a part, the default first; unknown parts take the nearest older generation that fits."""
    table = TABLES[op]
    family = _FAMILY.get(part.arch, part.arch)
    if family not in table:
        family = "small" if part.shared_bytes < 128 << 10 else "sm_90" if part.arch.startswith("sm_9") else "sm_80"
        if part.arch.startswith("gfx"):
            family = "gfx942"
    if kind == "single" and family == "sm_100" and _TRITON < (3, 8):
        return (_EXACT,)
    return table[family][kind]
