"""Reference training on a tiny drawn source: same twice, killed and resumed, config, checkpoints, pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.checkpoint import (  # noqa: E402
    CheckpointError,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    write_atomically,
)
from sadcl.commands.evaluate import evaluate_checkpoint  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.train.config import TrainConfig, config_from_dict, parse_config  # noqa: E402
from sadcl.train.loop import NonFiniteLoss, Stage  # noqa: E402
from sadcl.train.run import Run  # noqa: E402
from tests.here import coloured_squares  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures of one to three coloured squares, and the lists that name them."""
    return coloured_squares(tmp_path_factory.mktemp("pictures"), 36, train=24)


def tiny(pictures: Path, output: Path, **changes: Any) -> TrainConfig:
    arguments = {
        "output": output,
        "batch_size": 8,
        "plots": "false",
        "data.source": "csv",
        "data.train_csv": pictures / "train.csv",
        "data.val_csv": pictures / "val.csv",
        "data.image_size": 64,
        "data.workers": 0,
        "model.backbone": "timm:test_resnet",
        "model.pretrained": "false",
        "model.hidden_dim": 16,
        "model.num_heads": 2,
        "model.ffn_dim": 32,
        "model.proj_dim": 8,
        "step1.epochs": 2,
        "step2.epochs": 2,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return parse_config([f"--{key}={value}" for key, value in arguments.items()])[0]


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, dict[str, Any]]:
    """One uninterrupted run, with its pictures."""
    config = tiny(pictures, tmp_path_factory.mktemp("finished"), plots="true")
    return config, train(config, say=quiet)


