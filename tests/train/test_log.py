"""The run's log: whole lines, resumable, readable by anything that reads JSON; the same numbers in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sadcl.train.log import RunLog, read_log


def test_lines_are_json_and_flushed(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", tensorboard=False)
    log.write("epoch", 3, losses={"total": math.nan, "part": 1.5}, ap=[0.5, -math.inf], stage="step1 <b> é")
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()  # before close
    row = json.loads(line, parse_constant=pytest.fail)
    assert row.pop("time") > 1.6e9
    assert row == {
        "kind": "epoch",
        "step": 3,
        "losses": {"total": "nan", "part": 1.5},
        "ap": [0.5, "-inf"],
        "stage": "step1 <b> é",
    }
    log.close()


def test_resume_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write("epoch", step)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "epoch", "st')  # killed here
    with RunLog(tmp_path, tensorboard=False, resume_step=20) as log:
        log.write("epoch", 30, again=True)
    rows = read_log(tmp_path / "log.jsonl")
    assert [(row["step"], "again" in row) for row in rows] == [(10, False), (20, False), (30, True)]
    RunLog(tmp_path, tensorboard=False).close()
    assert read_log(tmp_path / "log.jsonl") == []
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.write("epoch", 10, val_mAP=0.25, losses={"total": 3.0}, stage="step1")
        log.write("epoch", 20, val_mAP=0.5)
    with RunLog(tmp_path, resume_step=10) as log:
        log.write("epoch", 20, val_mAP=0.75)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch/val_mAP", "epoch/losses/total"}
    assert [(e.step, e.value) for e in events.Scalars("epoch/val_mAP")] == [(10, 0.25), (20, 0.75)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path) as log:
        log.write("epoch", 1, loss=2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
