"""Data sets through `sadcl train` and `sadcl eval`: a COCO tree end to end, lists of every kind, VOC's server."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.checkpoint import load_checkpoint  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.data.scenes import SceneDataset  # noqa: E402
from sadcl.data.sources import Background, SceneSource  # noqa: E402
from sadcl.data.voc import VOC_CLASSES  # noqa: E402
from sadcl.model import SADCL  # noqa: E402
from sadcl.train.config import DataConfig, TrainConfig, check_config  # noqa: E402
from sadcl.train.data import as_features, load_images, load_validation, open_listing  # noqa: E402

TINY = (
    "plots: false\nbatch_size: 4\ncontrol: false\n"
    "model: {backbone: 'timm:test_resnet', pretrained: false, hidden_dim: 8, num_heads: 2, ffn_dim: 16, proj_dim: 4}\n"
    "step1: {epochs: 1}\nstep2: {epochs: 0}\n"
)
NAMES = {18: "dog", 1: "person", 44: "bottle"}


def coco_tree(root: Path, year: int = 2014) -> None:
    """Eight training and six validation images of three categories, listed in no order."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 6)):
        (root / f"{split}{year}").mkdir()
        images, annotations = [], []
        for number in range(count):
            name = f"COCO_{split}{year}_{number:012d}.jpg"
            Image.new("RGB", (70, 50), (30 * number, 90, 10)).save(root / f"{split}{year}" / name)
            images.insert(0, {"id": number, "file_name": name})
            for category in list(NAMES)[: number % 4]:
                annotations.append({"image_id": number, "category_id": category, "iscrowd": 0, "segmentation": [[1]]})
        categories = [{"id": key, "name": name} for key, name in NAMES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}{year}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a COCO tree and a run of one epoch on it."""
    folder = tmp_path_factory.mktemp("coco")
    coco_tree(folder / "coco")
    (folder / "config.yaml").write_text(
        TINY + f"data: {{source: coco2014, root: {folder}/coco, image_size: 64, workers: 0}}\n"
    )
    assert main(["train", "--config", str(folder / "config.yaml"), "--output", str(folder / "run")]) == 0
    return folder


def test_training_on_coco_measures_its_validation_side(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = load_checkpoint(trained / "run" / "step1.pt")
    assert content["classes"] == ["person", "dog", "bottle"]
    assert content["protocol"] == "the 6 pictures of COCO 2014 val"
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(trained / "run" / "step1.pt"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["images"] == "the 6 pictures of COCO 2014 val"
    assert measured["mAP"] == pytest.approx(metrics["mAP"], abs=1e-9)


def test_every_kind_of_list_measures_the_same(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO's own file, and the same pictures as CSV and JSON lines, in other class orders than the checkpoint's."""
    root = trained / "coco" / "val2014"
    labels = {f"COCO_val2014_{n:012d}.jpg": list(NAMES.values())[: n % 4] for n in range(6)}
    (root / "l.csv").write_text("".join(f"{name},{';'.join(names)}\n" for name, names in labels.items()))
    rows = [json.dumps({"path": name, "labels": names}) for name, names in reversed(labels.items())]
    (trained / "l.jsonl").write_text("\n".join(rows))
    figures = []
    for options in (
        [],
        ["--csv", str(root / "l.csv")],
        ["--jsonl", str(trained / "l.jsonl"), "--root", str(root)],
        ["--coco-json", str(trained / "coco/annotations/instances_val2014.json"), "--root", str(root)],
    ):
        capsys.readouterr()
        assert main(["eval", str(trained / "run" / "step1.pt"), "--json", *options]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for result in figures[1:]:
        assert result["num_images"] == 6 and result["mAP"] == pytest.approx(figures[0]["mAP"])
        assert result["ap"] == pytest.approx(figures[0]["ap"]) and result["OF1"] == pytest.approx(figures[0]["OF1"])
    assert main(["eval", str(trained / "run" / "step1.pt"), "--jsonl", str(trained / "l.jsonl")]) == 2
    assert "no such picture file (line 1 of" in capsys.readouterr().err


def test_summary_of_both_sides(trained: Path) -> None:
    images = load_images(DataConfig(source="coco2014", root=str(trained / "coco")), 0)
    lines = images.summary().splitlines()
    assert lines[0].startswith("training: COCO 2014 train: 8 images, 3 labels, 1.50 labels an image")
    assert lines[1].strip() == "images a label: dog 6, person 4, bottle 2"
    assert any(line.startswith("validation: COCO 2014 val: 6 images") for line in lines)


def test_voc_is_measured_where_it_has_labels_and_archived_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for sub in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True)
    for split, start in (("train", 0), ("val", 4), ("test", 8)):
        ids = [f"2008_{start + k:06d}" for k in range(4)]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for k, identity in enumerate(ids):
            Image.new("RGB", (40, 60), (60 * k, 9, 9)).save(folder / "JPEGImages" / f"{identity}.jpg")
            text = f"<annotation><object><name>{VOC_CLASSES[k]}</name></object></annotation>"
            if split != "test":
                (folder / "Annotations" / f"{identity}.xml").write_text(text)
    (tmp_path / "c.yaml").write_text(
        TINY + f"data: {{source: voc2012, root: {tmp_path}, image_size: 64, workers: 0}}\noutput: {tmp_path}/run\n"
    )
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    capsys.readouterr()
    archive = tmp_path / "results.tar.gz"
    assert main(["eval", str(tmp_path / "run" / "step1.pt"), "--voc-archive", str(archive)]) == 0
    assert "4 pictures, competition comp1" in capsys.readouterr().out
    with tarfile.open(archive) as content:
        file = content.extractfile("results/VOC2012/Main/comp1_cls_test_aeroplane.txt")
        assert file is not None
        assert [line.split()[0] for line in file.read().decode().splitlines()] == [
            f"2008_{8 + k:06d}" for k in range(4)
        ]
    for side, message in (("val", "no annotations to measure on"), ("train", "no annotations to train on")):
        assert main(["train", "--config", str(tmp_path / "c.yaml"), f"--data.{side}_list=test"]) == 2
        assert message in capsys.readouterr().err