def learning(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The history without what a clock measured."""
    return [{key: value for key, value in row.items() if key != "speed"} for row in metrics["history"]]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / "step2.pt")["model"]


def test_same_seed_gives_the_same_run_bit_for_bit(
    finished: tuple[TrainConfig, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    config, metrics = finished
    again = train(tiny(pictures, tmp_path), say=quiet)
    assert learning(again) == learning(metrics)
    assert again["stages"] == metrics["stages"]
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, weights(config.output)[name]), name
    other = train(tiny(pictures, tmp_path / "other", seed=1), say=quiet)
    assert learning(other) != learning(metrics)


def test_run_leaves_what_it_promises(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, metrics = finished
    folder = Path(config.output)
    for name in ("scenes", "curves", "attention", "embeddings"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 200
    assert json.loads((folder / "metrics.json").read_text())["mAP"] == metrics["mAP"]
    assert "voc_area" in metrics["protocol"] and "val.csv" in metrics["protocol"]
    assert list(metrics["stages"]) == ["step1", "control", "step2"]
    assert [row["stage"] for row in metrics["history"]] == ["step1"] * 2 + ["control"] * 2 + ["step2"] * 2
    assert set(metrics["history"][-1]["losses"]) == {"total", "sample", "prototype", "classification"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "temporary files left behind"
    assert parse_config(["--config", str(folder / "config.yaml")])[0] == config


def test_training_learns(finished: tuple[TrainConfig, dict[str, Any]], pictures: Path, tmp_path: Path) -> None:
    del finished
    steps = {"step1__epochs": 25, "step1__learning_rate": 3e-3, "step2__epochs": 1, "loss__gamma_neg": 0}
    config = tiny(pictures, tmp_path, control="false", model__dropout=0, **steps)
    learned = train(config, say=quiet)
    first, last = learned["history"][0], learned["history"][-1]
    assert last["losses"]["classification"] < 0.8 * first["losses"]["classification"]
    assert "control" not in learned["stages"]


@pytest.mark.parametrize("stop_after", [("step1", 1), ("control", 2), ("step2", 1)])
def test_interrupted_and_resumed_is_the_same_run(
    finished: tuple[TrainConfig, dict[str, Any]],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: tuple[str, int],
) -> None:
    config, metrics = finished
    save = Run._save_last

    def save_then_stop(self: Run, stage: Stage) -> None:
        save(self, stage)
        if (self.progress.stage, stage.batches.epoch) == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save_last", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(pictures, tmp_path), say=quiet)
    resumed = train(tiny(pictures, tmp_path), resume=True, say=quiet)
    assert learning(resumed) == learning(metrics)
    assert resumed["stages"] == metrics["stages"]
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, weights(config.output)[name]), name


def test_killed_process_leaves_whole_files_and_resumes(
    finished: tuple[TrainConfig, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    config = tiny(pictures, tmp_path)
    (tmp_path / "given.yaml").write_text(config.as_yaml())
    command = [sys.executable, "-m", "sadcl.train", "--config", str(tmp_path / "given.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.glob("*.pt"):
        load_checkpoint(path)
    resumed = train(config, resume=True, say=quiet)
    assert learning(resumed) == learning(finished[1])


def test_resume_refuses_another_config(finished: tuple[TrainConfig, dict[str, Any]], pictures: Path) -> None:
    config, _ = finished
    with pytest.raises(CheckpointError, match=r"step2.epochs = 2, not 5"):
        train(tiny(pictures, Path(config.output), step2__epochs=5), resume=True, say=quiet)


def test_resume_without_anything_starts_anew(pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    metrics = train(tiny(pictures, tmp_path, step1__epochs=1, step2__epochs=0), resume=True, say=said.append)
    assert any("nothing to resume" in line for line in said)
    assert list(metrics["stages"]) == ["step1"]


def test_checkpoint_alone_is_enough(finished: tuple[TrainConfig, dict[str, Any]]) -> None:
    config, metrics = finished
    content = load_checkpoint(Path(config.output) / "step2.pt")
    assert content["classes"] == ["blue", "green", "red"]
    assert config_from_dict(content["config"]) == config
    assert content["preprocessing"]["size"] == [64, 64]
    assert not restore_model(content).training
    report, about = evaluate_checkpoint(Path(config.output) / "step2.pt")
    assert about.endswith("val.csv")
    assert report.mAP == pytest.approx(metrics["mAP"], abs=1e-9)  # 12 images: the ranking does not change


def test_fine_tuning_the_backbone_trains_it(pictures: Path, tmp_path: Path) -> None:
    config = tiny(pictures, tmp_path, model__train_backbone="true", step1__epochs=1, step2__epochs=1, control="false")
    run = Run(config, say=quiet)
    before = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}
    run.run()
    after = load_checkpoint(tmp_path / "step2.pt")["model"]
    assert any(not torch.equal(value, after[f"backbone.{name}"]) for name, value in before.items())


def test_frozen_backbone_stays_as_it_was(finished: tuple[TrainConfig, dict[str, Any]], pictures: Path) -> None:
    config, _ = finished
    torch.manual_seed(config.seed)
    from sadcl.train.build import build_model

    initial = build_model(config, 3).backbone.state_dict()
    for name, value in weights(config.output).items():
        if name.startswith("backbone."):
            assert torch.equal(value, initial[name.removeprefix("backbone.")]), name


def test_bank_is_updated_with_the_steps_own_features(pictures: Path, tmp_path: Path) -> None:
    """After step 2 some slots hold features, no longer the prototypes they were filled with."""
    config = tiny(pictures, tmp_path, step1__epochs=10, step2__epochs=1, control="false", step1__learning_rate=1e-2)
    train(config, say=quiet)
    model = weights(tmp_path)
    bank = model["head.memory_bank.slots"]
    assert bank.shape == (8, 3, 16)
    assert not all(torch.equal(bank[0], slot) for slot in bank[1:])


def test_non_finite_loss_stops_the_run(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="not finite"):
        train(tiny(pictures, tmp_path, step1__learning_rate=1e30), say=quiet)


# -- checkpoints --


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "not a readable checkpoint"),
        (lambda content: b"", "an empty file, not a checkpoint"),
        (lambda content: b"not a checkpoint at all", "a text, not a checkpoint"),
    ],
)
def test_broken_checkpoint_names_its_path(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = tmp_path / "model.pt"
    save_checkpoint(path, {"weights": torch.randn(1000)})
    assert torch.is_tensor(load_checkpoint(path)["weights"])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_foreign_and_missing_checkpoints(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of sadcl train"):
        load_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "new.pt", {})
    torch.save({**torch.load(tmp_path / "new.pt", weights_only=True), "version": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="newer sadcl"):
        load_checkpoint(tmp_path / "new.pt")


# -- configuration --


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 7\nstep1:\n  epochs: 9\n  learning_rate: 0.5\n")
    config, resume = parse_config(["--config", str(tmp_path / "c.yaml"), "--step1.epochs", "3", "--resume"])
    assert resume and config.seed == 7 and config.step1.epochs == 3 and config.step1.learning_rate == 0.5
    assert config.step2 == TrainConfig().step2
    assert config_from_dict(config.as_dict()) == config


def test_repository_configs_parse() -> None:
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        parse_config(["--config", str(path)])


def test_file_with_an_unknown_key_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("step2:\n  epochz: 3\n")
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", str(tmp_path / "c.yaml")])
    assert stopped.value.code == 2
    assert "epochz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--step2.epoch", "3"], "step2.epoch"),  # no guessing from prefixes
        (["--nonsense", "3"], "nonsense"),
        (["--step1.epochs", "0"], "step1.epochs"),
        (["--batch_size", "x"], "batch_size"),
        (["--loss.formulation", "other"], "formulation"),
        (["--data.source", "csv"], "train_csv"),
        (["--data.image_size", "8"], "image_size"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.partition("error:")[2]


def test_config_from_dict_names_an_unknown_key() -> None:
    values = TrainConfig().as_dict()
    values["model"]["depth"] = 3
    with pytest.raises(ValueError, match="unknown config key 'depth' in ModelConfig"):
        config_from_dict(values)


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--print_config"])
    assert stopped.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_config(["--config", str(tmp_path / "printed.yaml")])[0] == TrainConfig()
    assert replace(TrainConfig(), seed=1) != TrainConfig()
