"""What a study is made of: its arms, its two parts (frozen and fine-tuned backbone), seeds and grids."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sadcl.train.config import DataConfig, ModelConfig, StepConfig, TrainConfig, augments, config_from_dict
from sadcl.train.config_file import with_config_files

__all__ = ["ARMS", "PARTS", "Arm", "Choice", "PartConfig", "StudyConfig", "candidates", "parse_study", "train_config"]

PARTS = ("frozen", "finetuned")


@dataclass(frozen=True)
class Arm:
    """One way to train; ``sample`` and ``prototype`` say which contrastive losses step 2 has."""

    title: str
    linear: bool = False
    sample: bool = False
    prototype: bool = False
    formulation: Any = "paper"

    @property
    def contrastive(self) -> bool:
        return self.sample or self.prototype


ARMS = {
    "linear": Arm("pooled linear + ASL", linear=True),
    "sarl": Arm("SARL, continued (control)"),
    "sscl-paper": Arm("SARL + SSCL, paper", sample=True),
    "pscl-paper": Arm("SARL + PSCL, paper", prototype=True),
    "all-paper": Arm("SARL + SSCL + PSCL, paper", sample=True, prototype=True),
    "sscl-released": Arm("SARL + SSCL, released", sample=True, formulation="released"),
    "pscl-released": Arm("SARL + PSCL, released", prototype=True, formulation="released"),
    "all-released": Arm("SARL + SSCL + PSCL, released", sample=True, prototype=True, formulation="released"),
}


@dataclass(frozen=True)
class Choice:
    """What is chosen for an arm on the weight seeds: the steps' learning rates (linear: both), the loss weights."""

    rate1: float
    rate2: float
    sample_weight: float = 0.0
    prototype_weight: float = 0.0

    def text(self) -> str:
        """For people: ``lr 0.001, 0.0001; weights 10 / 0``."""
        weights = f"{self.sample_weight:g} / {self.prototype_weight:g}"
        return f"lr {self.rate1:g}, {self.rate2:g}; weights {weights}"


@dataclass
class PartConfig:
    """One part of the study.

    Args:
        arms: which arms, names as in the table.
        seeds: evaluation seeds; each is a split of objects, a set of scenes, an initialisation and an order.
        weight_seeds: the seeds that weights and learning rates are chosen on.
        train_images: number of training scenes.
        val_images: number of validation scenes.
        step1: epochs, learning rate and weight decay of step 1.
        step2: the same of step 2, and of the continuation of SARL and linear.
        step2_rates: learning rates tried for step 2 (linear: as multiples of its own, in the same ratio to step 1).
        linear_rates: learning rates of step 1 tried for the linear arm.
        weights: loss weights tried: pairs (sample, prototype); an arm with one loss tries that side of them.
    """

    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: list(range(21, 29)))
    weight_seeds: list[int] = field(default_factory=lambda: [11, 12])
    train_images: int = 3000
    val_images: int = 1000
    step1: StepConfig = field(default_factory=StepConfig)
    step2: StepConfig = field(default_factory=lambda: StepConfig(learning_rate=1e-4))
    step2_rates: list[float] = field(default_factory=lambda: [1e-4, 5e-4])
    linear_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    weights: list[tuple[float, float]] = field(default_factory=lambda: [(10.0, 10.0), (30.0, 30.0), (100.0, 50.0)])


def _finetuned() -> PartConfig:
    """Small: an image costs 40 times a cached map. One candidate an arm, with the weights the frozen part chose."""
    return PartConfig(
        arms=["linear", "sarl", "all-paper"],
        seeds=list(range(21, 26)),
        weight_seeds=[],
        train_images=640,
        val_images=400,
        step1=StepConfig(epochs=1, learning_rate=1e-3),
        step2=StepConfig(epochs=1, learning_rate=3e-4),
        step2_rates=[3e-4],
        linear_rates=[1e-3],
        weights=[(30.0, 30.0)],
    )


@dataclass
class StudyConfig:
    """A study on pictures of one kind.

    Args:
        output: folder that receives trials (one JSON file each), study.json, study.md and study.png.
        batch_size: images a step; also the number of slots in the memory bank.
        data: the pictures; sizes and split seed come from the parts.
        model: the network; whether the backbone is trained comes from the parts.
        frozen: the part with a frozen backbone, on cached feature maps.
        finetuned: the part that trains the backbone along.
    """

    output: str = "runs/study"
    batch_size: int = 32
    data: DataConfig = field(default_factory=lambda: DataConfig(image_size=160))
    model: ModelConfig = field(default_factory=lambda: ModelConfig("efficientnet_lite0"))
    frozen: PartConfig = field(default_factory=PartConfig)
    finetuned: PartConfig = field(default_factory=_finetuned)

    def as_yaml(self) -> str:
        """The resolved configuration as a file that ``--config`` reads back."""
        import json

        import yaml

        return yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False)  # tuples as lists