def test_lists_take_folders_of_their_own(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / side / f"{side}.png")
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({"path": f"{side}.png", "labels": ["x", side]}))
    lists = {"train_list": str(tmp_path / "a.jsonl"), "val_list": str(tmp_path / "b.jsonl")}
    config = DataConfig(source="jsonl", **lists, train_folder=str(tmp_path / "a"), val_folder=str(tmp_path / "b"))
    assert open_listing(config, "train", None).classes == ("a", "x")
    val, classes, about = load_validation(config, 0, ("x", "b", "unused"))
    assert classes == ("x", "b", "unused") and val[0][1].tolist() == [1, 1, 0] and about.endswith("b.jsonl")
    with pytest.raises(ValueError, match="label 'b' is not one of the classes: a, x"):
        load_images(config, 0)


def test_edited_list_is_noticed_by_the_feature_cache(trained: Path) -> None:
    """Same path, other labels: the cached feature maps must not be used again."""
    path = trained / "edited.csv"
    config = ["train", "--config", str(trained / "config.yaml"), "--data.source=csv", "--output", str(trained / "r2")]
    config += [f"--data.train_csv={path}", f"--data.val_csv={path}", f"--data.root={trained}/coco/val2014"]
    caches = []
    for label in ("dog", "dog;person"):
        names = [f"COCO_val2014_{n:012d}.jpg,{label if n else 'person;dog'}\n" for n in range(6)]
        path.write_text("".join(names))
        assert main(config) == 0
        caches.append(sorted((trained / "r2" / "features").glob("train.*")))
    assert len(caches[0]) == 1 and len(caches[1]) == 2


def feature_model(seed: int = 0) -> SADCL:
    torch.manual_seed(seed)
    return SADCL(2, "timm:test_resnet", image_size=32, hidden_dim=8, num_heads=2, ffn_dim=16)


