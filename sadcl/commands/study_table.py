"""``sadcl study table``: which loss helps on a table of features, and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sadcl.checkpoint import make_folder, write_atomically
from sadcl.study.table.config import TableConfig
from sadcl.study.table.report import write_table_report
from sadcl.study.table.trials import TableStudy
from sadcl.train.console import say

__all__ = ["study_table"]


def study_table(config: TableConfig, dry_run: bool = False, say: Callable[[str], None] = say) -> dict[str, Any]:
    """Run what is not trained yet, seed after seed, or print the plan.

    Args:
        config: what to run.
        dry_run: only print the plan.
        say: receives the lines that people read.

    Returns:
        The content of ``study.json``; empty for a dry run.

    Raises:
        FileNotFoundError, ValueError: the table is missing, or is none.
    """
    study = TableStudy(config, say)
    say(study.describe())
    if dry_run:
        return {}
    make_folder(study.folder)
    write_atomically(study.folder / "config.yaml", lambda file: file.write(config.as_yaml().encode()))
    for seed in config.seeds:
        if study.run_seed(seed):
            write_table_report(study)  # whatever is finished can be read at any time
    return write_table_report(study)
