"""What test files share beside fixtures: which backends and instruction sets are here, and pictures to train on.

A module of its own: every folder's ``conftest`` has the same name, and only one of them can be imported by it.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

import sadcl


def backends_here(op: str, *also: str) -> list[object]:
    """Parameters for the CPU backends of ``op`` and for ``also``: what cannot run here is skipped, and says why."""
    known = sadcl.backends()
    wanted = [
        name for name in importlib.import_module(f"sadcl.functional.{op}").BACKENDS if name not in ("triton", "cuda")
    ]
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not known[name].available, reason=f"{name}: {known[name].reason}"),
        )
        for name in (*also, *wanted)
    ]


def instruction_sets() -> list[str]:
    """Instruction sets of the CPU extension that this machine can run, or SADCL_CPU_ISA's; empty without it."""
    try:
        found = importlib.import_module("sadcl._C").supported_isas()
    except ImportError:
        return []
    asked = os.environ.get("SADCL_CPU_ISA")
    return [asked] if asked else found


def coloured_squares(folder: Path, count: int, train: int) -> Path:
    """Pictures of one to three coloured squares; ``train.csv`` names the first ``train``, ``val.csv`` the rest."""
    from PIL import Image

    colors = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230)}
    generator = torch.Generator().manual_seed(1)
    lines = []
    for number in range(count):
        names = [name for name in colors if torch.rand((), generator=generator) < 0.5] or ["red"]
        image = Image.new("RGB", (64, 64), (110, 110, 110))
        for name in names:
            left, top = torch.randint(0, 40, (2,), generator=generator).tolist()
            image.paste(colors[name], (left, top, left + 22, top + 22))
        image.save(folder / f"{number}.png")
        lines.append(f"{number}.png,{';'.join(names)}\n")
    (folder / "train.csv").write_text("".join(lines[:train]))
    (folder / "val.csv").write_text("".join(lines[train:]))
    return folder
