"""``sadcl study``: what is not trained yet, seed after seed, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sadcl._json import dumps
from sadcl.checkpoint import make_folder, write_atomically
from sadcl.study.bench import Bench
from sadcl.study.config import PARTS, PartConfig, StudyConfig
from sadcl.study.report import write_report
from sadcl.study.trials import Study, Trial
from sadcl.train.console import say

__all__ = ["run", "study"]


def study(config: StudyConfig, dry_run: bool = False, say: Callable[[str], None] = say) -> dict[str, Any]:
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
    return run(work)


def run(study: Study) -> dict[str, Any]:
    """Everything that is not finished yet, then the report; returns the content of ``study.json``."""
    make_folder(study.folder)
    write_atomically(study.folder / "config.yaml", lambda file: file.write(study.config.as_yaml().encode()))
    study.say(study.describe())
    for name in PARTS:
        part: PartConfig = getattr(study.config, name)
        clock = Clock([row[2] - row[3] for row in study.plan() if row[0] == name])
        for seed in part.weight_seeds:
            _run_seed(study, name, seed, study.weight_trials(name, seed), clock)
        for seed in part.seeds:
            if _run_seed(study, name, seed, study.seed_trials(name, seed), clock):
                write_report(study)  # whatever is finished can be read at any time
    return write_report(study)


def _run_seed(study: Study, name: str, seed: int, trials: Sequence[Trial], clock: Clock) -> bool:
    """Train what is missing of one seed; whether anything was."""
    missing = [trial for trial in trials if not study.path(trial).is_file()]
    if not missing:
        return False
    bench = Bench(study.config, name, seed)
    study.check_pictures(missing[0], bench.listed)
    for trial in missing:
        began = time.perf_counter()
        result = bench.train(trial)
        result["seconds"] = time.perf_counter() - began
        about = {"title": bench.title, "protocol": bench.protocol, "listed": bench.listed}
        content = {"settings": study.settings(trial), "result": result, "data": about}
        text = dumps(content, indent=1).encode()
        write_atomically(study.path(trial), lambda file, text=text: file.write(text))
        study.say(
            f"{name} seed {seed}  {trial.arm:14} {trial.choice.text():44} mAP {result['mAP']:.4f}  "
            f"{result['seconds']:.0f} s  {clock.tick()}"
        )
    bench.close()
    return True


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
