"""Op ``compact``: labels to class-major pairs, in one block."""

from __future__ import annotations

from typing import Any

from sadcl import _checks

from ._launch import Program, launch
from ._types import type_of


def compact(x: Any, out: Any) -> None:
    """Fill ``pairs``, ``class_ptr`` and ``target``, see :mod:`sadcl.ops.compact`."""
    labels = x.labels
    b, c = _checks.check_compactable(labels)
    launch(
        Program("compact", "compact", {"LABELS": type_of(labels)}), grid=1, threads=1024, shared=4 * 32,
        args=(labels, out.pairs, out.class_ptr, out.target, b, c, labels.stride()),
    )  # fmt: skip
