"""The trials of a study on a table: one JSON file each, named after a digest of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sadcl._json import dumps
from sadcl.checkpoint import write_atomically
from sadcl.study.table.bench import TableBench
from sadcl.study.table.config import TableConfig
from sadcl.study.table.data import Table, load_table
from sadcl.train.console import say

__all__ = ["TableStudy"]

_NOT_OF_A_TRIAL = ("table", "output", "arms", "seeds")


class TableStudy:
    """The trials of a config, and their results as far as there are any.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: TableConfig, say: Callable[[str], None] = say) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.output)
        self.table: Table = load_table(config.table)
        rows = self.table.rows
        self.digest = hashlib.sha256(rows.features.numpy().tobytes() + rows.labels.numpy().tobytes()).hexdigest()[:16]

    def settings(self, arm: str, seed: int) -> dict[str, Any]:
        """Everything the result of a trial depends on, as JSON values."""
        recipe = {name: value for name, value in asdict(self.config).items() if name not in _NOT_OF_A_TRIAL}
        return {"arm": arm, "seed": seed, "table": self.digest, "sizes": self.table.sizes, **recipe}

    def path(self, arm: str, seed: int) -> Path:
        """Where the result of a trial is kept."""
        digest = hashlib.sha256(json.dumps(self.settings(arm, seed), sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "trials" / f"{arm}-{seed}-{digest}.json"

    def result(self, arm: str, seed: int) -> dict[str, float] | None:
        """The figures of a finished trial."""
        path = self.path(arm, seed)
        if not path.is_file():
            return None
        found: dict[str, float] = json.loads(path.read_text())["result"]
        return found

    def missing(self, seed: int) -> list[str]:
        """The arms that a seed has not trained yet, those of a weighting side by side."""
        return [arm for arm in sorted(self.config.arms) if not self.path(arm, seed).is_file()]

    def describe(self) -> str:
        """The plan for people."""
        rows, config = self.table.rows, self.config
        left = sum(len(self.missing(seed)) for seed in config.seeds)
        count = len(config.arms) * len(config.seeds)
        return (
            f"{self.table.name}: {len(rows.features)} rows, {rows.features.shape[1]} features, {rows.labels.shape[1]} "
            f"labels; {count - left} of {count} trainings finished ({len(config.arms)} arms, {len(config.seeds)} seeds)"
        )

    def run_seed(self, seed: int) -> bool:
        """Train what is missing of one seed; whether anything was."""
        missing = self.missing(seed)
        bench = TableBench(self.config, self.table, seed) if missing else None
        for arm in missing:
            assert bench is not None
            began = time.perf_counter()
            result = {**bench.train(arm), "seconds": time.perf_counter() - began}
            text = dumps({"settings": self.settings(arm, seed), "result": result}, indent=1).encode()
            write_atomically(self.path(arm, seed), lambda file, text=text: file.write(text))
            self.say(f"seed {seed}  {arm:20} mAP {result['mAP']:.4f}  {result['seconds']:.0f} s")
        return bool(missing)
