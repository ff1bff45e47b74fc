"""The study on a table: tables are read and split as they say, figures by hand, trials resume, the report compares."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("jsonargparse", "tqdm", "matplotlib", "scipy", "yaml", "sklearn"):
    pytest.importorskip(needed)

from sklearn import metrics  # noqa: E402

from sadcl.cli import main  # noqa: E402
from sadcl.commands.study_table import study_table  # noqa: E402
from sadcl.metrics import average_precision  # noqa: E402
from sadcl.study.table.bench import TableBench, best_threshold, figures  # noqa: E402
from sadcl.study.table.config import ARMS, TableConfig  # noqa: E402
from sadcl.study.table.data import load_table  # noqa: E402
from sadcl.study.table.trials import TableStudy  # noqa: E402

ARM_NAMES = ["bce", "asl", "msc-probe", "msc-finetuned", "jaccard-joint"]


def generated(folder: Path, split: bool = True) -> Path:
    """90 rows of 6 features whose signs are 4 labels."""
    generator = np.random.default_rng(0)
    labels = (generator.random((90, 4)) < 0.4).astype(np.int8)
    features = np.concatenate([2.0 * labels - 1, np.zeros((90, 2))], 1) + 0.5 * generator.normal(size=(90, 6))
    arrays: dict[str, Any] = {"features": features.astype(np.float32), "labels": labels}
    if split:
        ends = {"train": slice(0, 48), "val": slice(48, 60), "test": slice(60, 90)}
        arrays = {f"{side}_{name}": x[rows] for side, rows in ends.items() for name, x in arrays.items()}
    path = folder / "table.npz"
    np.savez(path, **arrays)
    return path


def small(folder: Path, **changes: Any) -> TableConfig:
    config = TableConfig(
        table=str(generated(folder)), output=str(folder / "out"), arms=ARM_NAMES, seeds=[1, 2], widths=[16, 8],
        proj_dim=4, batch_size=16, epochs=3, pretrain_steps=4, queue=8, joint_weights=[0.1, 1.0],
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TableConfig, dict[str, Any]]:
    config = small(tmp_path_factory.mktemp("table"))
    return config, study_table(config, say=lambda _: None)


def test_every_arm_of_every_seed_is_measured(finished: tuple[TableConfig, dict[str, Any]]) -> None:
    config, content = finished
    assert list(content["values"]) == [name for name in ARMS if name in ARM_NAMES]
    for found in content["values"].values():
        assert set(found) == {1, 2}
        assert all(0 <= result[name] <= 1 for result in found.values() for name in ("mAP", "micro F1", "ranking loss"))
    assert content["values"]["bce"][1]["mAP"] != content["values"]["bce"][2]["mAP"]
    against = {(one["arm"], one["against"]) for one in content["against"]["mAP"]}
    assert against == {("asl", "bce"), ("msc-probe", "bce"), ("msc-finetuned", "bce"), ("jaccard-joint", "asl")}
    page = (Path(config.output) / "study.md").read_text()
    assert "10 of 10 trainings finished" in page and "## ranking loss (less is better)" in page
    assert json.loads((Path(config.output) / "study.json").read_text())["config"]["pretrain_steps"] == 4


def test_a_study_goes_on_where_it_was(finished: tuple[TableConfig, dict[str, Any]]) -> None:
    config, content = finished
    study = TableStudy(config, lambda _: None)
    assert study.missing(1) == [] and "10 of 10 trainings finished" in study.describe()
    study.path("msc-finetuned", 2).unlink()
    assert study.missing(2) == ["msc-finetuned"] and study.run_seed(2)
    again = study.result("msc-finetuned", 2)
    assert again is not None and again["mAP"] == content["values"]["msc-finetuned"][2]["mAP"]
    assert TableStudy(replace(config, epochs=4), lambda _: None).missing(1) == sorted(ARM_NAMES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = generated(tmp_path)
    options = [f"--table={path}", f"--output={tmp_path / 'out'}", "--seeds=[3]", "--epochs=1", "--widths=[8]"]
    assert main(["study", "table", *options, "--arms=[bce]", "--dry-run"]) == 0
    assert "0 of 1 trainings finished" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(["study", "table", *options, "--arms=[bce]"]) == 0
    assert (tmp_path / "out" / "study.md").exists()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--arms=[bce, zlrp]", "arms: expected some of"),
        ("--arms=[bce, any-joint]", "arms: expected asl among them"),
        ("--seeds=[1, 1]", "seeds: expected at least one and no repetition"),
        ("--epochs=0", "epochs: expected a number > 0"),
        ("--masking=1.0", r"masking: expected a number in \[0, 1\)"),
        ("--joint_weights=[0.0]", "joint_weights: expected numbers > 0"),
    ],
)
def test_refused_before_anything_runs(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", "table", option])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_table_is_split_as_it_says_or_by_the_seed(tmp_path: Path) -> None:
    table = load_table(str(generated(tmp_path)))
    sides = table.split(1, resplit=False)
    assert [len(side.labels) for side in sides.values()] == [48, 12, 30]
    assert torch.equal(sides["test"].labels, table.rows.labels[60:])
    torch.testing.assert_close(sides["train"].features.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(sides["train"].features.std(0), torch.ones(6))
    one, two = (table.split(seed, resplit=True)["test"].labels for seed in (1, 2))
    assert one.shape == two.shape == (30, 4) and not torch.equal(one, two)
    whole = load_table(str(generated(tmp_path, split=False)))
    assert [len(side.labels) for side in whole.split(1, False).values()] == [45, 11, 34]


def test_tables_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    x, y = np.zeros((16, 3), np.float32), np.zeros((16, 2), np.int8)
    for arrays, message in (
        ({"features": x}, "is missing"),
        ({"features": x, "labels": y[:5]}, "expected features"),
        ({"features": x * np.nan, "labels": y}, "finite"),
        ({"features": x, "labels": y + 2}, "labels"),
        ({f"{s}_{w}": a for s in ("train", "val", "test") for w, a in (("features", x), ("labels", y[:9]))}, "as many"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_table(str(path))
    with pytest.raises(FileNotFoundError):
        load_table(str(tmp_path / "none.npz"))


def test_openml_says_true_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sklearn import datasets

    target = np.array([["TRUE", "FALSE"]] * 9, dtype=object)
    seen: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> Any:
        seen.update(name=name, **options)
        return SimpleNamespace(data=np.ones((9, 3)), target=target)

    monkeypatch.setattr(datasets, "fetch_openml", fetch)
    table = load_table("openml:yeast:4")
    assert (seen["name"], seen["version"]) == ("yeast", 4) and table.rows.labels.tolist() == [[1.0, 0.0]] * 9


def test_figures_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(40, 6, generator=generator) < 0.4).float()
    labels[0], labels[1] = 0, 1
    scores = torch.rand(40, 6, generator=generator)
    got, both = figures(scores, labels, 0.4), (labels.sum(1) > 0) & (labels.sum(1) < 6)
    y, s = labels.numpy(), scores.double().numpy()
    assert got["mAP"] == pytest.approx(float(torch.as_tensor(average_precision(scores, labels)).mean()))
    assert got["micro F1"] == pytest.approx(metrics.f1_score(y, s > 0.4, average="micro"))
    assert got["macro F1"] == pytest.approx(metrics.f1_score(y, s > 0.4, average="macro"))
    y, s = y[both], s[both]
    assert got["label ranking AP"] == pytest.approx(metrics.label_ranking_average_precision_score(y, s))
    assert got["ranking loss"] == pytest.approx(metrics.label_ranking_loss(y, s))
    assert got["coverage"] == pytest.approx(metrics.coverage_error(y, s))
    assert got["one-error"] == pytest.approx(1 - np.mean([row[i] for row, i in zip(y, s.argmax(1), strict=True)]))


def test_the_threshold_is_the_best_of_the_scores() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    scores = torch.tensor([[0.9, 0.2], [0.3, 0.8], [0.99, 0.1]])
    assert 0.3 <= best_threshold(scores, labels) < 0.8


def test_a_probe_leaves_the_encoder_alone_and_masks_are_shared(tmp_path: Path) -> None:
    config = small(tmp_path)
    bench = TableBench(config, load_table(config.table), 1)
    before = [p.clone() for p in bench.pretrained("any").parameters()]
    bench.train("any-probe")
    assert all(torch.equal(a, b) for a, b in zip(before, bench.pretrained("any").parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.initial.parameters(), strict=True))