def test_kept_features_are_of_these_pictures_this_backbone_and_this_preprocessing(tmp_path: Path) -> None:
    """Pictures replaced under their names, a link switched, one cut off; statistics of a backbone; colours scaled."""
    for number, name in enumerate(("a.png", "b.png", "c.png", "other.png")):
        Image.new("RGB", (40, 40), (60 * number, 200, 9)).save(tmp_path / name)
        os.utime(tmp_path / name, ns=(1, 1))
    (tmp_path / "link.png").symlink_to("c.png")
    (tmp_path / "t.csv").write_text("a.png,x\nb.png,y\nlink.png,x;y\n")
    (tmp_path / "v.csv").write_text("b.png,y\n")
    lists = {"train_csv": str(tmp_path / "t.csv"), "val_csv": str(tmp_path / "v.csv")}
    config = TrainConfig(data=DataConfig("csv", **lists, image_size=32, workers=0))
    progress = lambda name: iter_batches  # noqa: E731
    made: list[int] = []

    def iter_batches(batches: Any) -> Any:
        made.append(1)
        return batches

    def features(model: SADCL | None = None) -> list[int]:
        """Which sides were computed anew (training, validation); checks the training side against a fresh one."""
        model, images = model or feature_model(), load_images(config.data, 0)
        made.clear()
        sides = as_features(images, model, config, tmp_path / "kept", torch.device("cpu"), progress)
        count = len(made)
        fresh = as_features(
            images, model, config, tmp_path / f"f{len(list(tmp_path.iterdir()))}", torch.device("cpu"), progress
        )
        for side, other in zip(sides, fresh, strict=True):
            assert all(torch.equal(x, y) for (x, _), (y, _) in zip(side, other, strict=True))
        return count

    def replace_picture(name: str) -> None:
        Image.new("RGB", (40, 40), (9, 9, 200)).save(tmp_path / name)

    def switch_link() -> None:
        (tmp_path / "link.png").unlink()
        (tmp_path / "link.png").symlink_to("other.png")

    assert features() == 2 and features() == 0
    replace_picture("a.png")
    assert features() == 1 and features() == 0
    switch_link()
    assert features() == 1
    replace_picture("b.png")
    assert features() == 2, "it is on both sides"
    assert features(feature_model(1)) == 2, "other weights"
    model = feature_model()
    next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean.add_(0.5)
    assert features(model) == 2, "other statistics, the same parameters"
    model = feature_model()
    model.backbone.preprocessing = dataclasses.replace(model.preprocessing, mean=(0.1, 0.2, 0.3))
    assert features(model) == 2 and features() == 0
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageFileError, match="a.png: "):
        features()


def test_scenes_are_stamped_by_what_they_are_made_of(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (200, 0, 0, 255)).save(tmp_path / "o.png")
    Image.new("RGB", (90, 90)).save(tmp_path / "b.jpg")
    objects = (((tmp_path / "o.png",),),)
    source = SceneSource("photos", "", ("red",), objects, (Background(tmp_path / "b.jpg"),), ((0,),))
    first = SceneDataset(source, 2, 0, 32).stamp()
    assert SceneDataset(source, 5, 1, 32).stamp() == first
    for name, mode in (("o.png", "RGBA"), ("b.jpg", "RGB")):
        Image.new(mode, (50, 50), (9, 99, 9)).save(tmp_path / name)
        assert SceneDataset(source, 2, 0, 32).stamp() != first
        first = SceneDataset(source, 2, 0, 32).stamp()


@pytest.mark.parametrize("shared", ["a.png", "./a.png", "../pictures/a.png", "link.png"])
def test_pictures_on_both_sides_are_said(tmp_path: Path, shared: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "link.png").symlink_to("a.png")
    (folder / "t.csv").write_text("a.png,x\nb.png,y\n")
    (folder / "v.csv").write_text(f"c.png,x\n{shared},y\n")
    config = DataConfig("csv", train_csv=str(folder / "t.csv"), val_csv=str(folder / "v.csv"))
    last = load_images(config, 0).summary().splitlines()[-1]
    assert last == f"1 of the 2 validation pictures are also training pictures ({folder}/{shared})"
    (folder / "v.csv").write_text("c.png,x\n")
    assert "also" not in load_images(config, 0).summary()


