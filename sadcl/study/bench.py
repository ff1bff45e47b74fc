"""One training of a study: what the trials of a seed share, and how an arm is trained and measured."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sadcl.head import Maps, SADCLOutput
from sadcl.prototypes import build_prototypes
from sadcl.study.config import ARMS, PartConfig, StudyConfig, train_config
from sadcl.study.trials import Trial
from sadcl.train.build import build_model, make_loss
from sadcl.train.config import LossConfig
from sadcl.train.console import bar
from sadcl.train.data import EVAL_BATCH, Pairs, PreprocessedDataset, as_features, load_images
from sadcl.train.loop import Forward, evaluate, make_stage, train_epoch

__all__ = ["Bench", "PooledLinear"]

FIGURES = ("mAP", "CF1", "OF1")


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

    def forward(self, inputs: Maps, contrastive: bool = False) -> SADCLOutput:
        """Logits of images ``[B, 3, H, W]`` or feature maps ``[B, channels, H, W]``, several side by side."""
        maps = inputs if self.backbone is None else self.backbone(inputs)
        pooled = torch.cat([one.mean((2, 3)) for one in ([maps] if isinstance(maps, Tensor) else maps)], 1)
        return SADCLOutput(self.linear(pooled), pooled[:, None])


def _width(channels: int | tuple[int, ...]) -> int:
    return channels if isinstance(channels, int) else sum(channels)


class Bench:
    """What the trials of one part and seed share: the pictures (or their feature maps) and SARL's step 1.

    Attributes:
        listed: changes with the pictures and labels of lists; empty of composed scenes, which a seed draws.
    """

    def __init__(self, config: StudyConfig, name: str, seed: int) -> None:
        self.part: PartConfig = getattr(config, name)
        self.seed, self.frozen = seed, name == "frozen"
        self.features = Path(config.output) / "features" / str(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = train_config(config, name, seed)
        torch.manual_seed(seed)  # of the head's initial weights, and of a backbone that is not pretrained
        images = load_images(self.config.data, seed)
        self.title, self.protocol = images.title, images.protocol
        rows = [] if self.config.data.composed else [side.numpy().tobytes() for side in images.listed.values()]
        self.listed = hashlib.sha256(b"".join(rows)).hexdigest()[:16] if rows else ""
        self.model = build_model(self.config, len(images.classes)).to(self.device)
        self.step1: nn.Module | None = None
        self.train_set: Pairs
        self.val_set: Pairs
        if self.frozen:
            progress = lambda text: partial(bar, desc=f"seed {seed}: {text}", unit="batch")  # noqa: E731
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
                _width(self.model.backbone.channels),
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
