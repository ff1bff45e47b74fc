"""What a study on a table of features is made of: its arms, its recipe, its seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sadcl.functional import WEIGHTINGS
from sadcl.train.config import config_from_dict
from sadcl.train.config_file import with_config_files

__all__ = ["ARMS", "CONTROL", "Arm", "TableConfig", "parse_table_study"]

CONTROL = "bce"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: for people.
        loss: of the logits: bce, asl, zlpr or two-way.
        weighting: of the contrastive loss, None without one.
        stage: what the contrastive loss does: none, probe or finetuned (it trains the encoder first), joint (beside
            the loss of the logits).
        masked: the loss of the logits sees masked rows, as the contrastive loss does.
        against: the arm that this one is compared with.
    """

    title: str
    loss: str = "bce"
    weighting: str | None = None
    stage: str = "none"
    masked: bool = False
    against: str = CONTROL


ARMS = {
    "bce": Arm("BCE (control)"),
    "bce-masked": Arm("BCE, masked features", masked=True),
    "asl": Arm("ASL", loss="asl"),
    "zlpr": Arm("ZLPR", loss="zlpr"),
    "two-way": Arm("Two-way", loss="two-way"),
    **{f"{w}-probe": Arm(f"{w}, linear probe", weighting=w, stage="probe") for w in WEIGHTINGS},
    **{f"{w}-finetuned": Arm(f"{w}, fine-tuned", weighting=w, stage="finetuned") for w in WEIGHTINGS},
    **{f"{w}-joint": Arm(f"{w} + ASL", "asl", w, "joint", against="asl") for w in WEIGHTINGS},
}


@dataclass
class TableConfig:
    """A study on a table of features with several labels a row.

    Args:
        table: an npz file with ``train_``, ``val_`` and ``test_`` ``features [n, F]`` and ``labels [n, C]``, or with
            ``features`` and ``labels`` alone; or ``openml:NAME`` or ``openml:NAME:VERSION``, which scikit-learn
            fetches (``openml:yeast:4``).
        resplit: split anew for every seed, even where the file says which rows are held out.
        output: folder that receives trials (one JSON file each), study.json and study.md.
        arms: which arms, names as in the table.
        seeds: each is an initialisation, an order of rows and the masks; and a split, unless the file has one.
        widths: of the encoder's layers.
        proj_dim: width of the vectors that are contrasted.
        batch_size: rows a step.
        learning_rate: of Adam.
        probe_rate: the same, of a classifier on a frozen encoder.
        epochs: of every training on logits; the epoch with the best mAP on the validation rows is kept.
        pretrain_steps: of contrastive training.
        temperature: of the contrastive losses.
        queue: keys in the queue.
        momentum: of the encoder whose keys they are.
        masking: the probability with which a feature is set to 0, its mean.
        joint_weights: tried for the contrastive loss beside ASL; the best mAP on the validation rows decides.
    """

    table: str = "openml:yeast:4"
    resplit: bool = False
    output: str = "runs/table"
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))
    widths: list[int] = field(default_factory=lambda: [512, 256])
    proj_dim: int = 128
    batch_size: int = 64
    learning_rate: float = 4e-4
    probe_rate: float = 4e-3
    epochs: int = 40
    pretrain_steps: int = 2000
    temperature: float = 0.1
    queue: int = 256
    momentum: float = 0.999
    masking: float = 0.5
    joint_weights: list[float] = field(default_factory=lambda: [0.1, 1.0])

    def as_yaml(self) -> str:
        """The resolved configuration as a file that ``--config`` reads back."""
        import yaml

        return str(yaml.safe_dump(asdict(self), sort_keys=False))


def parse_table_study(argv: Sequence[str] | None = None) -> tuple[TableConfig, bool]:
    """Parse ``sadcl study table``'s arguments to (config, dry run?); an unknown key or a bad value exits with 2."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="sadcl study table",
        allow_abbrev=False,
        description="Which loss helps on a table of features? Trains every arm on paired seeds; resumes.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is finished, train nothing")
    parser.add_class_arguments(TableConfig)
    try:
        arguments = with_config_files(sys.argv[1:] if argv is None else argv, TableConfig)
    except ValueError as error:
        parser.error(str(error))
    parsed = parser.parse_args(arguments)
    dry_run = parsed.pop("dry_run")
    parsed.pop("config", None)
    config: TableConfig = config_from_dict(parsed.as_dict(), TableConfig)
    _check(config, parser.error)
    return config, dry_run


def _check(config: TableConfig, error: Any) -> None:
    """Refuse what cannot run or would mislead, before anything is computed."""
    if unknown := [arm for arm in config.arms if arm not in ARMS]:
        error(f"arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    if missing := sorted({ARMS[arm].against for arm in config.arms} - set(config.arms)):
        error(f"arms: expected {missing[0]} among them, others are compared with it")
    for name in ("arms", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            error(f"{name}: expected at least one and no repetition, got {values}")
    for name in ("batch_size", "epochs", "pretrain_steps", "queue", "proj_dim"):
        if not getattr(config, name) > 0:
            error(f"{name}: expected a number > 0, got {getattr(config, name)}")
    for name in ("learning_rate", "probe_rate", "temperature"):
        if not getattr(config, name) > 0:
            error(f"{name}: expected a number > 0, got {getattr(config, name)}")
    for name in ("masking", "momentum"):
        if not 0 <= getattr(config, name) < 1:
            error(f"{name}: expected a number in [0, 1), got {getattr(config, name)}")
    if not config.widths or min(config.widths) < 1:
        error(f"widths: expected numbers > 0, got {config.widths}")
    if not config.joint_weights or not min(config.joint_weights) > 0:
        error(f"joint_weights: expected numbers > 0, got {config.joint_weights}")
