"""Runs that are killed, run out of disk, meet damaged files or each other: nothing is lost, and everything is said."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml", "safetensors"):
    pytest.importorskip(needed)

import processes  # noqa: E402
from processes import Kill, differences  # noqa: E402
from test_train import pictures, quiet, tiny  # noqa: E402, F401

from sadcl.train.checkpoint import (  # noqa: E402
    load_checkpoint,
)
from sadcl.train.config import TrainConfig  # noqa: E402
from sadcl.train.log import read_log  # noqa: E402

SIGKILLED = [-9]
TIMES = ("time", "seconds", "speed")


def result(config: TrainConfig) -> dict[str, Any]:
    """All that a run has computed: weights, what trains them, metrics and log, without what a clock measured."""
    folder = Path(config.output)
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pt")):
        content = load_checkpoint(path)
        found[path.name] = {key: value for key, value in content.items() if key not in ("config", "history")}
    metrics = json.loads((folder / "metrics.json").read_text())
    found["metrics"] = {"mAP": metrics["mAP"], "stages": metrics["stages"], "history": _timeless(metrics["history"])}
    found["log"] = _timeless([row for row in read_log(folder / "log.jsonl") if row["kind"] == "epoch"])
    found["files"] = sorted(path.name for path in folder.iterdir())
    return found


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# -- killed --

RECIPE = {
    "checkpoint_every": 1,
    "ema__decay": 0.9,
    "step2__accumulate": 2,
    "step2__select": "best",
    "step1__epochs": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(
    pictures: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], float]:
    """What a run gives when nothing happens, and how long it takes."""
    config = tiny(pictures, tmp_path_factory.mktemp("whole") / "run", **RECIPE)
    started = processes.start(config)
    processes.wait_for(config, "data:")
    began = time.monotonic()
    assert processes.finish(started) == [0], processes.said(config)
    return result(config), time.monotonic() - began


# One after another in the same run; a call counts from the start of its process.
MOMENTS: list[Kill] = [
    ("sadcl.train.run:Run._stage", 1, "before"),  # before anything was trained
    ("sadcl.train.checkpoint:_Hashed.write", 40, "before"),  # within the first checkpoint
    ("sadcl.train.loop:Stage.step", 2, "before"),  # in the middle of an epoch
    ("os:fsync", 4, "before"),  # a checkpoint is written, but perhaps not on disk
    ("sadcl.train.run:Run._finish", 1, "before"),  # step 1 is trained and measured, but has no file
    ("sadcl.train.run:Run._stage", 2, "before"),  # between two stages
    ("os:replace", 4, "after"),  # a checkpoint has just got its name
    ("sadcl.train.log:RunLog.write", 2, "after"),  # the log knows an epoch that no checkpoint has
    ("sadcl.train.run:build_prototypes", 1, "after"),
    ("sadcl.bank:MemoryBank.update", 2, "after"),  # between two halves of an optimizer step
    ("sadcl.train.run:Run._finish", 1, "after"),  # the best epoch is kept, but last.pt is older
]


def test_killed_at_the_worst_moments_and_resumed_is_the_same_run(
    uninterrupted: tuple[dict[str, Any], float],
    pictures: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = tiny(pictures, tmp_path / "run", **RECIPE)
    for moment in MOMENTS:
        assert processes.run(config, "--resume", kill=moment) == SIGKILLED, (moment, processes.said(config))
        for path in Path(config.output).glob("*.pt"):
            load_checkpoint(path)  # whole, whatever happened
    assert processes.run(config, "--resume") == [0], processes.said(config)
    assert differences(result(config), uninterrupted[0]) == []


def test_killed_at_random_and_resumed_is_the_same_run(
    uninterrupted: tuple[dict[str, Any], float],
    pictures: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = tiny(pictures, tmp_path / "run", **RECIPE)
    seed = random.SystemRandom().randrange(2**32)  # other moments every time: no moment may matter
    draw = random.Random(seed)
    kills = 0
    for part in (0.3, 0.3, 0.3, 0.6, 0.9):
        started = processes.start(config, "--resume")
        processes.wait_for(config, "data:")
        started[0].join(draw.uniform(0, part) * uninterrupted[1])
        started[0].kill()
        kills += processes.finish(started) == SIGKILLED
    assert processes.run(config, "--resume") == [0], processes.said(config)
    assert kills, "nothing was killed"
    assert differences(result(config), uninterrupted[0]) == [], f"seed {seed}"
