"""What a training run is made of: dataclasses, one YAML file, and command-line overrides (through
jsonargparse).

The defaults below are the demo: ``sadcl train`` without arguments runs them. ``sadcl train --print_config``
prints them as YAML; ``sadcl train --config my.yaml --step2.epochs 5`` reads a file and overrides one value
of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from sadcl.train.config_file import moved, with_config_files
from sadcl.train.data_config import DataConfig

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "EmaConfig",
    "LossConfig",
    "ModelConfig",
    "Parsed",
    "StepConfig",
    "TrainConfig",
    "augments",
    "check_config",
    "config_from_dict",
    "parse_arguments",
    "parse_config",
]


@dataclass
class ModelConfig:
    """The network.

    Args:
        backbone: name of the feature extractor.
        strides: of the backbone's maps that the head reads, the finest first, such as [16, 32]; default: the last map
            (of efficientnet_lite2 these two).
        pretrained: start the backbone from its packaged weights (true), or from a file (its path).
        train_backbone: fine-tune it; otherwise it is frozen and its feature maps are computed once.
        frozen: with train_backbone, what stays frozen: nothing, or the backbone's default (ResNets: stem and layer1).
        init_from: checkpoint whose weights step 1 starts from (of `sadcl train`, or a released one).
        class_map: with init_from: for each of our labels, in order, the row of its labels; default: VOC from
            COCO as published, otherwise by name (a label without namesake starts anew).
        hidden_dim: width of label features.
        num_heads: attention heads.
        ffn_dim: width inside the feed-forward blocks.
        encoder_layers: transformer encoder layers.
        decoder_layers: label-attention layers.
        proj_dim: width of the projected embeddings that the contrastive losses see.
        dropout: dropout of encoder and decoder.
    """

    backbone: str = "efficientnet_lite2"
    strides: list[int] | None = None
    pretrained: bool | str = True
    train_backbone: bool = False
    frozen: Literal["none", "default"] = "none"
    init_from: str | None = None
    class_map: list[int] | None = None
    hidden_dim: int = 192
    num_heads: int = 4
    ffn_dim: int = 384
    encoder_layers: int = 0
    decoder_layers: int = 1
    proj_dim: int = 128
    dropout: float = 0.3


@dataclass
class LossConfig:
    """The losses of step 2 (step 1 uses the classification loss alone).

    Args:
        formulation: contrastive losses as in the paper's equations, or as the released code computes them.
        batch: among several processes, contrast within each one's batch (as published), or within all of them together.
        sample_weight: weight of the sample-to-sample loss; default: the formulation's.
        prototype_weight: weight of the prototype-to-sample loss; default: the formulation's.
        classification_weight: weight of the classification loss; default: the formulation's.
        sample_temperature: temperature of the sample-to-sample loss.
        prototype_temperature: temperature of the prototype-to-sample loss.
        gamma_neg: focusing power for negatives in the asymmetric loss.
        gamma_pos: focusing power for positives in the asymmetric loss.
        clip: probability margin of the asymmetric loss.
    """

    formulation: Literal["paper", "released"] = "paper"
    batch: Literal["local", "global"] = "local"
    sample_weight: float | None = None
    prototype_weight: float | None = None
    classification_weight: float | None = None
    sample_temperature: float = 0.2
    prototype_temperature: float = 0.07
    gamma_neg: float = 4.0
    gamma_pos: float = 0.0
    clip: float = 0.0


@dataclass
class AugmentConfig:
    """What happens to training pictures (torchvision v2 transforms); needs model.train_backbone.

    Args:
        crop_scales: multi-scale crop: width and height are drawn from these fractions of the shorter side.
        crop_min_area: random resized crop instead: smallest area of the crop, as a fraction; 0: none.
        flip: probability of a horizontal flip.
        rand_augment: RandAugment operations a picture; 0: none.
        magnitude: strength of RandAugment, 0 to 30.
        cutout: side of the erased square, as a fraction of the picture's; 0: none.
    """

    crop_scales: list[float] = field(default_factory=list)
    crop_min_area: float = 0.0
    flip: float = 0.0
    rand_augment: int = 0
    magnitude: int = 9
    cutout: float = 0.0


@dataclass
class EmaConfig:
    """An average of the weights over the steps (timm's ModelEmaV3), evaluated beside the trained weights.

    Args:
        decay: largest weight of the old average; 0: no averaging.
        warmup: at step t at most 1 - t^(-2/3), so that the first steps are forgotten.
        keep: which weights a step of the method ends with: the average, the trained ones, or the better of the two on
            validation.
    """

    decay: float = 0.0
    warmup: bool = True
    keep: Literal["ema", "model", "better"] = "ema"


@dataclass
class StepConfig:
    """One step of training.

    Args:
        epochs: passes over the training images.
        learning_rate: peak of the schedule.
        weight_decay: decoupled weight decay (AdamW), or L2 penalty (SGD).
        optimizer: AdamW, or SGD with Nesterov momentum.
        momentum: of SGD.
        backbone_factor: learning rate of the backbone as a multiple of the head's.
        decay_vectors: weight decay also on norms and biases.
        schedule: onecycle, multistep and cosine step once an optimizer step; constant does nothing.
        pct_start: onecycle: fraction of the steps until the peak.
        milestones: multistep: epochs after which the learning rate falls.
        gamma: multistep: by this factor.
        warmup_epochs: multistep, cosine and constant: linear increase at the start.
        accumulate: batches an optimizer step. The gradient is that of the mean over their images; the contrastive
            losses and the memory bank see one batch at a time.
        clip: largest norm of the gradient; 0: no clipping.
        patience: stop after so many epochs without a better validation mAP; 0: never.
        select: which epoch the step ends with; best is the one with the highest validation mAP.
        augment: what happens to training pictures.
    """

    epochs: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    backbone_factor: float = 1.0
    decay_vectors: bool = True
    schedule: Literal["onecycle", "multistep", "cosine", "constant"] = "onecycle"
    pct_start: float = 0.2
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip: float = 0.0
    patience: int = 0
    select: Literal["last", "best"] = "last"
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """A run of the method's two steps.

    Args:
        output: folder that receives checkpoints, metrics and pictures.
        seed: seed of initialisation, order, dropout, augmentation and scenes.
        batch_size: images a batch of one process; also the number of slots in the memory bank.
        control: also continue step 1 for as long as step 2 runs, so that the two can be compared fairly.
        plots: draw curves, attention overlays and the embedding scatter.
        amp: forward in bfloat16, or in float16 with a gradient scaler (GPU only). The losses stay in float32. A frozen
            backbone then runs in bfloat16, either way.
        channels_last: the backbone's weights and maps in NHWC memory order, often faster.
        checkpoint_every: optimizer steps between two writes of last.pt; 0: at the ends of epochs only.
        eval_image_size: also measure the finished models on validation pictures of this size.
        data: the pictures.
        model: the network.
        loss: the losses.
        ema: average of the weights.
        step1: label attention with the classification loss alone.
        step2: from step 1, with prototypes, memory bank and both contrastive losses.
    """

    output: str = "runs/demo"
    seed: int = 0
    batch_size: int = 32
    control: bool = True
    plots: bool = True
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = False
    checkpoint_every: int = 0
    eval_image_size: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    step1: StepConfig = field(default_factory=StepConfig)
    step2: StepConfig = field(default_factory=lambda: StepConfig(learning_rate=1e-4))

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in checkpoints."""
        return asdict(self)

    def as_yaml(self) -> str:
        """The resolved configuration as a file that ``--config`` reads back."""
        import yaml

        return yaml.safe_dump(self.as_dict(), sort_keys=False)


def config_from_dict(values: dict[str, Any], kind: type = TrainConfig) -> Any:
    """Rebuild a config from :meth:`TrainConfig.as_dict`.

    Raises:
        ValueError: a key that this version does not know.
    """
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown config key {unknown[0]!r} in {kind.__name__}; known keys: {', '.join(sorted(known))}"
        )
    hints = get_type_hints(kind)
    return kind(
        **{
            name: config_from_dict(value, hints[name]) if is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


@dataclass
class Parsed:
    """What the command line asks for."""

    config: TrainConfig
    resume: bool
    dry_run: bool
    edited: bool = False


def parse_arguments(argv: Sequence[str] | None = None) -> Parsed:
    """Parse ``sadcl train``'s arguments; an unknown key or a bad value exits with 2."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="sadcl train",
        allow_abbrev=False,
        description="Train SADCL in its two steps and draw what it learned.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument(
        "--resume-edited", action="store_true", help="the same, even if the lists of pictures were edited since"
    )
    parser.add_argument("--dry-run", action="store_true", help="print data, parameters, memory and steps, then stop")
    parser.add_class_arguments(TrainConfig)
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = with_config_files(argv, TrainConfig)
    except ValueError as error:
        parser.error(str(error))
    parsed = parser.parse_args(arguments)
    resume, dry_run, edited = parsed.pop("resume"), parsed.pop("dry_run"), parsed.pop("resume_edited")
    parsed.pop("config", None)
    config = config_from_dict(parsed.as_dict())
    try:
        check_config(config)
    except ValueError as error:
        parser.error(str(error))
    if (resume or edited) and (folder := moved(argv, config.output)) is not None:
        here = f"there is nothing to resume in {config.output}, but beside the config file"
        parser.error(f"output: {here}: expected --output {folder}")
    return Parsed(config, resume or edited, dry_run, edited)


def parse_config(argv: Sequence[str] | None = None) -> tuple[TrainConfig, bool]:
    """:func:`parse_arguments` as (config, resume?)."""
    parsed = parse_arguments(argv)
    return parsed.config, parsed.resume


def check_config(config: TrainConfig) -> None:
    """Refuse what cannot run, before anything is computed.

    Raises:
        ValueError: the message begins with the key.
    """

    def expect(name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {_value(config, name)}")

    for name in ("batch_size", "data.train_images", "data.val_images", "model.hidden_dim", "model.decoder_layers"):
        expect(name, _value(config, name) > 0, "a number > 0")
    expect("step1.epochs", config.step1.epochs > 0, "a number > 0")
    expect("step2.epochs", config.step2.epochs >= 0, "0 or more")
    expect("checkpoint_every", config.checkpoint_every >= 0, "0 or more")
    expect("ema.decay", 0 <= config.ema.decay < 1, "0 <= decay < 1")
    expect("data.image_size", config.data.image_size >= 32, "at least 32")
    if config.eval_image_size is not None:
        expect("eval_image_size", config.eval_image_size >= 32, "at least 32")
    if problem := config.data.problem():
        raise ValueError(problem)
    for name in ("step1", "step2"):
        step: StepConfig = getattr(config, name)
        augment = step.augment
        expect(f"{name}.learning_rate", 0 < step.learning_rate < math.inf, "a number > 0")
        expect(f"{name}.weight_decay", 0 <= step.weight_decay < math.inf, "0 or more")
        expect(f"{name}.accumulate", step.accumulate >= 1, "1 or more")
        expect(f"{name}.clip", step.clip >= 0, "0 or more")
        expect(f"{name}.patience", step.patience >= 0, "0 or more")
        expect(f"{name}.pct_start", 0 < step.pct_start < 1, "a fraction between 0 and 1")
        expect(f"{name}.warmup_epochs", step.warmup_epochs >= 0, "0 or more")
        expect(f"{name}.augment.flip", 0 <= augment.flip <= 1, "a probability")
        expect(f"{name}.augment.cutout", 0 <= augment.cutout < 1, "a fraction below 1")
        expect(f"{name}.augment.magnitude", 0 <= augment.magnitude <= 30, "0 to 30")
        expect(f"{name}.augment.rand_augment", augment.rand_augment >= 0, "0 or more")
        expect(f"{name}.augment.crop_min_area", 0 <= augment.crop_min_area <= 1, "a fraction")
        expect(f"{name}.augment.crop_scales", all(0 < s <= 1 for s in augment.crop_scales), "fractions in (0, 1]")
        if augment.crop_scales and augment.crop_min_area:
            raise ValueError(f"{name}.augment: crop_scales and crop_min_area are two kinds of crop; give one of them")
        if augments(augment) and not config.model.train_backbone:
            raise ValueError(
                f"{name}.augment needs model.train_backbone: a frozen backbone's feature maps are computed once, "
                "from the pictures as they are"
            )


def augments(config: AugmentConfig) -> bool:
    """Whether anything happens to a picture beyond resizing."""
    return bool(config.crop_scales or config.crop_min_area or config.flip or config.rand_augment or config.cutout)


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
