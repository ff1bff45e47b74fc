"""What a run writes down: checkpoints that it can be resumed from, and the batch that broke it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sadcl.checkpoint import CheckpointError, load_checkpoint, write_atomically
from sadcl.metrics import MultilabelAccumulator
from sadcl.model import SADCL
from sadcl.train import distributed
from sadcl.train.config import TrainConfig, config_from_dict
from sadcl.train.data import Images
from sadcl.train.listed import edits
from sadcl.train.loop import NonFiniteLoss, Stage
from sadcl.train.order import rng_state, set_rng_state

__all__ = ["Progress", "check_backbone", "content", "dump_batch", "others_state", "read_last", "restore_stage"]

NAMES = {"train": "training", "val": "validation"}
# Keys that a resumed run may change: they say where things are and what is drawn, not what is computed. The weights
# that it started from are in the checkpoint.
FREE = (
    "output", "plots", "checkpoint_every", "data.workers", "data.feature_cache", "data.root", "model.pretrained",
    "model.init_from",
)  # fmt: skip
# Where lists are: what they hold is compared by itself.
LISTED = (
    "data.train_list", "data.val_list", "data.train_csv", "data.val_csv", "data.train_folder", "data.val_folder",
    "data.class_names",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        stage: of the method, the one that runs: step1, control or step2.
        epoch: finished epochs of the stage.
        step: optimizer steps of all stages.
        best: of the stage: the highest validation mAP and its epoch.
        history: a row of figures for every epoch of every stage.
        thresholds: of a finished stage, one per class, tuned on validation; only while it is written down.
        seen: scores and labels of the last evaluation.
        kept: the model that the last evaluation chose: the trained weights or their average.
    """

    stage: str = ""
    epoch: int = 0
    step: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    thresholds: list[float] | None = None
    seen: MultilabelAccumulator | None = None
    kept: SADCL | None = None


