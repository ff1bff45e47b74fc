"""Adapters and hooks on a label attention's output projection are seen, and change nothing where they do nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sadcl import LabelAttention
from tests.here import backends_here


class Adapted(nn.Module):
    """A projection with a low-rank update beside it, that offers the original's weight as adapters do."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(32, 2))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down.t() @ self.up.t())


@pytest.mark.parametrize("backend", backends_here("label_attention"))
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_adapter_is_seen(scale: float, backend: str) -> None:
    module = LabelAttention(32, 4, backend=backend)
    query, memory = torch.randn(5, 32), torch.randn(3, 9, 32)
    merged, adapted = copy.deepcopy(module), copy.deepcopy(module)
    adapted.out_proj = Adapted(adapted.out_proj, scale)
    with torch.no_grad():
        merged.out_proj.weight += scale * adapted.out_proj.up @ adapted.out_proj.down
    out = adapted(query, memory)[0]
    torch.testing.assert_close(out, merged(query, memory)[0], rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert adapted.out_proj.up.grad is not None and adapted.in_proj_weight.grad is not None


def test_hooks_run_and_parametrizations_stay_one_op() -> None:
    module = LabelAttention(32, 4)
    query, memory = torch.randn(5, 32), torch.randn(3, 9, 32)
    want, seen = module(query, memory)[0], []
    module.out_proj.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(module(query, memory)[0], want)
    assert len(seen) == 1
    normed = LabelAttention(32, 4)
    torch.nn.utils.parametrizations.weight_norm(normed.out_proj)
    assert not normed._out_proj_is_more_than_its_weight()
