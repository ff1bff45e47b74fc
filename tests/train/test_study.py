"""The study: statistics by hand, choices from the weight seeds alone, resumption after SIGKILL, a fair control."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "scipy", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.cli import main  # noqa: E402
from sadcl.commands.study import run, study  # noqa: E402
from sadcl.study.bench import Bench, PooledLinear  # noqa: E402
from sadcl.study.compare import compare, holm  # noqa: E402
from sadcl.study.config import ARMS, Choice, PartConfig, StudyConfig, candidates, parse_study  # noqa: E402
from sadcl.study.trials import Study, Trial  # noqa: E402
from tests.here import coloured_squares  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 pictures of one to three coloured squares, and the lists that name them."""
    return coloured_squares(tmp_path_factory.mktemp("pictures"), 28, train=16)


def arguments(pictures: Path, output: Path) -> list[str]:
    """A study of 13 trainings: the frozen part tries two weights for one arm, the fine-tuned part has one choice."""
    values = {
        "output": output,
        "batch_size": 8,
        "data.source": "csv",
        "data.train_csv": pictures / "train.csv",
        "data.val_csv": pictures / "val.csv",
        "data.image_size": 64,
        "data.workers": 0,
        "model.backbone": "timm:test_resnet",
        "model.pretrained": "false",
        "model.hidden_dim": 16,
        "model.num_heads": 2,
        "model.ffn_dim": 32,
        "model.proj_dim": 8,
        "frozen.arms": "[linear, sarl, sscl-paper, all-released]",
        "frozen.seeds": "[21, 22]",
        "frozen.weights": "[[10, 0], [100, 0]]",
        "finetuned.arms": "[sarl]",
        "finetuned.seeds": "[21]",
    }
    return ["--smoke", *(f"--{key}={value}" for key, value in values.items())]


def tiny(pictures: Path, output: Path) -> StudyConfig:
    return parse_study(arguments(pictures, output))[0]


