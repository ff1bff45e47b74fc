"""A run that goes on after its lists were edited: refused with what was changed, or taken on as asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from test_train import pictures, quiet, tiny  # noqa: E402, F401

from sadcl.checkpoint import CheckpointError, load_checkpoint, save_checkpoint  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.data.listing import Entry, ImageListing  # noqa: E402
from sadcl.train.config import TrainConfig, parse_arguments  # noqa: E402
from sadcl.train.data import load_images  # noqa: E402
from sadcl.train.listed import edits, listed  # noqa: E402
from sadcl.train.loop import Stage  # noqa: E402
from sadcl.train.run import Run  # noqa: E402
from sadcl.train.state import read_last  # noqa: E402

Rows = list[str]


def side(folder: Path, *rows: tuple[str, tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
    """What is kept of a list of (name, labels, labels that are not known)."""
    for name, _, _ in rows:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    entries = [Entry(str(folder / name), there, "here", unknown) for name, there, unknown in rows]
    return listed(ImageListing("pictures", "list", entries, ["x", "y", "z"], 8), str(folder))


A, B, C, D = (("sub/a.png", (0,), ()), ("b.png", (1, 2), ()), ("c.png", (), (1,)), ("d 猫.png", (2,), ()))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([A, B, C], ""),
        ([A, B], "1 picture is gone (c.png)"),
        ([B], "2 pictures are gone (sub/a.png, c.png)"),
        ([A, B, C, D], "1 picture is new (d 猫.png)"),
        ([A, B, D], "1 picture is gone (c.png), 1 picture is new (d 猫.png)"),
        ([A, C, B], "the order is another"),
        ([C, A], "1 picture is gone (b.png), the order is another"),
        ([A, ("b.png", (1,), ()), C], "1 picture has other labels (b.png)"),
        ([A, B, ("c.png", (), ())], "1 picture has other labels (c.png)"),
        ([A, ("b.png", (2, 1), ()), C], ""),
        ([("a.png", (0,), ()), B, C], "1 picture is gone (sub/a.png), 1 picture is new (a.png)"),
    ],
)
def test_what_was_edited_is_said(tmp_path: Path, rows: Any, said: str) -> None:
    before, after = side(tmp_path / "here", A, B, C), side(tmp_path / "there", *rows)  # the folder may move
    assert edits(before, after) == said


@pytest.mark.parametrize("spelling", ["{folder}/a.png", "./a.png", "sub/../a.png", "sub//../a.png"])
def test_one_name_in_other_words_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    before = side(tmp_path, ("sub/b.png", (), ()), ("a.png", (0,), ()))
    entries = [Entry(str(tmp_path / "sub/b.png"), (), "here"), Entry(spelling.format(folder=tmp_path), (0,), "here")]
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), ".", "", "sub/.."):
        now = ImageListing("pictures", "list", entries, ["x", "y", "z"], 8)
        assert edits(before, listed(now, folder)) == ""


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    many = [(f"{i}.png", (0,), ()) for i in range(20)]
    assert edits(side(tmp_path, *many), side(tmp_path, A)).startswith(
        "20 pictures are gone (0.png, 1.png, 2.png, ...), "
    )


@pytest.fixture(scope="module")
def stopped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:  # noqa: F811
    """A run on its own lists, stopped in the second epoch of step 1, at 2 of 3 steps; and a copy of all its files."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(pictures, folder / "now" / "data")
    options = {"control": "false", "step2__epochs": 1, "checkpoint_every": 1, "step1__select": "best"}
    config = tiny(folder / "now" / "data", folder / "now" / "run", **options, ema__decay=0.9)
    save = Run._save_last

    def save_then_stop(self: Run, stage: Stage) -> None:
        save(self, stage)
        if (stage.batches.epoch, stage.batches.batch) == (1, 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_save_last", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, say=quiet)
    shutil.copytree(folder / "now", folder / "then")
    return config, folder


@pytest.fixture
def half(stopped: tuple[TrainConfig, Path]) -> TrainConfig:
    """The run as it was when it stopped."""
    config, folder = stopped
    shutil.rmtree(folder / "now")
    shutil.copytree(folder / "then", folder / "now")
    return config


def relabel(rows: Rows) -> Rows:
    name, _, labels = rows[0].partition(",")
    return [f"{name},{'red' if labels != 'red' else 'blue'}", *rows[1:]]


EDITS: dict[str, tuple[str, Callable[[Rows], Rows]]] = {
    "16 pictures are gone": ("train.csv", lambda rows: rows[-8:]),
    "1 picture has other labels": ("train.csv", relabel),
    "the order is another": ("train.csv", lambda rows: rows[::-1]),
    "validation: 6 pictures are gone": ("val.csv", lambda rows: rows[::2]),
}


def edit(config: TrainConfig, what: str) -> None:
    name, change = EDITS[what]
    path = Path(config.output).parent / "data" / name
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


@pytest.mark.parametrize("what", EDITS)
def test_edited_lists_are_refused_by_what_was_edited(half: TrainConfig, what: str) -> None:
    edit(half, what)
    with pytest.raises(CheckpointError, match=rf"last.pt: .*{what}.*--resume-edited"):
        read_last(half, load_images(half.data, half.seed))
    state = read_last(half, load_images(half.data, half.seed), edited=True)
    assert state is not None and len(state["edits"]) == 1


def test_lists_that_were_not_edited_or_whose_folder_was_named_are_the_same(half: TrainConfig) -> None:
    for root in (None, str(Path(half.output).parent / "data")):
        config = replace(half, data=replace(half.data, root=root))
        state = read_last(config, load_images(config.data, config.seed))
        assert state is not None and state["edits"] == {}


def test_lists_may_be_called_otherwise_and_the_whole_may_move(half: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(Path(half.output).parent, folder)
    (folder / "data" / "train.csv").rename(folder / "data" / "first.csv")
    lists = {"train_list": f"{folder}/data/first.csv", "train_csv": None, "val_csv": f"{folder}/data/val.csv"}
    config = replace(half, output=str(folder / "run"), data=replace(half.data, **lists))  # type: ignore[arg-type]
    state = read_last(config, load_images(config.data, config.seed))
    assert state is not None and state["edits"] == {}
    path = folder / "run" / "last.pt"
    save_checkpoint(path, {key: value for key, value in load_checkpoint(path).items() if key != "listed"})
    with pytest.raises(CheckpointError, match="was started with data.train_csv"):
        read_last(config, load_images(config.data, config.seed))


def test_a_run_that_moved_is_not_begun_again_where_it_was(
    half: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(half.output, tmp_path / "moved")
    for folder in (str(tmp_path / "moved"), "."):
        for resume in ("--resume", "--resume-edited"):
            with pytest.raises(SystemExit):
                parse_arguments([f"--config={folder}/config.yaml", resume])
            assert f"but beside the config file: expected --output {folder}" in capsys.readouterr().err
            assert parse_arguments([f"--config={folder}/config.yaml", resume, "--output", folder]).resume
        assert parse_arguments([f"--config={folder}/config.yaml", "--resume", "--output=new"]).config.output == "new"
        assert not parse_arguments(["--config", f"{folder}/config.yaml"]).resume
        monkeypatch.chdir(tmp_path / "moved")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", "config.yaml", "--resume"])


@pytest.mark.parametrize("frozen", [True, False])
def test_another_backbone_under_the_same_name(half: TrainConfig, tmp_path: Path, frozen: bool) -> None:
    """A head would go on with features of another network; a backbone that is trained is in the checkpoint."""
    torch.manual_seed(0)
    weights = Run(half, quiet).model.backbone.body.state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    model = replace(half.model, pretrained=str(tmp_path / "weights.pt"), train_backbone=not frozen)
    config = replace(half, model=model)
    path = Path(half.output) / "last.pt"
    save_checkpoint(path, {**load_checkpoint(path), "config": config.as_dict()})
    Run(config, quiet)._resume_state(edited=False)
    first = next(iter(weights))
    weights[first] = weights[first] + 1
    torch.save(weights, tmp_path / "weights.pt")
    run = Run(config, quiet)
    if not frozen:
        assert run._resume_state(edited=False) is not None
        return
    with pytest.raises(CheckpointError, match=rf"other weights of the backbone.*\(backbone.body.{first} is the first"):
        run._resume_state(edited=False)


@pytest.mark.parametrize("what", ["16 pictures are gone", "validation: 6 pictures are gone"])
def test_edited_lists_are_gone_on_with_when_asked(half: TrainConfig, what: str) -> None:
    edit(half, what)
    said: list[str] = []
    metrics = train(half, resume=True, say=said.append, edited=True)
    assert any(what.rpartition(": ")[2] in line for line in said)
    assert [(row["stage"], row["epoch"]) for row in metrics["history"]] == [("step1", 1), ("step1", 2), ("step2", 3)]
    last = load_checkpoint(Path(half.output) / "last.pt")
    steps = 1 if "16" in what else 3
    assert last["training"]["steps"] == steps and last["training"]["scheduler"]["last_epoch"] == steps
    content = load_checkpoint(Path(half.output) / "step1.pt")
    assert content["epoch"] == content["best"]["epoch"] and ("validation" not in what or content["epoch"] == 2)
    assert train(half, resume=True, say=quiet)["stages"] == metrics["stages"], "now it is this run's list"
    log = [json.loads(line) for line in (Path(half.output) / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in log].count("resume") == 2


def test_schedule_is_at_its_share_of_the_steps_that_there_are_now(half: TrainConfig) -> None:
    edit(half, "16 pictures are gone")
    stage: list[Stage] = []

    def seen(self: Run, training: Stage) -> None:
        stage.append(training)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_save_last", seen)
        with pytest.raises(KeyboardInterrupt):
            train(half, resume=True, say=quiet, edited=True)
    assert (stage[0].steps, stage[0].scheduler.last_epoch, stage[0].scheduler.total_steps) == (2, 2, 2)  # type: ignore
    assert {int(state["step"]) for state in stage[0].optimizer.state.values()} == {6}, "the moments are the old ones"


def test_checkpoints_of_before_know_no_lists(half: TrainConfig) -> None:
    path = Path(half.output) / "last.pt"
    save_checkpoint(path, {key: value for key, value in load_checkpoint(path).items() if key != "listed"})
    edit(half, "1 picture has other labels")
    state = read_last(half, load_images(half.data, half.seed))
    assert state is not None and state["edits"] == {}


def test_option() -> None:
    asked = parse_arguments(["--resume-edited"])
    assert asked.resume and asked.edited
    asked = parse_arguments(["--resume"])
    assert asked.resume and not asked.edited
