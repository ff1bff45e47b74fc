"""Data sets through `sadcl train` and `sadcl eval`: a COCO tree end to end, lists of every kind, VOC's server."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.checkpoint import load_checkpoint  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.data.voc import VOC_CLASSES  # noqa: E402
from sadcl.train.config import DataConfig, TrainConfig, check_config  # noqa: E402
from sadcl.train.data import load_images, load_validation, open_listing  # noqa: E402

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
        caches.append(sorted((trained / "r2" / "features").glob("train.*.labels.npy")))
    assert len(caches[0]) == 1 and len(caches[1]) == 2


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
