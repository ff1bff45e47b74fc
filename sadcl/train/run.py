"""One training run: step 1, its continuation as the control, prototypes, step 2; checkpoints; the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sadcl import backends
from sadcl.checkpoint import load_checkpoint, make_folder, restore_model, save_checkpoint, write_atomically
from sadcl.data.images import ImageFileError
from sadcl.losses import DualContrastiveLoss
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.model import SADCL
from sadcl.prototypes import build_prototypes
from sadcl.train import distributed
from sadcl.train.build import build_model, make_loss
from sadcl.train.config import StepConfig, TrainConfig, augments
from sadcl.train.console import bar, say
from sadcl.train.data import EVAL_BATCH, Images, Pairs, PreprocessedDataset, as_features, load_images, load_validation
from sadcl.train.log import RunLog
from sadcl.train.loop import (
    Forward,
    NonFiniteLoss,
    Stage,
    autocast_dtype,
    evaluate,
    make_stage,
    predict_all,
    train_epoch,
)
from sadcl.train.order import seed_everything
from sadcl.train.state import Progress, check_backbone, content, dump_batch, others_state, read_last, restore_stage
from sadcl.train.thresholds import tune_thresholds
from sadcl.train.timing import SECTIONS
from sadcl.train.transfer import init_from

__all__ = ["TITLES", "Run"]

STAGES = ("step1", "control", "step2")
TITLES = {"step1": "step 1 (SARL)", "control": "step 1 continued", "step2": "step 2 (SARL + SSCL + PSCL)"}


class Run:
    """The state of one training run.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = say) -> None:
        self.config, self.say = config, say if distributed.is_main() else _unsaid
        self.folder = Path(config.output)
        make_folder(self.folder)
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
        if self.device.type == "cpu" and not (cpp := backends()["cpp"]).available:
            self.say(f"torch's operators do the work of the C++ kernels: {cpp.reason}")
        self.loss: DualContrastiveLoss = make_loss(config.loss).to(self.device)
        self.progress = Progress()
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
                lambda name: partial(bar, desc=name, unit="batch"),
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

    def run(self, resume: bool = False, edited: bool = False) -> dict[str, MultilabelReport]:
        """All stages in order; returns the report of each at its end.

        Args:
            resume: go on from ``last.pt``.
            edited: then go on with other pictures, too.
        """
        state = self._resume_state(edited) if resume else None
        step = self.progress.step
        if distributed.is_main():
            if not resume:
                for name in ("last", *STAGES):  # of an older run: nothing of it may be taken for this one's
                    (self.folder / f"{name}.pt").unlink(missing_ok=True)
            write_atomically(self.folder / "config.yaml", lambda file: file.write(self.config.as_yaml().encode()))
            self.log = RunLog(self.folder, resume_step=None if state is None else step)
            self.log.write("run" if state is None else "resume", step, config=self.config.as_dict())
        reports = {}
        for name in STAGES:
            settings = self.config.step1 if name == "step1" else self.config.step2
            if settings.epochs == 0 or (name == "control" and not self.config.control):
                continue
            reports[name] = self._stage(name, settings, state)
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
        self.progress.stage, self.progress.best = name, None
        if resuming:
            assert state is not None
            restore_stage(state, self.model, stage)
            self.progress.best = None if "val" in state["edits"] else state["best"]  # measured on other pictures
        self.progress.epoch = stage.batches.epoch
        report = self._epochs(step, stage, set_epoch)
        if step.select == "best":
            return self._evaluate_finished(name)
        if report is None:  # killed between the last epoch and the end of the stage
            report = self._evaluate(stage, {})
        self._finish()
        return report

    def _epochs(self, step: StepConfig, stage: Stage, set_epoch: Callable[[int], None]) -> MultilabelReport | None:
        """The epochs that are left; returns the last one's report."""
        progress, name = self.progress, self.progress.stage
        offset = 0 if name == "step1" else self.config.step1.epochs
        report = None
        steps = stage.steps_per_epoch
        forward = distributed.parallel(self.forward, self.device)
        with bar(total=step.epochs * steps, initial=stage.steps, desc=TITLES[name], unit="step") as shown:

            def on_step(parts: dict[str, float]) -> None:
                shown.set_postfix(loss=f"{parts['total']:.1f}", refresh=False)
                shown.update()
                progress.step += 1
                every = self.config.checkpoint_every
                if every and progress.step % every == 0 and stage.batches.batch < len(stage.batches):
                    self._save_last(stage)

            while progress.epoch < step.epochs and not self._impatient(step):
                began = time.perf_counter()
                set_epoch(progress.epoch)
                losses = self._train_epoch(stage, forward, on_step)
                progress.epoch = stage.batches.epoch
                row: dict[str, Any] = {"stage": name, "epoch": offset + progress.epoch, "losses": losses}
                report = self._evaluate(stage, row)
                row["speed"] = stage.speed
                progress.history.append(row)
                seconds = time.perf_counter() - began
                if self.log is not None:
                    self.log.write("epoch", progress.step, **row, seconds=round(seconds, 3))
                if progress.best is None or report.mAP > progress.best["mAP"]:
                    progress.best = {"mAP": report.mAP, "epoch": progress.epoch}
                    if step.select == "best":
                        self._finish()
                self._save_last(stage)
                self.say(_epoch_lines(name, f"{progress.epoch}/{step.epochs}", row, seconds))
        if progress.epoch < step.epochs:
            self.say(f"{TITLES[name]}: no better mAP in {step.patience} epochs, stopping early")
        return report

    def _train_epoch(
        self, stage: Stage, forward: Forward, on_step: Callable[[dict[str, float]], None]
    ) -> dict[str, float]:
        try:
            return train_epoch(
                self.model,
                forward,
                stage,
                self.loss,
                contrastive=self.progress.stage == "step2",
                device=self.device,
                on_step=on_step,
            )
        except NonFiniteLoss as error:
            raise (dump_batch(self.folder, error, self.progress.stage, stage) if error.batch else error) from None
        except ImageFileError as error:
            reason = str(error).removeprefix(f"{error.path}: ")
            raise ImageFileError(error.path, f"{reason}; once it is mended, --resume goes on") from error

    def _impatient(self, step: StepConfig) -> bool:
        """Whether these epochs are enough: the best one was ``patience`` ago."""
        best, epoch = self.progress.best, self.progress.epoch
        return bool(step.patience and best is not None and epoch - best["epoch"] >= step.patience)

    def _evaluate(self, stage: Stage, row: dict[str, Any]) -> MultilabelReport:
        """Measure the trained weights and their average; returns the report of those that config.ema.keep says.

        ``row`` of the history receives the figures, the progress these weights and their scores.
        """
        models = {"model": self.model} if stage.ema is None else {"model": self.model, "ema": stage.ema.module}
        seen = {name: MultilabelAccumulator() for name in models}
        runs = [(model, self.forward_of(model), seen[name]) for name, model in models.items()]
        predict_all(runs, self.shard(self.val_set), self.device, self.autocast)
        reports = distributed.share({name: accumulator.compute() for name, accumulator in seen.items()})
        keep = self.config.ema.keep if stage.ema is not None else "model"
        if keep == "better":
            keep = "ema" if reports["ema"].mAP >= reports["model"].mAP else "model"
        report, self.progress.seen, self.progress.kept = reports[keep], seen[keep], models[keep]
        row |= {"val_mAP": report.mAP, "val_CF1": report.CF1, "val_OF1": report.OF1}
        if stage.ema is not None:
            row |= {"kept": keep, **{f"val_mAP_{name}": other.mAP for name, other in reports.items()}}
        return report

    def _evaluate_finished(self, name: str) -> MultilabelReport:
        """Measure the model that a stage ended with, and go on with it."""
        self.model = self._finished(name)
        self.forward = self.forward_of(self.model)
        return evaluate(self.model, self.forward, self.shard(self.val_set), self.device, autocast=self.autocast)

    def evaluate_at(self, name: str, size: int) -> MultilabelReport:
        """Measure the model that a stage ended with on validation pictures of another size.

        Nothing in the model depends on the size: the positions are made for the feature map that comes.
        """
        model = self._finished(name)
        data = replace(self.config.data, image_size=size)
        images = load_validation(data, self.config.seed, self.images.classes)[0]
        preprocessing = replace(model.preprocessing, size=(size, size))
        batches = self.shard(PreprocessedDataset(images, preprocessing), EVAL_BATCH // 4, data.workers)
        return evaluate(model, model, batches, self.device, autocast=self.autocast)

    def _start_from_step1(self, contrastive: bool, prototypes: bool) -> None:
        """Put step 1's weights into a fresh model; for step 2 add projection, prototypes and memory bank."""
        self.model = self._finished("step1")
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

    def _finished(self, name: str) -> SADCL:
        """The model that a stage ended with."""
        return self._placed(restore_model(load_checkpoint(self.folder / f"{name}.pt")))

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

    def _resume_state(self, edited: bool) -> dict[str, Any] | None:
        """What to continue from, and a word about it."""
        state = read_last(self.config, self.images, edited)
        if state is None:
            self.say(f"nothing to resume in {self.folder}: starting from the beginning")
            return None
        if not self.config.model.train_backbone:
            check_backbone(self.folder / "last.pt", state, self.model)
        self.progress.history = list(state["history"])
        self.progress.step = state.get("step", 0)
        batch = state["training"]["position"]["batch"]
        middle = f", after batch {batch} of the next" if batch else ""
        if "train" in state["edits"]:
            middle = ", which begins again" if batch else ""
        self.say(f"resuming {TITLES[state['stage']]} after epoch {state['epoch']}{middle}")
        for side, changes in state["edits"].items():
            self.say(f"  edited since ({side}): {changes}")
        return state

    def _finish(self) -> None:
        """Keep the stage's chosen model, with thresholds tuned on the validation scores it was just measured on."""
        progress = self.progress
        assert progress.kept is not None and progress.seen is not None
        progress.thresholds = tune_thresholds(progress.seen.scores, progress.seen.labels).tolist()
        if distributed.is_main():
            path = self.folder / f"{progress.stage}.pt"
            save_checkpoint(path, content(self.config, self.images, progress, progress.kept))
        progress.thresholds = None
        distributed.wait()

    def _save_last(self, stage: Stage) -> None:
        """Write the checkpoint that a resume begins from."""
        others = others_state(self.model, stage)
        if distributed.is_main():
            kept = content(self.config, self.images, self.progress, self.model, stage, others)
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


def _unsaid(line: str) -> None:
    """What the other processes say."""