def content(
    config: TrainConfig,
    images: Images,
    progress: Progress,
    model: SADCL,
    training: Stage | None = None,
    others: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """A checkpoint: all that evaluation, prediction and, with ``training``, a resume need.

    Args:
        config: of the run.
        images: what it trains on.
        progress: how far it has come.
        model: the weights to keep: the trained ones, or their average. The memory bank and prototypes are in it.
        training: optimizer, schedule, average, position in the order of images, random generators.
        others: with training, what :func:`others_state` says.
    """
    kept = {
        "config": config.as_dict(),
        "classes": list(images.classes),
        "title": images.title,
        "protocol": images.protocol,
        "architecture": model.config(),
        "preprocessing": model.preprocessing.to_dict(),
        "model": model.state_dict(),
        "stage": progress.stage,
        "epoch": progress.epoch,
        "step": progress.step,
        "best": progress.best,
        "thresholds": progress.thresholds,
        "history": progress.history,
    }
    if training is None:
        return kept
    return {**kept, "listed": images.listed, "training": training.state_dict(), "others": list(others)}


def others_state(model: SADCL, stage: Stage) -> list[dict[str, Any]]:
    """What each process but the main one has of its own, for the checkpoint: every process has to ask.

    The rest is the same in all of them. In a single process: nothing.
    """
    bank = model.head.memory_bank
    own = {"rng": rng_state(), "sums": dict(stage.sums), "bank": None if bank is None else bank.slots.cpu()}
    return distributed.gather(own)[1:]


def restore_stage(state: dict[str, Any], model: SADCL, stage: Stage) -> None:
    """Put a stage back to where a checkpoint of :func:`content` was made: the weights, and all that trains them.

    With a training list that was edited since, the epoch begins again, with the schedule at its share of the steps that
    there are now.
    """
    model.load_state_dict(state["model"])
    edited = "train" in state["edits"]
    if edited:
        stage.load_other_images(state["training"])
    else:
        stage.load_state_dict(state["training"])
    if distributed.is_main():
        return
    own = state["others"][distributed.rank() - 1]
    models = [model] if stage.ema is None else [model, stage.ema.module]
    for bank in (one.head.memory_bank for one in models):
        if bank is not None:
            bank.slots.copy_(own["bank"])
    stage.sums = {} if edited else dict(own["sums"])
    set_rng_state(own["rng"])


def read_last(config: TrainConfig, images: Images, edited: bool = False) -> dict[str, Any] | None:
    """What ``last.pt`` holds, if it is this run's; None if there is nothing yet.

    Args:
        config: of the run.
        images: what it would go on with.
        edited: take them although the lists were edited since.

    Returns:
        The checkpoint, and in ``edits`` what was changed: side -> in words.

    Raises:
        CheckpointError: it is of a run with another config, other labels, pictures or number of processes.
    """
    path = Path(config.output) / "last.pt"
    if not path.is_file():
        return None
    state = load_checkpoint(path)
    theirs = config_from_dict(state["config"]).as_dict()  # an older version's lacks the keys that came since
    free = FREE + (LISTED if "listed" in state else ())
    for key, old, new in _differences(theirs, config.as_dict()):
        if key not in free:
            raise CheckpointError(
                f"{path}: was started with {key} = {old!r}, not {new!r}; "
                f"resume with --config {path.with_name('config.yaml')}"
            )
    if tuple(state["classes"]) != images.classes:
        other = sorted(set(state["classes"]) ^ set(images.classes)) or ["in another order"]
        raise CheckpointError(f"{path}: was started on other labels ({state['title']}): {', '.join(other[:5])}")
    sides = {side: edits(then, images.listed[side]) for side, then in state.get("listed", {}).items()}
    state["edits"] = {side: changes for side, changes in sides.items() if changes}
    if state["edits"] and not edited:
        said = "; ".join(f"{NAMES[side]}: {changes}" for side, changes in state["edits"].items())
        raise CheckpointError(f"{path}: the pictures are not those it was started on ({said}); --resume-edited goes on")
    processes = 1 + len(state.get("others", []))
    if processes != distributed.world():
        raise CheckpointError(
            f"{path}: was started with {processes} processes, not {distributed.world()}, which would be another run: "
            "each has its own part of the images and its own memory bank"
        )
    return state


def check_backbone(path: Path, state: dict[str, Any], model: SADCL) -> None:
    """Require of a frozen backbone, whose feature maps a run trains on, that it is the one that the run started with.

    Args:
        path: of the checkpoint.
        state: what it holds.
        model: as its config builds it now.

    Raises:
        CheckpointError: it has other weights (another file under the same name, other random ones).
    """
    kept = state["model"]
    for name, value in model.backbone.state_dict(prefix="backbone.").items():
        if name not in kept or not torch.equal(kept[name], value.cpu()):
            raise CheckpointError(
                f"{path}: was started with other weights of the backbone, whose feature maps it trains on ({name} is "
                "the first that differs); resume with model.pretrained and model.init_from as they were"
            )


def dump_batch(folder: Path, error: NonFiniteLoss, stage: str, training: Stage) -> NonFiniteLoss:
    """Write the batch that gave a NaN or infinity to ``nonfinite.pt``; returns the error with what to look at."""
    given, labels = error.batch["images"], error.batch["labels"]
    images = torch.cat([part.flatten(1) for part in ([given] if isinstance(given, Tensor) else given)], 1)
    position = training.batches
    where = {"stage": stage, "epoch": position.epoch + 1, "batch": position.batch + 1, "step": training.steps}
    own = f".{distributed.rank()}" if distributed.rank() else ""
    path = folder / f"nonfinite{own}.pt"
    write_atomically(path, lambda file: torch.save({**error.batch, **where}, file))
    rate = max(group["lr"] for group in training.optimizer.param_groups)
    bad = int((~images.isfinite().all(1)).sum())
    look = [
        f"{bad} of its {len(images)} inputs are not finite: look at the pictures"
        if bad
        else f"its {len(images)} inputs are finite (largest magnitude {float(images.abs().max()):.3g})"
    ]
    strange = sorted({value for value in labels.unique().tolist() if value not in (-1.0, 0.0, 1.0)}, key=repr)
    look += [f"labels that are none of -1, 0, 1: {strange[:5]}"] if strange else []
    look += [f"the learning rate is {rate:.3g}; a smaller one, or gradient clipping, usually helps"]
    look += ["amp fp16 overflows above 65504; bf16 does not"] if training.autocast is torch.float16 else []
    lost = [name for name, value in error.batch["parts"].items() if name != "total" and not math.isfinite(value)]
    if all(map(math.isfinite, error.batch["parts"].values())):
        lost = [f"gradient of {name}" for name in error.batch["gradient"][:3]] or ["gradient"]
    message = (
        f"{error} ({stage}, epoch {where['epoch']}, batch {where['batch']}; not finite: {', '.join(lost) or 'total'}). "
        f"The batch is in {path} (images, labels, parts, gradient). {'. '.join(look)}."
    )
    return NonFiniteLoss(message, error.batch)


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
