"""What a study leaves behind: ``study.json``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sadcl.train.checkpoint import write_atomically

if TYPE_CHECKING:
    from sadcl.train.study import Study

__all__ = ["write_report"]


def write_report(study: Study) -> dict[str, Any]:
    """Write the finished trials to ``study.json`` and return them."""
    trials = [json.loads(path.read_text()) for path in sorted((study.folder / "trials").glob("*.json"))]
    content = {"trials": trials}
    write_atomically(study.folder / "study.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
    return content
