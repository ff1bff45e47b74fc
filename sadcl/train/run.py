"""One training run: step 1, its continuation as the control, prototypes, step 2; checkpoints; the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from sadcl.checkpoint import load_checkpoint, remove_drafts, save_checkpoint, write_atomically
from sadcl.commands.evaluate import restore_model
from sadcl.data.images import ImageFileError
from sadcl.losses import DualContrastiveLoss
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.model import SADCL
from sadcl.prototypes import build_prototypes
from sadcl.train import distributed
from sadcl.train.config import StepConfig, TrainConfig, augments
from sadcl.train.data import Images, Pairs, PreprocessedDataset, as_features, load_images, load_validation
from sadcl.train.lock import locked
from sadcl.train.log import RunLog
from sadcl.train.loop import (
    Forward,
    NonFiniteLoss,
    Stage,
    autocast_dtype,
    evaluate,
    make_loss,
    make_stage,
    predict_all,
    train_epoch,
)
from sadcl.train.order import seed_everything
from sadcl.train.state import content, dump_batch, others_state, read_last, restore_stage
from sadcl.train.thresholds import tune_thresholds
from sadcl.train.timing import SECTIONS
from sadcl.train.transfer import init_from

__all__ = ["Run", "build_model", "train"]

STAGES = ("step1", "control", "step2")
TITLES = {"step1": "step 1 (SARL)", "control": "step 1 continued", "step2": "step 2 (SARL + SSCL + PSCL)"}
EVAL_BATCH = 200


def build_model(config: TrainConfig, num_classes: int) -> SADCL:
    """The step-1 model of a config: no projection, prototypes or bank yet."""
    m = config.model
    return SADCL(
        num_classes,
        m.backbone,
        m.pretrained,
        image_size=config.data.image_size,
        hidden_dim=m.hidden_dim,
        num_heads=m.num_heads,
        ffn_dim=m.ffn_dim,
        encoder_layers=m.encoder_layers,
        decoder_layers=m.decoder_layers,
        proj_dim=m.proj_dim,
        dropout=m.dropout,
        contrastive=False,
        frozen=m.frozen if m.train_backbone else "all",
    )


class Run:
    """The state of one training run.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = tqdm.write) -> None:
        self.config, self.say = config, say if distributed.is_main() else _unsaid
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = distributed.run_device()
        self.autocast = autocast_dtype(config.amp, self.device)
        seed_everything(config.seed)
        self.images: Images = load_images(config.data, config.seed)
        if (count := distributed.world()) > 1:
            self.say(f"{count} processes, each with {config.batch_size} images a step")
        self.say(f"data: {self.images.title}; {len(self.images.classes)} labels\n{self.images.summary()}")
        model = build_model(config, len(self.images.classes))
        if config.model.init_from:
            self.say(init_from(model, config, self.images.classes))
        self.model = self._placed(model)
        self.loss: DualContrastiveLoss = make_loss(config.loss).to(self.device)
        self.history: list[dict[str, Any]] = []
        self.step = 0  # optimizer steps of all stages
        self.best: dict[str, Any] | None = None  # of the running stage: validation mAP, epoch, which weights
        self.thresholds: list[float] | None = None  # of a finished stage, tuned on validation
        self.log: RunLog | None = None
        self.train_set, self.val_set, self.forward = self._inputs()

    def _placed(self, model: SADCL) -> SADCL:
        """The model on the run's device, in its memory layout."""
        if self.config.channels_last:
            model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

    def _inputs(self) -> tuple[Pairs, Pairs, Forward]:
        """Training and validation items as they are, without augmentation, and what to call on them."""
        if self.config.model.train_backbone:
            preprocessed = partial(PreprocessedDataset, preprocessing=self.model.preprocessing)
            return preprocessed(self.images.train), preprocessed(self.images.val), self.model
        with distributed.main_first():
            train, val = as_features(
                self.images,
                self.model,
                self.config,
                Path(self.config.data.feature_cache or self.folder / "features"),
                self.device,
                lambda name: partial(tqdm, desc=name, unit="batch", leave=False, disable=not distributed.is_main()),
            )
        return train, val, self.model.head

    def _augmented(self, step: StepConfig, seed: int) -> tuple[Pairs, Callable[[int], None]]:
        """What a stage trains on, and how to tell it which epoch it is."""
        if not augments(step.augment):
            return self.train_set, lambda epoch: None
        from sadcl.train.augment import Augmented, make_transform

        side = self.config.data.image_size
        images = Augmented(self.images.train, make_transform(step.augment, side), seed, 2 * side)
        return PreprocessedDataset(images, self.model.preprocessing), images.set_epoch

    # -- the stages --

    def run(self, resume: bool = False) -> dict[str, MultilabelReport]:
        """All stages in order; returns the report of each at its end."""
        state = self._resume_state() if resume else None
        self.step = 0 if state is None else state.get("step", 0)
        if distributed.is_main():
            if not resume:
                for name in ("last", *STAGES):  # of an older run: nothing of it may be taken for this one's
                    (self.folder / f"{name}.pt").unlink(missing_ok=True)
            write_atomically(self.folder / "config.yaml", lambda file: file.write(self.config.as_yaml().encode()))
            self.log = RunLog(self.folder, resume_step=None if state is None else self.step)
            self.log.write("run" if state is None else "resume", self.step, config=self.config.as_dict())
        reports = {}
        for name in STAGES:
            step = self.config.step1 if name == "step1" else self.config.step2
            if step.epochs == 0 or (name == "control" and not self.config.control):
                continue
            reports[name] = self._stage(name, step, state)
        if self.log is not None:
            self.log.close()
        return reports

    def _stage(self, name: str, step: StepConfig, state: dict[str, Any] | None) -> MultilabelReport:
        """Train one stage to its end, from its beginning or from ``state``, and keep its model."""
        if state is not None and STAGES.index(state["stage"]) > STAGES.index(name):
            return self._evaluate_finished(name)  # an earlier session finished it
        resuming = state is not None and state["stage"] == name
        if name != "step1":
            self._start_from_step1(contrastive=name == "step2", prototypes=not resuming)
        seed = self.config.seed * 1000 + STAGES.index(name)
        images, set_epoch = self._augmented(step, seed)
        stage = make_stage(
            self.model,
            images,
            step,
            self.config.batch_size,
            seed,
            self._workers(),
            device=self.device,
            amp=self.config.amp,
            ema=self.config.ema,
        )
        self.best, self.thresholds = None, None
        if resuming:
            assert state is not None
            restore_stage(state, self.model, stage)
            self.best = state["best"]
        report = self._epochs(name, step, stage, set_epoch)
        if step.select == "best":
            return self._evaluate_finished(name)
        if report is None:  # killed between the last epoch and the end of the stage
            report, model = self._evaluate(stage, {})
        else:
            model = self.kept
        self._finish(name, step.epochs, model)
        return report

    def _epochs(
        self, name: str, step: StepConfig, stage: Stage, set_epoch: Callable[[int], None]
    ) -> MultilabelReport | None:
        """The epochs that are left; returns the last one's report."""
        offset = 0 if name == "step1" else self.config.step1.epochs
        report = None
        steps = stage.steps_per_epoch
        forward = distributed.parallel(self.forward, self.device)
        with tqdm(
            total=step.epochs * steps,
            initial=stage.steps,
            desc=TITLES[name],
            unit="step",
            leave=False,
            disable=not distributed.is_main(),
        ) as bar:

            def on_step(parts: dict[str, float]) -> None:
                bar.set_postfix(loss=f"{parts['total']:.1f}", refresh=False)
                bar.update()
                self.step += 1
                every = self.config.checkpoint_every
                if every and self.step % every == 0 and stage.steps % steps:
                    self._save_last(name, stage)

            while stage.batches.epoch < step.epochs and not self._impatient(step, stage.batches.epoch):
                epoch = stage.batches.epoch + 1
                began = time.perf_counter()
                set_epoch(stage.batches.epoch)
                losses = self._train_epoch(name, stage, forward, on_step)
                row: dict[str, Any] = {"stage": name, "epoch": offset + epoch, "losses": losses}
                report, self.kept = self._evaluate(stage, row)
                row["speed"] = stage.speed
                self.history.append(row)
                seconds = time.perf_counter() - began
                if self.log is not None:
                    self.log.write("epoch", self.step, **row, seconds=round(seconds, 3))
                if self.best is None or report.mAP > self.best["mAP"]:
                    self.best = {"mAP": report.mAP, "epoch": epoch}
                    if step.select == "best":
                        self._finish(name, epoch, self.kept)
                self._save_last(name, stage)
                self.say(_epoch_lines(name, f"{epoch}/{step.epochs}", row, seconds))
        if self._impatient(step, stage.batches.epoch) and stage.batches.epoch < step.epochs:
            self.say(f"{TITLES[name]}: no better mAP in {step.patience} epochs, stopping early")
        return report

    def _train_epoch(
        self, name: str, stage: Stage, forward: Forward, on_step: Callable[[dict[str, float]], None]
    ) -> dict[str, float]:
        try:
            return train_epoch(
                self.model,
                forward,
                stage,
                self.loss,
                contrastive=name == "step2",
                device=self.device,
                on_step=on_step,
            )
        except NonFiniteLoss as error:
            raise (dump_batch(self.folder, error, name, stage) if error.batch else error) from None
        except ImageFileError as error:
            reason = str(error).removeprefix(f"{error.path}: ")
            raise ImageFileError(error.path, f"{reason}; once it is mended, --resume goes on") from error

    def _impatient(self, step: StepConfig, epochs: int) -> bool:
        """Whether ``epochs`` epochs are enough: the best one was ``patience`` ago."""
        return bool(step.patience and self.best is not None and epochs - self.best["epoch"] >= step.patience)

    def _evaluate(self, stage: Stage, row: dict[str, Any]) -> tuple[MultilabelReport, SADCL]:
        """Measure the trained weights and their average; returns the report and model that config.ema.keep says.

        ``row`` of the history receives the figures, ``seen`` keeps the scores.
        """
        models = {"model": self.model} if stage.ema is None else {"model": self.model, "ema": stage.ema.module}
        seen = {name: MultilabelAccumulator() for name in models}
        runs = [(model, self.forward_of(model), seen[name]) for name, model in models.items()]
        predict_all(runs, self.shard(self.val_set), self.device, self.autocast)
        reports = distributed.share({name: accumulator.compute() for name, accumulator in seen.items()})
        keep = self.config.ema.keep if stage.ema is not None else "model"
        if keep == "better":
            keep = "ema" if reports["ema"].mAP >= reports["model"].mAP else "model"
        report, self.seen = reports[keep], seen[keep]
        row |= {"val_mAP": report.mAP, "val_CF1": report.CF1, "val_OF1": report.OF1}
        if stage.ema is not None:
            row |= {"kept": keep, **{f"val_mAP_{name}": other.mAP for name, other in reports.items()}}
        return report, models[keep]

    def _evaluate_finished(self, name: str) -> MultilabelReport:
        """Measure the model that a stage ended with, and go on with it."""
        content = load_checkpoint(self.folder / f"{name}.pt")
        self.model = self._placed(restore_model(content))
        self.forward = self.forward_of(self.model)
        self.thresholds = content["thresholds"]
        return evaluate(self.model, self.forward, self.shard(self.val_set), self.device, autocast=self.autocast)

    def evaluate_at(self, name: str, size: int) -> MultilabelReport:
        """Measure the model that a stage ended with on validation pictures of another size.

        Nothing in the model depends on the size: the positions are made for the feature map that comes.
        """
        model = self._placed(restore_model(load_checkpoint(self.folder / f"{name}.pt")))
        data = replace(self.config.data, image_size=size)
        images = load_validation(data, self.config.seed, self.images.classes)[0]
        preprocessing = replace(model.preprocessing, size=(size, size))
        batches = self.shard(PreprocessedDataset(images, preprocessing), EVAL_BATCH // 4, data.workers)
        return evaluate(model, model, batches, self.device, autocast=self.autocast)

    def _start_from_step1(self, contrastive: bool, prototypes: bool) -> None:
        """Put step 1's weights into a fresh model; for step 2 add projection, prototypes and memory bank."""
        self.model = self._placed(restore_model(load_checkpoint(self.folder / "step1.pt")))
        self.forward = self.forward_of(self.model)
        if not contrastive:
            return
        torch.manual_seed(self.config.seed + 1)  # of the projection's initial weights
        mean_features = None
        if prototypes:
            module = self.model if self.config.model.train_backbone else self.model.head
            batches = self.shard(self.train_set)
            mean_features = build_prototypes(module, batches, device=self.device, gather=distributed.gather)
        self.model.head.init_contrastive(mean_features, self.config.batch_size)

    # -- small helpers --

    def forward_of(self, model: SADCL) -> Forward:
        return model if self.config.model.train_backbone else model.head

    def _workers(self) -> int:
        return self.config.data.workers if self.config.model.train_backbone else 0  # cached maps need none

    def val_batches(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, EVAL_BATCH, num_workers=self._workers())

    def shard(self, images: Pairs, batch_size: int = EVAL_BATCH, workers: int | None = None) -> DataLoader[Any]:
        """This process's batches of a pass over ``images`` in order."""
        count: int = len(images)  # type: ignore[arg-type]
        batches = distributed.BatchShard(count, batch_size)
        return DataLoader(images, batch_sampler=batches, num_workers=self._workers() if workers is None else workers)

    def _resume_state(self) -> dict[str, Any] | None:
        """What to continue from, and a word about it."""
        state = read_last(self)
        if state is None:
            self.say(f"nothing to resume in {self.folder}: starting from the beginning")
            return None
        self.history = list(state["history"])
        batch = state["training"]["position"]["batch"]
        middle = f", after batch {batch} of the next" if batch else ""
        self.say(f"resuming {TITLES[state['stage']]} after epoch {state['epoch']}{middle}")
        return state

    def _finish(self, name: str, epoch: int, model: SADCL) -> None:
        """Keep a stage's model, with thresholds tuned on the validation scores it was just measured on."""
        self.thresholds = tune_thresholds(self.seen.scores, self.seen.labels).tolist()
        if distributed.is_main():
            save_checkpoint(self.folder / f"{name}.pt", content(self, model, name, epoch))
        self.thresholds = None
        distributed.wait()

    def _save_last(self, name: str, stage: Stage) -> None:
        """Write the checkpoint that a resume begins from."""
        others = others_state(self.model, stage)
        if distributed.is_main():
            kept = content(self, self.model, name, stage.batches.epoch, stage, others)
            save_checkpoint(self.folder / "last.pt", kept)


def _epoch_lines(name: str, epoch: str, row: dict[str, Any], seconds: float) -> str:
    """What people read after an epoch."""
    losses, speed = row["losses"], row["speed"]
    parts = "  ".join(f"{part} {value:.3f}" for part, value in losses.items() if part != "total")
    both = f" (trained {row['val_mAP_model']:.4f}, average {row['val_mAP_ema']:.4f})" if "kept" in row else ""
    shares = ", ".join(f"{section} {speed[section]:.0%}" for section in SECTIONS)
    return (
        f"{TITLES[name]:<28} epoch {epoch}  val mAP {row['val_mAP']:.4f}{both}  "
        f"loss {losses['total']:.2f} ({parts})  {seconds:.1f} s\n"
        f"{'':<28} {speed['images_per_second']:.0f} images/s: {shares}"
    )


def train(config: TrainConfig, resume: bool = False, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Run a config to its end and write ``metrics.json`` and the pictures.

    Started by torchrun, the processes train together; the main one writes and speaks.

    Args:
        config: what to run.
        resume: continue the run in ``config.output``.
        say: receives the lines that people read.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FolderInUse: another process runs in ``config.output``.
    """
    folder = Path(config.output)
    with distributed.joined():
        if not distributed.is_main():
            distributed.wait()  # the folder is ours
            return _train(config, resume, say)
        with locked(folder):
            remove_drafts(folder)
            distributed.wait()
            return _train(config, resume, say)


def _train(config: TrainConfig, resume: bool, say: Callable[[str], None]) -> dict[str, Any]:
    from sadcl.report.report import draw, summary, table

    began = time.perf_counter()
    run = Run(config, say)
    reports = run.run(resume)
    metrics = summary(run, reports)
    if config.eval_image_size:
        sized = {name: run.evaluate_at(name, config.eval_image_size) for name in reports}
        metrics[f"at_{config.eval_image_size}"] = {name: report.as_dict() for name, report in sized.items()}
    if distributed.world() > 1:
        metrics["processes"] = distributed.world()
    if not distributed.is_main():
        return metrics
    write_atomically(run.folder / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    say(table(run, reports))
    if config.eval_image_size:
        for name, report in sized.items():
            say(f"{TITLES[name]:<28} at {config.eval_image_size} pixels: mAP {report.mAP:.4f}")
    if config.plots:
        draw(run, reports, metrics)
    say(f"done in {time.perf_counter() - began:.0f} s; everything is in {run.folder}/:")
    for path in sorted(
        path for path in run.folder.iterdir() if path.suffix in (".html", ".json", ".pt", ".png", ".yaml")
    ):
        say(f"  {path}")
    return metrics


def _unsaid(line: str) -> None:
    """What the other processes say."""
