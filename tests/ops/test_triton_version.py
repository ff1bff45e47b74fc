"""Which versions of Triton, and which devices, the backend takes, and what it says of the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

import sadcl
from sadcl import _backends


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe as if this version of Triton were the one installed."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(_backends._FOUND, "triton", _backends._probe_triton())
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # no GPU is another reason


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.0+git2f1a"])
def test_an_older_triton_is_unavailable_and_says_why(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    info = sadcl.backends()["triton"]
    assert not info.available and info.reason == f"triton {version} is older than 3.6"
    with pytest.raises(RuntimeError, match=r"triton .* is older than 3\.6"):
        sadcl.functional.sample_contrastive_loss(torch.randn(2, 3, 4), torch.ones(2, 3), backend="triton")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.10.0"])
def test_newer_ones_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    assert sadcl.backends()["triton"] == _backends.BackendInfo(True, detail=f"triton {version}")


@pytest.mark.parametrize("interpreted", ["0", "1"])
@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone"])
def test_devices_that_triton_is_not_for_run_portable_torch(
    device: str, interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("3.9.0", monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.delenv("SADCL_BACKEND", raising=False)
    names = ("cpp", "triton", "torch")
    assert _backends.resolve(None, "sscl", torch.device(device), names) == "torch"
    assert _backends.resolve(None, "sscl", torch.device("cuda"), names) == "triton"
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run sscl: .* not on {device}"):
        _backends.resolve("triton", "sscl", torch.device(device), names)
