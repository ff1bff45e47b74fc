"""The head with every kernel that it can use: golden numbers, gradients beside torch's, autocast."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sadcl.kernels import _launch
from torch import Tensor

from sadcl.compat_checkpoints import head_from_released
from sadcl.head import SADCLHead

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("head_*.npz"))
OUTPUTS = {
    "logits": "logits",
    "label_features": "label_embed",
    "embeddings": "vis_embed",
    "bank_embeddings": "memory_embed",
    "prototype_embeddings": "prototype_embed",
}
BACKWARD = {"_score_gradient_kernel", "_query_gradient_kernel", "_key_gradient_kernel", "_gradient_kernel"}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", "triton")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    with np.load(path) as file:
        fields = {name: torch.from_numpy(file[name]) for name in file.files}
    state = {name.removeprefix("sd::"): value for name, value in fields.items() if name.startswith("sd::")}
    height, breadth, heads = (int(fields["cfg"][i]) for i in (4, 5, 6))
    head = head_from_released(state, heads, (height, breadth))
    with torch.no_grad(), _launch.recording() as recorded:
        out = head(fields["x"])
        head.memory_bank.update(out.label_features, fields["bank_logits"], fields["bank_labels"])
    attends = [launch.name for launch in recorded if launch.name == "_attend_kernel"]
    assert len(attends) == len(head.decoder)
    assert [launch.name for launch in recorded][-2:] == ["_logit_kernel", "_update_kernel"]
    named = [(getattr(out, ours), fields[theirs]) for ours, theirs in OUTPUTS.items()]
    for got, want in (*named, (head.memory_bank.slots, fields["bank_after"])):
        assert got.shape == want.shape and (got - want).norm() <= 1e-5 * want.norm()


def make() -> tuple[SADCLHead, Tensor]:
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "num_classes": 3, "hidden_dim": 8, "num_heads": 2, "ffn_dim": 8, "dropout": 0.0}
    head = SADCLHead(**sizes, decoder_layers=1, proj_dim=8, feature_size=(2, 3), bank_slots=2)
    return head, torch.randn(2, 8, 2, 3)


def step(head: SADCLHead, x: Tensor) -> list[Tensor]:
    """Outputs and parameter gradients of a training step."""
    out = head(x)
    loss = sum(part.float().square().mean() for part in out[:5])
    return [*out[:5], *torch.autograd.grad(loss, list(head.parameters()))]


def test_a_training_step_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = make()
    with _launch.recording() as recorded:
        got = step(head, x)
    assert {launch.name for launch in recorded} >= BACKWARD
    monkeypatch.setenv("SADCL_BACKEND", "torch")
    for mine, want in zip(got, step(copy.deepcopy(head), x), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()) + 1e-7)


def test_autocast() -> None:
    dtype = torch.bfloat16
    head, x = make()
    want = head(x)
    with torch.autocast("cpu", dtype), _launch.recording() as recorded:
        got = step(head, x)
    assert {launch.args[0][0].dtype for launch in recorded if launch.name == "_attend_kernel"} == {dtype}
    assert (got[0].float() - want.logits).abs().max() < 0.1
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in got[5:])
