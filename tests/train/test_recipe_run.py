"""Whole runs with the recipe's options: mid-epoch resume, early stop, best epoch, transfer, sizes, dry run, configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "torchvision", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from test_train import learning, pictures, quiet, tiny, weights  # noqa: E402, F401

from sadcl.checkpoint import load_checkpoint, restore_model  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.commands.plan import plan  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.train.config import parse_arguments  # noqa: E402
from sadcl.train.loop import NonFiniteLoss, Stage  # noqa: E402
from sadcl.train.run import Run  # noqa: E402
from sadcl.train.transfer import VOC_FROM_COCO, class_rows, init_from  # noqa: E402

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
EVERYTHING = {
    "model__train_backbone": "true",
    "control": "false",
    "ema__decay": 0.9,
    "ema__keep": "better",
    "amp": "bf16",
    "channels_last": "true",
    **{
        f"step{number}__{key}": value
        for number in (1, 2)
        for key, value in {
            "accumulate": 2,
            "clip": 1.0,
            "select": "best",
            "decay_vectors": "false",
            "backbone_factor": 0.5,
            "augment.flip": 0.5,
            "augment.rand_augment": 1,
            "augment.cutout": 0.3,
            "augment.crop_scales": "[1.0, 0.75]",
        }.items()
    },
}


@pytest.mark.parametrize(("workers", "amp"), [(0, "bf16"), (1, "off")])
def test_interrupted_in_the_middle_of_an_epoch_continues_bit_for_bit(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    amp: str,
) -> None:
    """Every option at once; 2 optimizer steps an epoch, stopped after the first of the second epoch of either step."""
    options = {**EVERYTHING, "checkpoint_every": 1, "data__workers": workers, "amp": amp}
    whole = train(tiny(pictures, tmp_path / "whole", **options), say=quiet)
    config = tiny(pictures, tmp_path / "parts", **options)
    save = Run._save_last

    def save_then_stop(self: Run, stage: Stage) -> None:
        save(self, stage)
        if (self.progress.stage, stage.batches.epoch, stage.batches.batch) == where:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save_last", save_then_stop)
        for number, name in enumerate(("step1", "step2")):
            where = (name, 1, 2)
            with pytest.raises(KeyboardInterrupt):
                train(config, resume=number > 0, say=quiet)
    said: list[str] = []
    parts = train(config, resume=True, say=said.append)
    assert any("after epoch 1, after batch 2 of the next" in line for line in said)
    assert learning(parts) == learning(whole) and parts["stages"] == whole["stages"]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], value), name


def test_last_holds_everything(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    train(tiny(pictures, tmp_path, **{**EVERYTHING, "amp": "off"}), say=quiet)
    last = load_checkpoint(tmp_path / "last.pt")
    assert {"config", "classes", "preprocessing", "thresholds", "history", "best", "model", "training"} <= set(last)
    assert {"head.memory_bank.slots", "head.prototypes"} <= set(last["model"])
    training = last["training"]
    assert set(training["rng"]) == {"torch", "cuda", "numpy", "python"}
    assert training["ema"] and training["optimizer"]["state"] and training["position"]["epoch"] == 2
    assert {"scheduler", "scaler", "steps", "sums"} <= set(training)


def scripted(maps: list[float]) -> Callable[..., Any]:
    """An evaluation that finds these mAPs, one after another."""
    real, left = Run._evaluate, list(maps)

    def evaluate(self: Run, stage: Stage, row: dict[str, Any]) -> Any:
        report = real(self, stage, row)
        object.__setattr__(report, "mAP", left.pop(0))
        row["val_mAP"] = report.mAP
        return report

    return evaluate


def test_early_stop_keeps_the_best_epoch(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(pictures, tmp_path, step1__epochs=9, step1__patience=2, step1__select="best", step2__epochs=0)
    monkeypatch.setattr(Run, "_evaluate", scripted([0.2, 0.5, 0.3, 0.4, 0.9]))
    said: list[str] = []
    metrics = train(config, say=said.append)
    assert "best epoch, chosen on these validation images" in metrics["protocol"]
    assert len(metrics["history"]) == 4 and any("stopping early" in line for line in said)
    kept, last = load_checkpoint(tmp_path / "step1.pt"), load_checkpoint(tmp_path / "last.pt")
    assert kept["epoch"] == 2 and last["epoch"] == 4 and last["best"] == {"mAP": 0.5, "epoch": 2}
    assert not all(torch.equal(value, last["model"][name]) for name, value in kept["model"].items())
    resumed = train(config, resume=True, say=quiet)  # goes no further
    assert len(resumed["history"]) == 4


def test_which_weights_are_kept_is_what_the_config_says(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    kept = {}
    for keep in ("model", "ema"):
        options = {"ema__decay": 0.5, "ema__keep": keep, "step1__epochs": 1, "step2__epochs": 0}
        metrics = train(tiny(pictures, tmp_path / keep, **options), say=quiet)
        row = metrics["history"][-1]
        assert row["kept"] == keep and row["val_mAP"] == row[f"val_mAP_{keep}"]
        kept[keep] = load_checkpoint(tmp_path / keep / "step1.pt")["model"]
    training = load_checkpoint(tmp_path / "ema" / "last.pt")
    for name, value in kept["ema"].items():
        assert torch.equal(value, training["training"]["ema"][name])
        assert torch.equal(kept["model"][name], training["model"][name])
    assert any(not torch.equal(kept["ema"][name], kept["model"][name]) for name in kept["ema"])


def test_non_finite_loss_leaves_its_batch(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(
        NonFiniteLoss, match=r"step1, epoch \d.*not finite: classification.*nonfinite\.pt.*learning rate"
    ):
        train(tiny(pictures, tmp_path, step1__learning_rate=1e30), say=quiet)
    dump = torch.load(tmp_path / "nonfinite.pt", weights_only=True)
    assert len(dump["images"]) == len(dump["labels"]) == 8
    assert dump["stage"] == "step1" and dump["step"] >= 1 and set(dump["parts"]) == {"total", "classification"}


def test_finished_models_at_another_size(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    options = {"eval_image_size": 96, "step1__epochs": 1, "step2__epochs": 1, "control": "false"}
    metrics = train(tiny(pictures, tmp_path, **options), say=quiet)
    assert set(metrics["at_96"]) == {"step1", "step2"}
    model = restore_model(load_checkpoint(tmp_path / "step2.pt"))
    output = model(torch.randn(1, 3, 96, 96), need_weights=True, contrastive=False)
    small = model(torch.randn(1, 3, 64, 64), need_weights=True, contrastive=False)
    assert output.attention.shape[-1] > small.attention.shape[-1]


# -- other labels --


def test_a_size_that_the_backbone_cannot_take_is_refused_before_training(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tiny(pictures, tmp_path, eval_image_size=96, model__backbone="timm:visformer_tiny")
    for run in (lambda: Run(config, quiet), lambda: plan(config)):
        with pytest.raises(ValueError, match="eval_image_size: backbone: Visformer cannot take images of 96 x 96"):
            run()


def test_voc_takes_cocos_rows() -> None:
    voc = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    names = (voc + "sheep sofa train tvmonitor").split()
    assert tuple(class_rows(names, 80)) == VOC_FROM_COCO
    assert class_rows(["Dining table", "zebra"], ["zebra", "dining_table", "cat"]) == [1, 0]
    assert class_rows(["new", "cat"], ["cat"]) == [None, 0]
    with pytest.raises(ValueError, match="class_map"):
        class_rows(["a", "b"], 3)


def test_weights_of_a_run_with_other_labels(pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    train(tiny(pictures, tmp_path, step1__epochs=1, step2__epochs=1, control="false"), say=quiet)
    theirs = load_checkpoint(tmp_path / "step2.pt")["model"]  # blue, green, red
    config = tiny(pictures, tmp_path, model__init_from=tmp_path / "step2.pt")
    from sadcl.train.build import build_model

    model = build_model(config, 2)
    fresh = model.head.queries.detach()[1].clone()
    said = init_from(model, config, ("red", "violet"))
    assert "1 labels taken over; new: violet" in said
    assert torch.equal(model.head.queries[0], theirs["head.queries"][2])
    assert torch.equal(model.head.classifier.bias[0], theirs["head.classifier.bias"][2])
    assert torch.equal(model.head.queries[1], fresh)
    assert all(torch.equal(v, theirs[f"backbone.{k}"]) for k, v in model.backbone.state_dict().items())
    config.model.class_map = [1, 0]
    init_from(model, config, ("red", "violet"))
    assert torch.equal(model.head.queries.detach(), theirs["head.queries"][[1, 0]])
    config.model.class_map = [1, 7]
    with pytest.raises(ValueError, match="class_map"):
        init_from(model, config, ("red", "violet"))
    config.model.class_map, config.model.hidden_dim = None, 32
    with pytest.raises(ValueError, match="another network"):
        init_from(build_model(config, 3), config, ("red", "green", "blue"))


# -- the plan, and the configs --


def test_dry_run_prints_the_plan_and_trains_nothing(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(pictures, tmp_path / "out", step1__accumulate=2, ema__decay=0.99)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "24 images, 3 labels" in printed and "12 images" in printed
    assert "2 optimizer steps an epoch, 4 in 2 epochs" in printed  # step 1: 3 batches, two a step
    assert "3 optimizer steps an epoch, 6 in 2 epochs" in printed  # step 2
    for part in ("backbone", "prototypes", "activations", "optimizer", "onecycle", "average of the weights"):
        assert part in printed
    run = Run(config, quiet)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert f"model: {trained:,} at 0.001" in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_repository_run_dry(path: Path) -> None:
    parsed = parse_arguments(["--config", str(path), "--dry-run"])
    assert parsed.dry_run and parsed.config.output == f"runs/{path.stem}"
    printed = plan(parsed.config)
    if path.stem == "smoke":
        return
    if path.stem not in PARAMETERS:  # a recipe of today
        assert "model.safetensors (not found)" in printed and "on the Hugging Face hub" in printed
        assert "licence" in printed and "sadcl train --model.pretrained weights/" in printed
        assert ("feature maps on disk" in printed) == path.stem.startswith("frozen")
        return
    assert "not found at data" in printed and "82,783" in printed if path.stem == "coco448" else "assumed" in printed
    assert f"{PARAMETERS[path.stem]:,}" in printed
    assert "cutout" in printed and "multi-scale crop" in printed and "100 SSCL + 50 PSCL" in printed


# 200,037,456 at 80 labels; a label is a query, a row and a bias of the classifier, and a prototype.
PARAMETERS = {
    name: 200_037_456 + (labels - 80) * (3 * 2048 + 1)
    for name, labels in {"coco448": 80, "voc2007": 20, "voc2012": 20, "nuswide": 81, "vg500": 500}.items()
}
