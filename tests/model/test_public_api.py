"""A public name, argument or default that changes is seen here first (docs/versioning.md)."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path

import public_api
import pytest

import sadcl

ROOT = Path(__file__).resolve().parents[2]


def test_public_interface_is_what_was_promised() -> None:
    for needed in ("PIL", "timm"):
        pytest.importorskip(needed)
    said = public_api.difference(json.loads(public_api.FILE.read_text()), public_api.interface())
    assert not said, "\n".join(
        ["the public interface changed; if it is meant, say so in CHANGELOG.md (a name that goes needs a deprecation",
         "first, docs/versioning.md) and run `python -m tests.model.public_api`:", *said]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sadcl.metrics.average_precision", None, "gone"),
        ("sadcl.losses.DualContrastiveLoss", lambda d: d.pop("forward"), "forward: new"),
        (
            "sadcl.losses.SupConLoss",
            lambda d: d.update({"()": d["()"].replace("temperature=0.07", "temperature=0.1", 1)}),
            "(): was (temperature=0.1, ",
        ),
        (
            "sadcl.KeyQueue",
            lambda d: d.update(enqueue=d["enqueue"].replace("labels", "targets")),
            "enqueue: was (keys, targets",
        ),
    ],
)
def test_changes_are_noticed(name: str, change, said: str) -> None:
    now = json.loads(public_api.FILE.read_text())
    before = copy.deepcopy(now)
    if change is None:
        del now[name]
    else:
        change(before[name])
    (sentence,) = public_api.difference(before, now)
    assert sentence.startswith(name) and said in sentence


def test_every_exported_name_is_promised() -> None:
    promised = json.loads(public_api.FILE.read_text())
    for module in ("sadcl", "sadcl.losses", "sadcl.functional", "sadcl.metrics", "sadcl.compat"):
        for name in importlib.import_module(module).__all__:
            assert f"{module}.{name}" in promised


def test_version_is_written_once_and_in_the_changelog() -> None:
    """pyproject.toml, the package and the newest entry of CHANGELOG.md name the same semantic version."""
    if not (ROOT / "pyproject.toml").is_file() or not (ROOT / "CHANGELOG.md").is_file():
        pytest.skip("away from the sources")
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", sadcl.__version__)
    assert f'\nversion = "{sadcl.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == sadcl.__version__
