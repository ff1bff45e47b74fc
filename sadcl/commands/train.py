"""``sadcl train``: a run from its config to its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sadcl._json import dumps
from sadcl.checkpoint import remove_drafts, write_atomically
from sadcl.report.report import draw, summary, table
from sadcl.train import distributed
from sadcl.train.config import TrainConfig
from sadcl.train.console import say
from sadcl.train.lock import locked
from sadcl.train.run import TITLES, Run

__all__ = ["train"]


def train(
    config: TrainConfig, resume: bool = False, say: Callable[[str], None] = say, edited: bool = False
) -> dict[str, Any]:
    """Run a config to its end and write ``metrics.json`` and the pictures.

    Started by torchrun, the processes train together; the main one writes and speaks.

    Args:
        config: what to run.
        resume: continue the run in ``config.output``.
        say: receives the lines that people read.
        edited: with ``resume``, go on although the lists of pictures were edited since: from the beginning of the
            interrupted epoch, with the pictures as they are now.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FolderInUse: another process runs in ``config.output``.
    """
    folder = Path(config.output)
    with distributed.joined():
        if not distributed.is_main():
            distributed.wait()  # the folder is ours
            return _train(config, resume, say, edited)
        with locked(folder):
            for place in (folder, *_own_features(folder)):
                remove_drafts(place)
            distributed.wait()
            return _train(config, resume, say, edited)


def _own_features(folder: Path) -> list[Path]:
    """Folders of feature maps that lie in the run's own: no other run writes there."""
    features = folder / "features"
    return [] if features.is_symlink() else [path for path in features.glob("*") if path.is_dir()]


def _train(config: TrainConfig, resume: bool, say: Callable[[str], None], edited: bool) -> dict[str, Any]:
    began = time.perf_counter()
    run = Run(config, say)
    reports = run.run(resume, edited)
    metrics = summary(run, reports)
    if config.eval_image_size:
        sized = {name: run.evaluate_at(name, config.eval_image_size) for name in reports}
        metrics[f"at_{config.eval_image_size}"] = {name: report.as_dict() for name, report in sized.items()}
    if distributed.world() > 1:
        metrics["processes"] = distributed.world()
    if not distributed.is_main():
        return metrics
    write_atomically(run.folder / "metrics.json", lambda file: file.write(dumps(metrics, indent=1).encode()))
    say(table(run, reports))
    if config.eval_image_size:
        for name, report in sized.items():
            say(f"{TITLES[name]:<28} at {config.eval_image_size} pixels: mAP {report.mAP:.4f}")
    if config.plots:
        draw(run, reports, metrics)
    say(f"done in {time.perf_counter() - began:.0f} s; everything is in {run.folder}/:")
    for path in sorted(
        path for path in run.folder.iterdir() if path.suffix in (".html", ".json", ".pt", ".png", ".yaml")
    ):
        say(f"  {path}")
    return metrics
