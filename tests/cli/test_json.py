"""What is written as JSON is JSON, whatever could not be measured: jq, browsers and databases know no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sadcl._json import dumps
from sadcl.cli import main


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"bare {constant}")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_lacks_are_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": np.float64("nan"), "d": "nan", "e": True, "f": 3}
    assert strict(dumps(value)) == {"a": [1.5, None, [None, {"b": None}]], "c": None, "d": "nan", "e": True, "f": 3}
    assert dumps({"b": 0.1, "a": 1}, sort_keys=True) == '{"a": 1, "b": 0.1}'


@pytest.mark.parametrize(("rows", "absent"), [("", [0, 1]), ("red", [0])])
def test_eval_of_labels_that_never_occur(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, absent: list[int]
) -> None:
    (tmp_path / "list.csv").write_text(f"{trained}/0.png,{rows}\n{trained}/2.png,{rows}\n")
    assert main(["eval", str(trained / "run" / "step1.pt"), "--json", "--csv", str(tmp_path / "list.csv")]) == 0
    found = strict(capsys.readouterr().out)
    assert [i for i, ap in enumerate(found["ap"]) if ap is None] == absent
    assert (found["mAP"] is None) == (len(absent) == 2)


def test_finished_trial_with_a_figure_that_was_not_measured(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    from sadcl.study.config import Choice, StudyConfig
    from sadcl.study.trials import Study, Trial

    work, trial = Study(StudyConfig(output=str(tmp_path))), Trial("frozen", "sarl", Choice(1e-3, 1e-4), 21)
    work.path(trial).parent.mkdir()
    work.path(trial).write_text(dumps({"result": {"mAP": math.nan, "CF1": 0.5}}))
    found = work.result(trial)
    assert found is not None and math.isnan(found["mAP"]) and found["CF1"] == 0.5
