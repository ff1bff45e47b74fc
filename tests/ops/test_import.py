"""Importing sadcl needs torch alone; what is missing is said, not stumbled over. Each test is a process of its own."""

from __future__ import annotations

import textwrap

import pytest

from tests import forks

BLOCK = """
import sys
for name in BLOCKED:
    sys.modules[name] = None  # an import of it now fails
"""

USE = """
import torch, sadcl
from sadcl import functional as F
x, p, y = torch.randn(4, 2, 3, 8, requires_grad=True), torch.randn(3, 8), torch.ones(4, 3)
loss = F.sample_contrastive_loss(x, y) + F.prototype_contrastive_loss(x[:, 0], p, y)
loss = loss + F.asymmetric_loss(x[:, 0, :, 0], y) + F.supcon_loss(x[:, :, 0])
loss.backward()
assert x.grad.isfinite().all()
sadcl.SADCLHead(in_channels=8, num_classes=3, hidden_dim=8, num_heads=2, ffn_dim=8, feature_size=(2, 2))
"""


def run(code: str) -> str:
    done = forks.run(textwrap.dedent(code), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optional_packages_are_not_imported() -> None:
    run(
        """
        import sys, torch
        before = set(sys.modules)
        import sadcl, sadcl.compat, sadcl.metrics, sadcl.functional
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        optional = {"triton", "torchvision", "timm", "matplotlib", "sklearn", "skimage", "PIL", "jsonargparse", "tqdm"}
        assert not loaded & optional, loaded
        assert "torch._dynamo" not in sys.modules  # seconds of import time
        """
    )


@pytest.mark.parametrize(
    "blocked, expected",
    [
        (["triton"], {"triton": "not"}),
        (["triton", "torchvision", "timm", "matplotlib", "sklearn", "scipy", "PIL"], {"triton": "not"}),
        (["sadcl._C"], {"cpp": "_C"}),
        (["sadcl._C", "triton"], {"cpp": "_C", "triton": "not"}),
    ],
)
def test_losses_work_without(blocked: list[str], expected: dict[str, str]) -> None:
    checks = "".join(
        f"info = sadcl.backends()[{name!r}]\nassert not info.available and {reason!r} in info.reason, info\n"
        for name, reason in expected.items()
    )
    run(f"BLOCKED = {blocked!r}\n{BLOCK}\n{USE}\n{checks}")


def test_every_public_module_is_an_attribute_without_an_import_of_its_own() -> None:
    run(
        """
        import sys, sadcl
        later = {"checkpoint", "compat", "metrics", "prototypes", "testing"}
        assert later <= set(dir(sadcl)) and not {f"sadcl.{name}" for name in later} & set(sys.modules)
        sadcl.prototypes.build_prototypes, sadcl.compat.load_released_checkpoint, sadcl.metrics.average_precision
        sadcl.functional.asymmetric_loss, sadcl.losses.SupConLoss, sadcl.attention, sadcl.backbones, sadcl.classes
        sadcl.reference.sscl, sadcl.testing.make_labels, sadcl.checkpoint
        assert sadcl.metrics is sys.modules["sadcl.metrics"]
        assert not hasattr(sadcl, "nothing_of_that_name")
        """
    )
