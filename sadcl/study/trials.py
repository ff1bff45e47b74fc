"""``sadcl study``: does the method help here? The same pictures, split anew for every seed, trained under each arm.

An arm is a choice of losses. Every arm of a seed sees the same pictures in the same order for the same number of
epochs; SARL and what is built on it share step 1 of that seed, and SARL then goes on with the classification loss
alone, so that it is the control. Loss weights and learning rates of every arm are chosen on other seeds.

A trial (part, arm, choice, seed) is one JSON file named after a digest of everything it depends on: a study that
was killed goes on where it was, and one that is given more seeds computes only those.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sadcl.study.config import PARTS, Choice, PartConfig, StudyConfig, candidates, train_config
from sadcl.train.console import say

__all__ = ["Study", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One training of the study: which part, arm and seed, and with which choice of rates and weights."""

    part: str
    arm: str
    choice: Choice
    seed: int


class Study:
    """The trials of a config, and their results as far as there are any.

    Args:
        config: what to run.
        say: receives the lines that people read.
    """

    def __init__(self, config: StudyConfig, say: Callable[[str], None] = say) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.output)

    # -- results --

    def settings(self, trial: Trial) -> dict[str, Any]:
        """Everything the result of a trial depends on, as JSON values."""
        config = train_config(self.config, trial.part, trial.seed)
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
        if not path.is_file():
            return None
        found = json.loads(path.read_text())["result"]
        return {name: math.nan if value is None else value for name, value in found.items()}

    def check_pictures(self, trial: Trial, listed: str) -> None:
        """Require of all results on the lists of a trial that they are of its pictures: arms are compared.

        Args:
            trial: that is to be trained.
            listed: what :class:`sadcl.study.bench.Bench` says of its pictures.

        Raises:
            ValueError: the lists were edited since; names a result of before.
        """
        lists = _lists(self.settings(trial))
        for path in sorted((self.folder / "trials").glob("*.json")):
            content = json.loads(path.read_text())
            if _lists(content["settings"]) == lists and content["data"].get("listed", listed) != listed:
                raise ValueError(
                    f"{path}: was trained on other pictures or labels than the lists name now; expected another "
                    "output, or the trials of before removed"
                )

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

    def describe(self) -> str:
        """The plan for people."""
        lines = ["trainings (finished / all):"]
        for name, phase, count, done in self.plan():
            part: PartConfig = getattr(self.config, name)
            seeds = part.weight_seeds if phase == "weights" else part.seeds
            epochs = f"{part.step1.epochs}+{part.step2.epochs} epochs of {part.train_images}"
            lines.append(f"  {name:10} {phase:8} {done:4} / {count:<4} seeds {seeds}, {epochs} images")
        return "\n".join(lines)


def _lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of a trial's settings, whatever its seed and part."""
    return {k: v for k, v in settings["data"].items() if k not in ("split_seed", "train_images", "val_images")}
