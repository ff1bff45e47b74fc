"""Runs that are killed, run out of disk, meet damaged files or each other: nothing is lost, and everything is said."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml", "safetensors"):
    pytest.importorskip(needed)

import processes  # noqa: E402
from processes import Kill, differences  # noqa: E402
from test_train import pictures, quiet, tiny  # noqa: E402, F401

from sadcl.checkpoint import (  # noqa: E402
    CannotWrite,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    write_atomically,
)
from sadcl.cli import main  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.train.config import TrainConfig  # noqa: E402
from sadcl.train.log import read_log  # noqa: E402
from sadcl.train.order import ShuffledBatches  # noqa: E402

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
    ("sadcl.checkpoint:_Hashed.write", 40, "before"),  # within the first checkpoint
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


def test_drafts_of_a_killed_run_are_removed(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tiny(pictures, tmp_path, step1__epochs=1, step2__epochs=0)
    (tmp_path / ".last.pt.abc.draft").write_bytes(b"half")
    shard = tmp_path / "features" / "train.0" / ".00000.safetensors.abc.draft"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"half")
    (tmp_path / "lock").write_text("process 1 on nowhere\n")  # of a killed run: stops nobody
    train(config, say=quiet)
    assert not {".last.pt.abc.draft", "lock"} & {path.name for path in tmp_path.iterdir()} and not shard.exists()


# -- two runs on one folder --


def test_second_run_on_the_same_folder_is_refused(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tiny(pictures, tmp_path / "run", step1__epochs=500, step2__epochs=0)
    first = processes.start(config)
    processes.wait_for(config, "epoch 1/500")
    other = tiny(pictures, tmp_path / "run", step1__epochs=1, step2__epochs=0)
    said = Path(f"{config.output}.0.txt").rename(tmp_path / "first.txt")
    assert processes.run(other) == [2]
    assert f"in use by process {first[0].pid} on " in processes.said(other) and config.output in processes.said(other)
    before = said.stat().st_size
    time.sleep(0.5)
    assert first[0].is_alive() and said.stat().st_size > before, "the first one was disturbed"
    first[0].kill()
    assert processes.finish(first) == SIGKILLED
    assert (Path(config.output) / "lock").exists()
    assert processes.run(other) == [0], processes.said(other)


# -- no room --


def test_full_disk_stops_with_a_word_and_resumes(
    uninterrupted: tuple[dict[str, Any], float],
    pictures: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The kernel's own refusal, in the middle of a file: checkpoints grow past a limit once step 2 begins."""
    config = tiny(pictures, tmp_path / "run", **RECIPE)
    assert processes.run(config, kill=("sadcl.train.run:build_prototypes", 1, "before")) == SIGKILLED
    before = load_checkpoint(Path(config.output) / "last.pt")
    size = (Path(config.output) / "last.pt").stat().st_size
    assert processes.run(config, "--resume", largest_file=size + 500) == [2]
    said = processes.said(config)
    assert "last.pt: cannot be written: File too large; what it held before is whole; make room" in said
    assert "Traceback" not in said
    assert differences(load_checkpoint(Path(config.output) / "last.pt"), before) == []
    assert not list(Path(config.output).glob(".*"))
    assert processes.run(config, "--resume") == [0], processes.said(config)
    assert differences(result(config), uninterrupted[0]) == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_no_space_left_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.zeros(5)})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(CannotWrite, match="No space left on device.*whole; make room") as caught:
            save_checkpoint(path, {"weights": torch.ones(5)})
    assert str(caught.value).startswith(f"{path}: ") and caught.value.errno == errno.ENOSPC
    assert not load_checkpoint(path)["weights"].any()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left_behind_torchs_own_error(tmp_path: Path) -> None:
    """torch.save raises a RuntimeError that does not name the reason."""

    def write(file: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            torch.save(torch.zeros(5), full)

    with pytest.raises(CannotWrite, match="No space left on device"):
        write_atomically(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_feature_maps_is_said(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"00000.safetensors: cannot be written: No space left.*make room"):
        train(tiny(pictures, tmp_path), say=quiet)
    assert not [path for path in (tmp_path / "features").rglob("*") if path.is_file()]


# -- damaged files --


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_any_flipped_bit_is_found(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / f"model.{suffix}"
    content = {"model": {"weight": torch.randn(20, 20)}, "classes": ["a", "b"], "config": {"seed": 1}}
    save_checkpoint(whole, content)
    if suffix == "pt":
        path.write_bytes(whole.read_bytes())
    else:
        save_weights(path, load_checkpoint(whole))
    assert torch.equal(load_checkpoint(path)["model"]["weight"], content["model"]["weight"])
    data = path.read_bytes()
    for place in [*range(0, len(data), 13), *range(len(data) - 50, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: "), place


def test_checkpoints_without_checksum_still_load(tmp_path: Path) -> None:
    """As the first versions wrote them."""
    torch.save({"format": "sadcl-checkpoint", "version": 1, "classes": ["a"]}, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt")["classes"] == ["a"]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_in_the_middle_of_an_epoch(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    workers: int,
) -> None:
    recipe = {"model__train_backbone": "true", "step1__epochs": 1, "step2__epochs": 0, "checkpoint_every": 1}
    options = {**recipe, "data__workers": workers}
    mine = tmp_path / "pictures"
    shutil.copytree(pictures, mine)
    whole = train(tiny(mine, tmp_path / "whole", **options), say=quiet)
    picture = mine / f"{list(ShuffledBatches(24, 8, 0))[1][3]}.png"  # of step 1's second batch
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    config = tiny(mine, tmp_path / "run", **options)
    with pytest.raises(ImageFileError, match="once it is mended, --resume goes on") as caught:
        train(config, say=quiet)
    assert str(caught.value).startswith(f"{picture}: cannot be decoded")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1
    picture.write_bytes(content)
    resumed = train(config, resume=True, say=quiet)
    assert resumed["stages"] == whole["stages"]
    first, second = (load_checkpoint(tmp_path / name / "step1.pt")["model"] for name in ("whole", "run"))
    assert differences(first, second) == []


# -- the model alone --


def test_weights_as_safetensors_evaluate_and_predict(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, path = trained / "run" / "step2.pt", trained / "weights.safetensors"
    assert main(["export", str(checkpoint), "--format", "safetensors", "--output", str(path)]) == 0
    content, loaded = load_checkpoint(checkpoint), load_checkpoint(path)
    assert differences(loaded["model"], content["model"]) == []
    for key in ("classes", "config", "preprocessing", "thresholds", "architecture", "protocol"):
        assert loaded[key] == content[key]
    assert "training" not in loaded
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # by anyone, without this library
        assert json.loads(file.metadata()["sadcl"])["classes"] == ["green", "red"]
    figures = []
    for given in (checkpoint, path):
        capsys.readouterr()
        assert main(["eval", str(given), "--json", "--threshold", "tuned"]) == 0
        assert main(["predict", str(given), str(trained / "0.png"), "--json"]) == 0
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1]
    assert main(["export", str(checkpoint), "--format", "safetensors", "--output", str(trained / "w.bin")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match="not written by sadcl export"):
        load_checkpoint(tmp_path / "theirs.safetensors")