def quiet(line: str) -> None:
    del line


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """File name -> result, without the seconds."""
    found = {path.name: json.loads(path.read_text())["result"] for path in (folder / "trials").iterdir()}
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted study."""
    folder = tmp_path_factory.mktemp("study")
    return folder, study(tiny(pictures, folder), say=quiet)


# -- statistics --


def test_paired_interval_is_the_one_computed_by_hand() -> None:
    ours = {1: 0.51, 2: 0.62, 3: 0.73, 9: 0.9}
    theirs = {1: 0.50, 2: 0.60, 3: 0.70, 8: 0.1}
    found = compare("a", "b", ours, theirs)  # differences 0.01, 0.02, 0.03; seeds 8 and 9 have no partner
    assert found is not None
    assert found.seeds == (1, 2, 3)
    assert found.mean == pytest.approx(0.02)
    half = 4.302652729911275 * 0.01 / math.sqrt(3)  # t of 2 degrees of freedom at 0.975 (tables: 4.303)
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half))
    t = 0.02 / (0.01 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form for 2 degrees of freedom


def test_interval_of_too_few_or_equal_seeds() -> None:
    single = compare("a", "b", {1: 0.5}, {1: 0.4})
    assert single is not None and single.mean == pytest.approx(0.1)
    assert math.isnan(single.low) and math.isnan(single.high) and math.isnan(single.p)
    assert compare("a", "b", {1: 0.5}, {2: 0.4}) is None
    same = compare("a", "b", {1: 0.5, 2: 0.75}, {1: 0.5, 2: 0.75})
    assert same is not None and (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


def test_holm_by_hand() -> None:
    adjusted = holm([0.01, 0.04, math.nan, 0.03])
    assert adjusted[:2] == pytest.approx([0.03, 0.06])
    assert math.isnan(adjusted[2])
    assert adjusted[3] == pytest.approx(0.06)  # 2 * 0.03; 0.04 may not fall below it
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# -- what is tried and chosen --


def test_every_arm_tries_its_own_side_of_the_weights() -> None:
    part = PartConfig(step2_rates=[1e-4, 5e-4], weights=[(10.0, 1.0), (10.0, 2.0), (30.0, 2.0)], linear_rates=[0.01])
    pairs = {
        arm: [(one.rate2, one.sample_weight, one.prototype_weight) for one in candidates(part, arm)] for arm in ARMS
    }
    assert pairs["sarl"] == [(1e-4, 0, 0), (5e-4, 0, 0)]
    assert pairs["sscl-paper"] == [(rate, weight, 0) for rate in (1e-4, 5e-4) for weight in (10, 30)]
    assert pairs["pscl-released"] == [(rate, 0, weight) for rate in (1e-4, 5e-4) for weight in (1, 2)]
    assert len(pairs["all-paper"]) == 6
    assert candidates(part, "linear") == [Choice(0.01, 0.001)]  # step 2 at the ratio of the other arms' steps


def test_choice_comes_from_the_weight_seeds_alone(tmp_path: Path) -> None:
    config = StudyConfig(output=str(tmp_path))
    config.frozen = PartConfig(
        arms=["sarl", "sscl-paper"],
        seeds=[1, 2, 3],
        weight_seeds=[11, 12],
        step2_rates=[1e-4],
        weights=[(10.0, 0.0), (100.0, 0.0)],
    )
    config.finetuned = replace(config.frozen, arms=[], seeds=[])
    work = Study(config, quiet)
    low, high = candidates(config.frozen, "sscl-paper")
    put(work, Trial("frozen", "sscl-paper", low, 11), 0.5)
    put(work, Trial("frozen", "sscl-paper", low, 12), 0.6)
    put(work, Trial("frozen", "sscl-paper", high, 11), 0.9)
    assert "sscl-paper" not in work.chosen("frozen"), "a candidate has no second seed yet"
    put(work, Trial("frozen", "sscl-paper", high, 12), 0.3)
    assert work.chosen("frozen")["sscl-paper"] == high  # 0.6 against 0.55
    control = candidates(config.frozen, "sarl")[0]
    for seed, ours, theirs in ((1, 0.51, 0.5), (2, 0.62, 0.6), (3, 0.73, 0.7)):
        put(work, Trial("frozen", "sscl-paper", high, seed), ours)
        put(work, Trial("frozen", "sscl-paper", low, seed), 0.99)  # better, and must not be looked at
        put(work, Trial("frozen", "sarl", control, seed), theirs)
    content = run(work)
    (part,) = content["parts"]
    (comparison,) = part["against_control"]
    assert comparison["arm"] == "sscl-paper"
    assert comparison["differences"] == pytest.approx((0.01, 0.02, 0.03))
    page = (tmp_path / "study.md").read_text()
    assert (
        page.count("| SARL + SSCL, paper | 0.6200 ± 0.1100 | +0.0200 | -0.0048 to +0.0448 | 3 of 3 |") == 2
    )  # mAP, CF1
    assert "| 100 / 0 | **0.6000** |" in page and "| 10 / 0 | 0.5500 |" in page


def put(work: Study, trial: Trial, value: float) -> None:
    """A made-up result."""
    path = work.path(trial)
    path.parent.mkdir(exist_ok=True)
    result = {"mAP": value, "CF1": value, "OF1": value, "seconds": 1.0}
    content = {"settings": work.settings(trial), "result": result, "data": {"title": "made up", "protocol": ""}}
    path.write_text(json.dumps(content))


# -- running --


def test_study_leaves_what_it_promises(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, content = finished
    assert json.loads(json.dumps(content)) == json.loads((folder / "study.json").read_text())
    assert [(row["part"], row["phase"], row["trainings"]) for row in content["plan"]] == [
        ("frozen", "weights", 4),
        ("frozen", "arms", 8),
        ("finetuned", "weights", 0),
        ("finetuned", "arms", 1),
    ]
    assert all(row["trainings"] == row["finished"] for row in content["plan"])
    frozen = content["parts"][0]
    assert [row["arm"] for row in frozen["against_control"]] == ["linear", "sscl-paper", "all-released"]
    for row in frozen["against_control"]:
        ours, control = frozen["values"][row["arm"]], frozen["values"]["sarl"]
        assert row["differences"] == tuple(ours[seed]["mAP"] - control[seed]["mAP"] for seed in (21, 22))
    with Image.open(folder / "study.png") as image:
        assert min(image.size) > 200
    page = (folder / "study.md").read_text()
    assert "13 of 13 trainings finished" in page and "Fine-tuned backbone" in page
    assert "too few seeds" not in page.split("Fine-tuned")[0]
    assert not any((folder / "features").iterdir()), "feature maps of finished seeds are removed"


def test_killed_study_continues_where_it_was(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    """SIGKILL after the sixth result: in the middle of an evaluation seed, whose step 1 is then trained again."""
    script = (
        "import os, signal, sys\n"
        "from sadcl.commands.study import study\n"
        "from sadcl.study.config import parse_study\n"
        "count = 0\n"
        "def say(line):\n"
        "    global count\n"
        "    count += ' mAP ' in line\n"
        "    if count == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "study(parse_study(sys.argv[1:])[0], say=say)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, *arguments(pictures, tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    assert len(before) == 6
    said: list[str] = []
    study(tiny(pictures, tmp_path), say=said.append)
    assert sum(" mAP " in line for line in said) == 7
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished trainings are not repeated"
    whole = figures(finished[0])
    assert figures(tmp_path) == whole, "bit for bit what the uninterrupted study has"
    said.clear()
    more = tiny(pictures, tmp_path)
    more.finetuned.seeds = [21, 23]
    study(more, say=said.append)
    assert sum(" mAP " in line for line in said) == 1, "a further seed needs its own trainings only"


@pytest.mark.parametrize("name", ["train.csv", "val.csv"])
def test_edited_lists_are_not_compared_with_those_of_before(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "study")
    shutil.copytree(pictures, tmp_path / "pictures")
    for path in (tmp_path / "study" / "trials").iterdir():
        path.write_text(path.read_text().replace(str(pictures), str(tmp_path / "pictures")))
    more = tiny(tmp_path / "pictures", tmp_path / "study")
    more.finetuned.seeds = [21, 23]
    plan, trial = Study(more), Trial("finetuned", "sarl", Choice(1e-3, 1e-3), 23)
    plan.check_pictures(trial, Bench(more, "finetuned", 23).listed)
    rows = (tmp_path / "pictures" / name).read_text().splitlines(keepends=True)
    (tmp_path / "pictures" / name).write_text("".join(rows[1:]))
    with pytest.raises(ValueError, match="json: was trained on other pictures or labels than the lists name now"):
        study(more, say=quiet)


def test_control_differs_from_the_method_by_the_losses_alone(pictures: Path, tmp_path: Path) -> None:
    """With both weights 0 the contrastive arm is the control: same step 1, order, dropout, epochs and schedule."""
    config = tiny(pictures, tmp_path)
    config.frozen = replace(config.frozen, arms=["sarl", "all-paper"], seeds=[21], weights=[(0.0, 0.0)])
    config.finetuned = replace(config.finetuned, arms=[], seeds=[])
    study(config, say=quiet)
    control, method = (next(v for k, v in figures(tmp_path).items() if arm in k) for arm in ("-sarl-", "-all-paper-"))
    assert method["train_sample"] > 0 and method["train_prototype"] > 0
    for name in ("mAP", "CF1", "OF1", "train_classification"):
        assert method[name] == control[name], name


def test_pooled_linear_is_a_linear_layer_on_the_mean() -> None:
    maps = torch.randn(3, 8, 5, 4)
    model = PooledLinear(None, 8, 6)
    expected = maps.flatten(2).mean(-1) @ model.linear.weight.T + model.linear.bias
    torch.testing.assert_close(model(maps, contrastive=False).logits, expected)


# -- the command line --


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--smoke", "--dry-run", "--output", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "frozen     weights     0 / 12" in printed and "frozen     arms        0 / 16" in printed
    assert not (tmp_path / "new").exists()


def test_default_study_is_what_was_asked_for() -> None:
    config, dry_run = parse_study([])
    assert not dry_run and config.frozen.arms == list(ARMS) and len(config.frozen.seeds) >= 5
    assert len(config.finetuned.seeds) >= 5 and len(config.finetuned.arms) == 3
    for part in (config.frozen, config.finetuned):
        assert not set(part.seeds) & {*part.weight_seeds, 0, 1, 2, 11, 12}  # seeds that defaults were chosen on


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--frozen.weight_seeds=[11, 21]", "21 is an evaluation seed too"),
        ("--frozen.arms=[linear, all-paper]", "expected sarl"),
        ("--frozen.arms=[sarl, sars]", "'sars'"),
        ("--finetuned.seeds=[3, 3]", "no repetition"),
        ("--frozen.weight_seeds=[]", "something to choose"),
        ("--frozen.step2.epochs=0", "step2.epochs"),
        ("--frozen.step2.patience=3", "no patience"),
        ("--frozen.linear_rates=[]", "at least one value"),
    ],
)
def test_what_would_mislead_is_refused(argument: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_study([argument])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_config_file_reads_back(pictures: Path, tmp_path: Path) -> None:
    config = tiny(pictures, tmp_path)
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    assert parse_study(["--config", str(tmp_path / "config.yaml")])[0] == config
