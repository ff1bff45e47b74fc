"""``sadcl study``: does the method help here? The same pictures, split anew for every seed, trained under each arm.

An arm is a choice of losses. Every arm of a seed sees the same pictures in the same order for the same number of
epochs; SARL and what is built on it share step 1 of that seed, and SARL then goes on with the classification loss
alone, so that it is the control. Loss weights and learning rates of every arm are chosen on other seeds.

A trial (part, arm, choice, seed) is one JSON file named after a digest of everything it depends on: a study that
was killed goes on where it was, and one that is given more seeds computes only those.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from sadcl.checkpoint import write_atomically
from sadcl.head import SADCLOutput
from sadcl.prototypes import build_prototypes
from sadcl.study.config import ARMS, PARTS, Choice, PartConfig, StudyConfig, candidates
from sadcl.train.config import LossConfig, TrainConfig
from sadcl.train.data import Pairs, PreprocessedDataset, as_features, load_images
from sadcl.train.loop import Forward, evaluate, make_loss, make_stage, train_epoch
from sadcl.train.run import EVAL_BATCH, build_model

__all__ = ["PooledLinear", "Study", "Trial", "study"]

FIGURES = ("mAP", "CF1", "OF1")


@dataclass(frozen=True)
class Trial:
    """One training of the study: which part, arm and seed, and with which choice of rates and weights."""

    part: str
    arm: str
    choice: Choice
    seed: int


class PooledLinear(nn.Module):
    """The baseline: feature map -> mean over positions -> one linear layer. Called as the SADCL head is.

    Args:
        backbone: images to feature map, trained along; None where the input is a feature map already.
        channels: of the feature map.
        num_classes: C.
    """

    def __init__(self, backbone: nn.Module | None, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, inputs: Tensor, contrastive: bool = False) -> SADCLOutput:
        """Logits of images ``[B, 3, H, W]`` or feature maps ``[B, channels, H, W]``."""
        maps = inputs if self.backbone is None else self.backbone(inputs)
        pooled = maps.mean((2, 3))
        return SADCLOutput(self.linear(pooled), pooled[:, None])


class Bench:
    """What the trials of one part and seed share: the pictures (or their feature maps) and SARL's step 1."""

    def __init__(self, config: StudyConfig, name: str, seed: int) -> None:
        self.part: PartConfig = getattr(config, name)
        self.seed, self.frozen = seed, name == "frozen"
        self.features = Path(config.output) / "features" / str(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = _train_config(config, name, seed)
        torch.manual_seed(seed)  # of the head's initial weights, and of a backbone that is not pretrained
        images = load_images(self.config.data, seed)
        self.title, self.protocol = images.title, images.protocol
        self.model = build_model(self.config, len(images.classes)).to(self.device)
        self.step1: nn.Module | None = None
        self.train_set: Pairs
        self.val_set: Pairs
        if self.frozen:
            progress = lambda text: partial(tqdm, desc=f"seed {seed}: {text}", unit="batch", leave=False)  # noqa: E731
            sides = as_features(images, self.model, self.config, self.features, self.device, progress)
            self.train_set, self.val_set = sides
        else:
            # Half of the time a step: 1.5 + 0.2 s of user + system time for 32 images on one core, against 2.4 + 1.0.
            self.model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            preprocessed = partial(PreprocessedDataset, preprocessing=self.model.preprocessing)
            self.train_set, self.val_set = preprocessed(images.train), preprocessed(images.val)

    def train(self, trial: Trial) -> dict[str, float]:
        """Train a trial from the beginning (or from the seed's step 1) and measure it after its last epoch."""
        arm, choice = ARMS[trial.arm], trial.choice
        loss_config = LossConfig(
            formulation=arm.formulation,
            sample_weight=choice.sample_weight,
            prototype_weight=choice.prototype_weight,
            classification_weight=1.0,
        )
        if arm.linear:
            torch.manual_seed(self.seed)
            model: Any = PooledLinear(
                None if self.frozen else copy.deepcopy(self.model.backbone),
                self.model.backbone.channels,
                self.model.num_classes,
            ).to(self.device)
            self._epochs(model, model, 1, choice.rate1, loss_config, contrastive=False)
        else:
            model = copy.deepcopy(self._step1(choice.rate1))
            if arm.contrastive:
                self._init_contrastive(model)
        forward = model if arm.linear else self._forward_of(model)
        losses = self._epochs(model, forward, 2, choice.rate2, loss_config, arm.contrastive)
        held_out = DataLoader(self.val_set, EVAL_BATCH, num_workers=self._workers())
        report = evaluate(model, forward, held_out, self.device)
        figures = {name: float(getattr(report, name)) for name in FIGURES}
        return {**figures, **{f"train_{name}": value for name, value in losses.items()}}

    def close(self) -> None:
        """Remove the feature maps (about 64 KB an image)."""
        if self.frozen:
            shutil.rmtree(self.features, ignore_errors=True)

    def _step1(self, rate: float) -> nn.Module:
        """SARL after step 1, trained when the first trial asks for it; all arms have the same rate there."""
        if self.step1 is None:
            model = copy.deepcopy(self.model)
            self._epochs(model, self._forward_of(model), 1, rate, LossConfig(), contrastive=False)
            self.step1 = model
        return self.step1

    def _init_contrastive(self, model: Any) -> None:
        """Projection, prototypes and bank, as ``sadcl train`` does between its steps."""
        torch.manual_seed(self.seed + 1)  # of the projection's initial weights
        batches = DataLoader(self.train_set, EVAL_BATCH, num_workers=self._workers())
        prototypes = build_prototypes(model.head if self.frozen else model, batches, device=self.device)
        model.head.init_contrastive(prototypes, self.config.batch_size)

    def _epochs(
        self, model: Any, forward: Forward, step: int, rate: float, loss: LossConfig, contrastive: bool
    ) -> dict[str, float]:
        settings = replace(self.part.step1 if step == 1 else self.part.step2, learning_rate=rate)
        seed = self.seed * 1000 + step  # the same order of images for every arm
        stage = make_stage(model, self.train_set, settings, self.config.batch_size, seed, self._workers())
        module = make_loss(loss).to(self.device)
        losses: dict[str, float] = {}
        for _ in range(settings.epochs):
            losses = train_epoch(model, forward, stage, module, contrastive=contrastive, device=self.device)
        return losses

    def _forward_of(self, model: Any) -> Forward:
        return model.head if self.frozen else model

    def _workers(self) -> int:
        return 0 if self.frozen else self.config.data.workers  # cached maps need none


class Study:
    """The trials of a config, and their results as far as there are any.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: StudyConfig, say: Callable[[str], None] = tqdm.write) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.output)

    # -- results --

    def settings(self, trial: Trial) -> dict[str, Any]:
        """Everything the result of a trial depends on, as JSON values."""
        config = _train_config(self.config, trial.part, trial.seed)
        part: PartConfig = getattr(self.config, trial.part)
        steps = {"step1": asdict(part.step1), "step2": asdict(part.step2)}
        for step in steps.values():
            del step["learning_rate"]  # the choice has it
        return {
            **{"part": trial.part, "arm": trial.arm, "seed": trial.seed, "choice": asdict(trial.choice)},
            **{"data": {k: v for k, v in asdict(config.data).items() if k not in ("workers", "feature_cache")}},
            **{"model": asdict(config.model), "batch_size": config.batch_size, **steps},
        }

    def path(self, trial: Trial) -> Path:
        """Where the result of a trial is kept."""
        digest = hashlib.sha256(json.dumps(self.settings(trial), sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "trials" / f"{trial.part}-{trial.arm}-{trial.seed}-{digest}.json"

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """The figures of a finished trial."""
        path = self.path(trial)
        return json.loads(path.read_text())["result"] if path.is_file() else None

    # -- the plan --

    def weight_trials(self, name: str, seed: int) -> list[Trial]:
        """What one weight seed trains: every candidate of every arm that has a choice."""
        part: PartConfig = getattr(self.config, name)
        options = {arm: candidates(part, arm) for arm in part.arms}
        return [Trial(name, arm, one, seed) for arm, many in options.items() if len(many) > 1 for one in many]

    def seed_trials(self, name: str, seed: int) -> list[Trial]:
        """What one evaluation seed trains: every arm with its choice. Empty until the choice can be made."""
        part: PartConfig = getattr(self.config, name)
        chosen = self.chosen(name)
        return [Trial(name, arm, chosen[arm], seed) for arm in part.arms if arm in chosen]

    def tried(self, name: str, arm: str) -> list[tuple[Choice, float | None]]:
        """Candidates of an arm with their mean mAP over the weight seeds (None where one is missing)."""
        part: PartConfig = getattr(self.config, name)
        rows: list[tuple[Choice, float | None]] = []
        for choice in candidates(part, arm):
            found = [self.result(Trial(name, arm, choice, seed)) for seed in part.weight_seeds]
            values = [result["mAP"] for result in found if result is not None]
            rows.append((choice, sum(values) / len(values) if values and len(values) == len(found) else None))
        return rows

    def chosen(self, name: str) -> dict[str, Choice]:
        """The best candidate of every arm that has been through the weight seeds, or has only one."""
        best: dict[str, Choice] = {}
        for arm in getattr(self.config, name).arms:
            rows = self.tried(name, arm)
            measured = [(value, choice) for choice, value in rows if value is not None]
            if len(rows) == 1:
                best[arm] = rows[0][0]
            elif len(measured) == len(rows):
                best[arm] = max(measured, key=lambda pair: pair[0])[1]
        return best

    def plan(self) -> list[tuple[str, str, int, int]]:
        """(part, phase, trainings, of which finished)."""
        rows = []
        for name in PARTS:
            part: PartConfig = getattr(self.config, name)
            weights = [trial for seed in part.weight_seeds for trial in self.weight_trials(name, seed)]
            final = [trial for seed in part.seeds for trial in self.seed_trials(name, seed)]
            done = [sum(self.path(trial).is_file() for trial in trials) for trials in (weights, final)]
            rows.append((name, "weights", len(weights), done[0]))
            rows.append((name, "arms", len(part.arms) * len(part.seeds), done[1]))
        return rows

    # -- running --

    def run(self) -> dict[str, Any]:
        """Everything that is not finished yet, then the report; returns the content of ``study.json``."""
        from sadcl.study.report import write_report

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", lambda file: file.write(self.config.as_yaml().encode()))
        self.say(self.describe())
        for name in PARTS:
            part: PartConfig = getattr(self.config, name)
            clock = Clock([row[2] - row[3] for row in self.plan() if row[0] == name])
            for seed in part.weight_seeds:
                self._run_seed(name, seed, self.weight_trials(name, seed), clock)
            for seed in part.seeds:
                if self._run_seed(name, seed, self.seed_trials(name, seed), clock):
                    write_report(self)  # whatever is finished can be read at any time
        return write_report(self)

    def _run_seed(self, name: str, seed: int, trials: Sequence[Trial], clock: Clock) -> bool:
        """Train what is missing of one seed; whether anything was."""
        missing = [trial for trial in trials if not self.path(trial).is_file()]
        if not missing:
            return False
        bench = Bench(self.config, name, seed)
        for trial in missing:
            began = time.perf_counter()
            result = bench.train(trial)
            result["seconds"] = time.perf_counter() - began
            about = {"title": bench.title, "protocol": bench.protocol}
            content = {"settings": self.settings(trial), "result": result, "data": about}
            text = json.dumps(content, indent=1).encode()
            write_atomically(self.path(trial), lambda file, text=text: file.write(text))
            self.say(
                f"{name} seed {seed}  {trial.arm:14} {trial.choice.text():44} mAP {result['mAP']:.4f}  "
                f"{result['seconds']:.0f} s  {clock.tick()}"
            )
        bench.close()
        return True

    def describe(self) -> str:
        """The plan for people."""
        lines = ["trainings (finished / all):"]
        for name, phase, count, done in self.plan():
            part: PartConfig = getattr(self.config, name)
            seeds = part.weight_seeds if phase == "weights" else part.seeds
            epochs = f"{part.step1.epochs}+{part.step2.epochs} epochs of {part.train_images}"
            lines.append(f"  {name:10} {phase:8} {done:4} / {count:<4} seeds {seeds}, {epochs} images")
        return "\n".join(lines)


class Clock:
    """Says how long the rest of a part takes, from what its trainings took so far (data and step 1 included)."""

    def __init__(self, remaining: Sequence[int]) -> None:
        self.remaining, self.done, self.began = sum(remaining), 0, time.perf_counter()

    def tick(self) -> str:
        """After one training: the estimate in words."""
        self.done += 1
        self.remaining -= 1
        minutes = (time.perf_counter() - self.began) / self.done * self.remaining / 60
        return f"({self.remaining} left in this part, about {minutes:.0f} min)"


def _train_config(config: StudyConfig, name: str, seed: int) -> TrainConfig:
    """The run's configuration that a part and seed correspond to."""
    part: PartConfig = getattr(config, name)
    data = replace(config.data, train_images=part.train_images, val_images=part.val_images, split_seed=seed)
    model = replace(config.model, train_backbone=name == "finetuned")
    return TrainConfig(output=config.output, seed=seed, batch_size=config.batch_size, data=data, model=model)


def study(config: StudyConfig, dry_run: bool = False, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Run a study to its end, or print what it would run.

    Args:
        config: what to run.
        dry_run: only print the plan.
        say: receives the lines that people read.

    Returns:
        The content of ``study.json``; empty for a dry run.
    """
    work = Study(config, say)
    if dry_run:
        say(work.describe())
        say("The first finished training of a part says how long the rest will take.")
        return {}
    return work.run()
