"""One training run: step 1, its continuation as the control, prototypes, step 2; checkpoints; the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from sadcl.losses import DualContrastiveLoss
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.model import SADCL
from sadcl.prototypes import build_prototypes
from sadcl.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically
from sadcl.train.config import StepConfig, TrainConfig
from sadcl.train.data import Images, Pairs, PreprocessedDataset, as_features, load_images
from sadcl.train.evaluate import restore_model
from sadcl.train.log import RunLog
from sadcl.train.loop import Forward, Stage, evaluate, make_loss, make_stage, train_epoch
from sadcl.train.thresholds import tune_thresholds

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
        frozen="none" if m.train_backbone else "all",
    )


class Run:
    """The state of one training run.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = tqdm.write) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        self.images: Images = load_images(config.data, config.seed)
        say(f"data: {self.images.title}; {len(self.images.classes)} labels\n{self.images.summary()}")
        self.model = build_model(config, len(self.images.classes)).to(self.device)
        self.loss: DualContrastiveLoss = make_loss(config.loss).to(self.device)
        self.history: list[dict[str, Any]] = []
        self.step = 0  # optimizer steps of all stages
        self.thresholds: list[float] | None = None  # of a finished stage, tuned on validation
        self.log: RunLog | None = None
        self.train_set, self.val_set, self.forward = self._inputs()

    def _inputs(self) -> tuple[Pairs, Pairs, Forward]:
        """Training and validation items, and what to call on them."""
        if self.config.model.train_backbone:
            preprocessed = partial(PreprocessedDataset, preprocessing=self.model.preprocessing)
            return preprocessed(self.images.train), preprocessed(self.images.val), self.model
        train, val = as_features(
            self.images,
            self.model,
            self.config,
            Path(self.config.data.feature_cache or self.folder / "features"),
            self.device,
            lambda name: partial(tqdm, desc=name, unit="batch", leave=False),
        )
        return train, val, self.model.head

    # -- the stages --

    def run(self, resume: bool = False) -> dict[str, MultilabelReport]:
        """All stages in order; returns the report of each at its end."""
        state = self._resume_state() if resume else None
        if not resume:
            (self.folder / "last.pt").unlink(missing_ok=True)
        write_atomically(self.folder / "config.yaml", lambda file: file.write(self.config.as_yaml().encode()))
        self.step = 0 if state is None else state.get("step", 0)
        self.log = RunLog(self.folder, resume_step=None if state is None else self.step)
        self.log.write("run" if state is None else "resume", self.step, config=self.config.as_dict())
        reports = {}
        for name in STAGES:
            step = self.config.step1 if name == "step1" else self.config.step2
            if step.epochs == 0 or (name == "control" and not self.config.control):
                continue
            reports[name] = self._stage(name, step, state)
        self.log.close()
        return reports

    def _stage(self, name: str, step: StepConfig, state: dict[str, Any] | None) -> MultilabelReport:
        """Train one stage to its end, from its beginning or from ``state``, and keep its model."""
        finished = self.folder / f"{name}.pt"
        if state is not None and STAGES.index(state["stage"]) > STAGES.index(name):
            restored = restore_model(load_checkpoint(finished)).to(self.device)  # an earlier session finished it
            return evaluate(restored, self.forward_of(restored), self.val_batches(), self.device)
        resuming = state is not None and state["stage"] == name
        if name != "step1":
            self._start_from_step1(contrastive=name == "step2", prototypes=not resuming)
        seed = self.config.seed * 1000 + STAGES.index(name)
        stage = make_stage(self.model, self.train_set, step, self.config.batch_size, seed, self._workers())
        done = 0
        if resuming:
            assert state is not None
            self.model.load_state_dict(state["model"])
            stage.load_state_dict(state["training"])
            done = state["epoch"]
        self.thresholds = None
        report = self._epochs(name, step, stage, done)
        self.thresholds = tune_thresholds(self.seen.scores, self.seen.labels).tolist()
        self._save(finished, name, step.epochs)
        return report

    def _epochs(self, name: str, step: StepConfig, stage: Stage, done: int) -> MultilabelReport:
        offset = 0 if name == "step1" else self.config.step1.epochs
        steps = len(stage.loader)
        report = None
        with tqdm(total=step.epochs * steps, initial=done * steps, desc=TITLES[name], unit="step", leave=False) as bar:

            def on_step(parts: dict[str, float]) -> None:
                bar.set_postfix(loss=f"{parts['total']:.1f}", refresh=False)
                bar.update()
                self.step += 1

            for epoch in range(done, step.epochs):
                began = time.perf_counter()
                losses = train_epoch(
                    self.model,
                    self.forward,
                    stage,
                    self.loss,
                    contrastive=name == "step2",
                    device=self.device,
                    on_step=on_step,
                )
                report = self._evaluate()
                row = {"stage": name, "epoch": offset + epoch + 1, "losses": losses}
                row |= {"val_mAP": report.mAP, "val_CF1": report.CF1, "val_OF1": report.OF1}
                self.history.append(row)
                assert self.log is not None
                self.log.write("epoch", self.step, **row, seconds=round(time.perf_counter() - began, 3))
                self._save(self.folder / "last.pt", name, epoch + 1, training=stage.state_dict())
                parts = "  ".join(f"{part} {value:.3f}" for part, value in losses.items() if part != "total")
                seconds = time.perf_counter() - began
                self.say(
                    f"{TITLES[name]:<28} epoch {epoch + 1}/{step.epochs}  val mAP {report.mAP:.4f}  "
                    f"loss {losses['total']:.2f} ({parts})  {seconds:.1f} s"
                )
        return report or self._evaluate()

    def _evaluate(self) -> MultilabelReport:
        """Measure the model as it is; ``seen`` keeps the scores."""
        self.seen = MultilabelAccumulator()
        return evaluate(self.model, self.forward, self.val_batches(), self.device, seen=self.seen)

    def _start_from_step1(self, contrastive: bool, prototypes: bool) -> None:
        """Put step 1's weights into a fresh model; for step 2 add projection, prototypes and memory bank."""
        self.model = restore_model(load_checkpoint(self.folder / "step1.pt")).to(self.device)
        self.forward = self.forward_of(self.model)
        if not contrastive:
            return
        torch.manual_seed(self.config.seed + 1)  # of the projection's initial weights
        mean_features = None
        if prototypes:
            module = self.model if self.config.model.train_backbone else self.model.head
            batches = DataLoader(self.train_set, EVAL_BATCH, num_workers=self._workers())
            mean_features = build_prototypes(module, batches, device=self.device)
        self.model.head.init_contrastive(mean_features, self.config.batch_size)

    # -- small helpers --

    def forward_of(self, model: SADCL) -> Forward:
        return model if self.config.model.train_backbone else model.head

    def _workers(self) -> int:
        return self.config.data.workers if self.config.model.train_backbone else 0  # cached maps need none

    def val_batches(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, EVAL_BATCH, num_workers=self._workers())

    def _save(self, path: Path, stage: str, epoch: int, training: dict[str, Any] | None = None) -> None:
        content = {
            "config": self.config.as_dict(),
            "classes": list(self.images.classes),
            "title": self.images.title,
            "protocol": self.images.protocol,
            "architecture": self.model.config(),
            "preprocessing": self.model.preprocessing.to_dict(),
            "model": self.model.state_dict(),
            "stage": stage,
            "epoch": epoch,
            "step": self.step,
            "thresholds": self.thresholds,
            "history": self.history,
        }
        save_checkpoint(path, content if training is None else {**content, "training": training})

    def _resume_state(self) -> dict[str, Any] | None:
        """What ``last.pt`` holds, if it is this run; None (and a word about it) if there is nothing yet."""
        path = self.folder / "last.pt"
        if not path.is_file():
            self.say(f"nothing to resume in {self.folder}: starting from the beginning")
            return None
        state = load_checkpoint(path)
        for key, theirs, ours in _differences(state["config"], self.config.as_dict()):
            if key not in ("output", "plots", "data.workers", "data.feature_cache", "data.root"):
                raise CheckpointError(
                    f"{path}: was started with {key} = {theirs!r}, not {ours!r}; "
                    f"resume with --config {self.folder / 'config.yaml'}"
                )
        if tuple(state["classes"]) != self.images.classes:
            raise CheckpointError(f"{path}: was started on other labels ({state['title']})")
        self.history = list(state["history"])
        self.say(f"resuming {TITLES[state['stage']]} after epoch {state['epoch']}")
        return state


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) wherever two nested dicts differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((prefix + key, x, y))
    return found


def train(config: TrainConfig, resume: bool = False, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Run a config to its end and write ``metrics.json`` and the pictures.

    Args:
        config: what to run.
        resume: continue the run in ``config.output``.
        say: receives the lines that people read.

    Returns:
        What ``metrics.json`` holds.
    """
    from sadcl.train.report import draw, summary, table

    began = time.perf_counter()
    run = Run(config, say)
    reports = run.run(resume)
    metrics = summary(run, reports)
    write_atomically(run.folder / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    say(table(run, reports))
    if config.plots:
        draw(run, reports, metrics)
    say(f"done in {time.perf_counter() - began:.0f} s; everything is in {run.folder}/:")
    for path in sorted(
        path for path in run.folder.iterdir() if path.suffix in (".html", ".json", ".pt", ".png", ".yaml")
    ):
        say(f"  {path}")
    return metrics