# Seconds instead of an hour: every arm and both parts, on figures that mean nothing.
_SMOKE_PART = {"weight_seeds": [11], "train_images": 32, "val_images": 16, "step1.epochs": 1, "step2.epochs": 1}
_SMOKE_FROZEN = {"seeds": [21, 22], "step2_rates": [1e-4], "linear_rates": [1e-3], "weights": [[10, 10], [100, 50]]}
_SMOKE_FINETUNED = {"seeds": [21], "linear_rates": [1e-3], "weights": [[10, 10]]}


def candidates(part: PartConfig, arm: str) -> list[Choice]:
    """What is tried for an arm on the weight seeds, in order, without repetition."""
    kind = ARMS[arm]
    rate1 = part.step1.learning_rate
    if kind.linear:
        ratio = part.step2.learning_rate / rate1
        return [Choice(rate, rate * ratio) for rate in part.linear_rates]
    if not kind.contrastive:
        return [Choice(rate1, rate2) for rate2 in part.step2_rates]
    pairs = [(s if kind.sample else 0.0, p if kind.prototype else 0.0) for s, p in part.weights]
    return [Choice(rate1, rate2, *pair) for rate2 in part.step2_rates for pair in dict.fromkeys(pairs)]


def train_config(config: StudyConfig, name: str, seed: int) -> TrainConfig:
    """The run's configuration that a part and seed correspond to."""
    part: PartConfig = getattr(config, name)
    data = replace(config.data, train_images=part.train_images, val_images=part.val_images, split_seed=seed)
    model = replace(config.model, train_backbone=name == "finetuned")
    return TrainConfig(output=config.output, seed=seed, batch_size=config.batch_size, data=data, model=model)


def parse_study(argv: Sequence[str] | None = None) -> tuple[StudyConfig, bool]:
    """Parse ``sadcl study``'s arguments to (config, dry run?); an unknown key or a bad value exits with 2."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="sadcl study",
        allow_abbrev=False,
        description="Does the method help here? Trains every arm on paired seeds; run it again to continue it. "
        "`sadcl study table` asks the same of losses on a table of features.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes that only show that everything runs")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is finished, train nothing")
    parser.add_class_arguments(StudyConfig)
    if argv is not None and "--smoke" in argv:
        tiny = {f"frozen.{k}": v for k, v in (_SMOKE_PART | _SMOKE_FROZEN).items()}
        tiny |= {f"finetuned.{k}": v for k, v in (_SMOKE_PART | _SMOKE_FINETUNED).items()}
        parser.set_defaults(tiny)
    try:
        arguments = with_config_files(sys.argv[1:] if argv is None else argv, StudyConfig)
    except ValueError as error:
        parser.error(str(error))
    parsed = parser.parse_args(arguments)
    dry_run = parsed.pop("dry_run")
    parsed.pop("smoke")
    parsed.pop("config", None)
    config = _from_dict(parsed.as_dict())
    _check(config, parser.error)
    return config, dry_run


def _from_dict(values: dict[str, Any]) -> StudyConfig:
    config: StudyConfig = config_from_dict(values, StudyConfig)
    for part in (config.frozen, config.finetuned):
        part.weights = [(float(sample), float(prototype)) for sample, prototype in part.weights]
    return config


def _check(config: StudyConfig, error: Any) -> None:
    """Refuse what cannot run or would mislead, before anything is computed."""
    for name in PARTS:
        part: PartConfig = getattr(config, name)
        if unknown := [arm for arm in part.arms if arm not in ARMS]:
            error(f"{name}.arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
        if part.seeds and part.arms and "sarl" not in part.arms:
            error(f"{name}.arms: expected sarl among them, everything is compared with it")
        if both := sorted(set(part.seeds) & set(part.weight_seeds)):
            error(f"{name}.weight_seeds: {both[0]} is an evaluation seed too; weights must be chosen on other seeds")
        for field_name in ("seeds", "weight_seeds", "arms"):
            values = getattr(part, field_name)
            if len(set(values)) != len(values):
                error(f"{name}.{field_name}: expected no repetition, got {values}")
        if not part.weight_seeds and any(len(candidates(part, arm)) > 1 for arm in part.arms):
            error(f"{name}.weight_seeds: expected a seed, since there is something to choose")
        if part.seeds and min(len(candidates(part, arm)) for arm in part.arms or ["sarl"]) == 0:
            error(f"{name}: expected at least one value each in weights, step2_rates and linear_rates")
        for key in ("train_images", "val_images"):
            if getattr(part, key) <= 0:
                error(f"{name}.{key}: expected a number > 0, got {getattr(part, key)}")
        for step_name in ("step1", "step2"):
            step: StepConfig = getattr(part, step_name)
            if step.epochs < 1:
                error(f"{name}.{step_name}.epochs: expected a number > 0, got {step.epochs}")
            if step.patience or step.select != "last" or augments(step.augment):
                error(f"{name}.{step_name}: a study has no patience, no selection of epochs and no augmentation")
