"""JSON that every reader takes: what it has no number for, NaN and infinities, is ``null``."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps"]


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` of nested dicts and sequences, with ``null`` for floats that are not finite."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