def test_settings_of_lists_reach_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The separator, the order of the classes and the range of the pixels, in training, eval and predict."""
    for number in range(4):
        Image.fromarray(np.full((40, 40), 1000 * number, np.uint16)).save(tmp_path / f"{number}.png")
    (tmp_path / "l.csv").write_text("path,labels\n0.png,cat dog\n1.png,dog\n2.png,cat\n3.png,\n")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    lists = [f"--data.{side}_csv={tmp_path}/l.csv" for side in ("train", "val")]
    run = ["train", "--config", str(trained / "config.yaml"), "--data.source=csv", "--data.root=null", *lists]
    run += ["--output", str(tmp_path / "run")]
    assert main(run) == 2
    assert "label 'cat dog' looks like several, 'cat', 'dog'; set label_separator" in capsys.readouterr().err
    run += ["--data.label_separator=space", f"--data.class_names={tmp_path}/names.txt"]
    assert main(run) == 2
    assert "0.png" not in (err := capsys.readouterr().err) and "set pixel_range (--data.pixel_range) to" in err
    with pytest.raises(SystemExit):
        main([*run, "--data.pixel_range=[4095, 0]"])
    assert "data.pixel_range: expected two numbers, the lower first" in capsys.readouterr().err
    assert main([*run, "--data.pixel_range=[0, 4095]"]) == 0
    content = load_checkpoint(tmp_path / "run" / "step1.pt")
    assert content["classes"] == ["dog", "cat"] and content["config"]["data"]["pixel_range"] == [0, 4095]
    (tmp_path / "e.csv").write_text("0.png,cat|dog\n1.png,dog\n2.png,cat\n3.png,\n")
    capsys.readouterr()
    figures = []
    for options in (
        [],
        ["--csv", str(tmp_path / "l.csv")],
        ["--csv", str(tmp_path / "e.csv"), "--label-separator", "|"],
    ):
        assert main(["eval", str(tmp_path / "run" / "step1.pt"), "--json", *options]) == 0
        figures.append(json.loads(capsys.readouterr().out)["mAP"])
    assert figures[0] == figures[1] == figures[2]
    assert main(["eval", str(tmp_path / "run" / "step1.pt"), "--csv", str(tmp_path / "e.csv")]) == 2
    assert "label 'cat|dog' is not one of the classes" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run" / "step1.pt"), str(tmp_path / "3.png"), "--json"]) == 0


def test_training_with_labels_that_are_not_known(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with -1 and blanks: trained, measured and reported without them, in both steps."""
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 9, 9)).save(tmp_path / f"{number}.png")
    rows = [
        "path,cat,dog,yak",
        "0.png,1,0,-1",
        "1.png,0,1,",
        "2.png,1,,0",
        "3.png,-1,1,1",
        "4.png,0,0,1",
        "5.png,1,1,0",
    ]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    lists = [f"--data.{side}_csv={tmp_path}/l.csv" for side in ("train", "val")]
    run = ["train", "--config", str(trained / "config.yaml"), "--data.source=csv", "--data.root=null", *lists]
    run += ["--output", str(tmp_path / "run"), "--step2.epochs=1", "--control=true", "--plots=true"]
    assert main(run) == 0
    printed = capsys.readouterr()
    assert "ignored: 4 labels of 4 images" in printed.out + printed.err
    chance = (3 / 5 + 3 / 5 + 2 / 4) / 3
    assert f"chance level: {chance:.3f}" in printed.out + printed.err
    assert main([*run, "--dry-run"]) == 0
    assert "ignored: 4 labels of 4 images" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["mAP"] <= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig("jsonl", train_list="a"), "data.source jsonl needs data.train_list and data.val_list"),
        (DataConfig("csv", val_csv="a"), "data.source csv needs data.train_csv and data.val_csv"),
        (DataConfig("vg500"), "data.source vg500 needs data.root"),
        (DataConfig("coco2017", root="x", val_list="a"), "data.val_list has no meaning with data.source coco2017"),
        (DataConfig(train_csv="mine.csv"), "data.train_csv has no meaning with data.source auto; expected one of csv"),
    ],
)
def test_configs_that_cannot_run_are_refused(data: DataConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(TrainConfig(data=data))


def test_configs_that_can_run() -> None:
    for data in (
        DataConfig("csv", train_list="a", val_list="b"),
        DataConfig("voc2012", root="x", train_list="trainval", val_list="val"),
        DataConfig("nuswide", root="x", empty_images="keep"),
    ):
        check_config(TrainConfig(data=data))
    assert DataConfig("voc2007").list_of("val") == "test" and DataConfig("csv", val_csv="b").list_of("val") == "b"
