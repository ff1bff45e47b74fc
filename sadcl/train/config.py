"""What a training run is made of: dataclasses, one YAML file, and command-line overrides (through
jsonargparse).

The defaults below are the demo: ``sadcl train`` without arguments runs them. ``sadcl train --print_config``
prints them as YAML; ``sadcl train --config my.yaml --step2.epochs 5`` reads a file and overrides one value
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

__all__ = [
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "StepConfig",
    "TrainConfig",
    "config_from_dict",
    "parse_config",
]


@dataclass
class DataConfig:
    """The pictures.

    Args:
        source: composed scenes of photo cut-outs or emoji drawings (auto: photos if installed), or csv.
        root: folder of the pictures, if they are not in one of the usual places.
        train_csv: with source "csv": the training list, lines of `path,label;label`.
        val_csv: with source "csv": the validation list.
        image_size: side of the square model input in pixels.
        train_images: number of training scenes.
        val_images: number of validation scenes.
        split_seed: which objects and backgrounds are held out for validation.
        workers: processes that draw or decode pictures.
        feature_cache: folder for the frozen backbone's feature maps; default: `features` in the output
            folder.
    """

    source: Literal["auto", "photos", "emoji", "csv"] = "auto"
    root: str | None = None
    train_csv: str | None = None
    val_csv: str | None = None
    image_size: int = 160
    train_images: int = 3000
    val_images: int = 1000
    split_seed: int = 0
    workers: int = 1
    feature_cache: str | None = None


@dataclass
class ModelConfig:
    """The network.

    Args:
        backbone: name of the feature extractor.
        pretrained: start the backbone from its packaged weights.
        train_backbone: fine-tune it; otherwise it is frozen and its feature maps are computed once.
        hidden_dim: width of label features.
        num_heads: attention heads.
        ffn_dim: width inside the feed-forward blocks.
        encoder_layers: transformer encoder layers.
        decoder_layers: label-attention layers.
        proj_dim: width of the projected embeddings that the contrastive losses see.
        dropout: dropout of encoder and decoder.
    """

    backbone: str = "efficientnet_lite0"
    pretrained: bool = True
    train_backbone: bool = False
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
    sample_weight: float | None = None
    prototype_weight: float | None = None
    classification_weight: float | None = None
    sample_temperature: float = 0.2
    prototype_temperature: float = 0.07
    gamma_neg: float = 4.0
    gamma_pos: float = 0.0
    clip: float = 0.0


@dataclass
class StepConfig:
    """One step of training.

    Args:
        epochs: passes over the training images.
        learning_rate: peak of the one-cycle schedule (AdamW).
        weight_decay: decoupled weight decay.
    """

    epochs: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


@dataclass
class TrainConfig:
    """A run of the method's two steps.

    Args:
        output: folder that receives checkpoints, metrics and pictures.
        seed: seed of initialisation, order, dropout and scenes.
        batch_size: images a step; also the number of slots in the memory bank.
        control: also continue step 1 for as long as step 2 runs, so that the two can be compared fairly.
        plots: draw curves, attention overlays and the embedding scatter.
        data: the pictures.
        model: the network.
        loss: the losses.
        step1: label attention with the classification loss alone.
        step2: from step 1, with prototypes, memory bank and both contrastive losses.
    """

    output: str = "runs/demo"
    seed: int = 0
    batch_size: int = 32
    control: bool = True
    plots: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
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


def parse_config(argv: Sequence[str] | None = None) -> tuple[TrainConfig, bool]:
    """Parse ``sadcl train``'s arguments to (config, resume?); an unknown key or a bad value exits with 2."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="sadcl train",
        allow_abbrev=False,
        description="Train SADCL in its two steps and draw what it learned.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_class_arguments(TrainConfig)
    parsed = parser.parse_args(argv)
    resume = parsed.pop("resume")
    parsed.pop("config", None)
    config = config_from_dict(parsed.as_dict())
    _check(config, parser.error)
    return config, resume


def _check(config: TrainConfig, error: Any) -> None:
    """Refuse what cannot run, before anything is computed."""
    positive = {
        "batch_size": config.batch_size,
        "step1.epochs": config.step1.epochs,
        "step1.learning_rate": config.step1.learning_rate,
        "step2.learning_rate": config.step2.learning_rate,
        "data.train_images": config.data.train_images,
        "data.val_images": config.data.val_images,
        "model.hidden_dim": config.model.hidden_dim,
        "model.decoder_layers": config.model.decoder_layers,
    }
    for name, value in positive.items():
        if value <= 0:
            error(f"{name}: expected a number > 0, got {value}")
    if config.step2.epochs < 0:
        error(f"step2.epochs: expected 0 or more, got {config.step2.epochs}")
    if config.data.image_size < 32:
        error(f"data.image_size: expected at least 32, got {config.data.image_size}")
    if config.data.source == "csv" and not (config.data.train_csv and config.data.val_csv):
        error("data.source csv needs data.train_csv and data.val_csv")
