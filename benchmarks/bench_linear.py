"""Linear layers of the published head, float32, forward: ours beside torch's two products, MKL's and oneDNN's.

Floor: 2 M N K flops at the FMA peak. What ``SADCL_LINEAR=auto`` takes on this processor is the entry ``auto``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import harness
from sadcl.functional.linear import linear
from sadcl.ops import linear as op

ROWS, SHAPES = 1568, ((2048, 2048), (2048, 8192))  # 8 images of 196 positions


def main() -> None:
    for inside, outside in SHAPES:
        g = torch.Generator().manual_seed(0)
        x, weight = torch.randn(ROWS, inside, generator=g), torch.randn(outside, inside, generator=g) / inside**0.5
        bias = torch.randn(outside, generator=g)
        entries = {"MKL": lambda x=x, w=weight, b=bias: F.linear(x, w, b)}
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            entries["oneDNN"] = lambda x=x, w=weight, b=bias: torch.ops.mkldnn._linear_pointwise(
                x, w, b, "none", [], ""
            )
        entries["sadcl, auto"] = lambda x=x, w=weight, b=bias: linear(x, w, b)
        entries["sadcl"] = lambda x=x, w=weight, b=bias: op.product(x, w.t(), b)
        for run in entries.values():
            torch.testing.assert_close(run(), F.linear(x.double(), weight.double(), bias.double()).float())
        about = f"linear layer forward, [{ROWS}, {inside}] to {outside}, float32"
        harness.compare(
            f"linear {inside} x {outside}", about, entries, flops=2.0 * ROWS * inside * outside, slow_every=1
        )


if __name__ == "__main__":
    main()
