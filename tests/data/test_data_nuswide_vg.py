"""NUS-WIDE in both label layouts, and Visual Genome 500."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.data.nuswide import NusWideDataset  # noqa: E402
from sadcl.data.vg500 import VisualGenome500Dataset  # noqa: E402

CONCEPTS = [f"concept {chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(81)]
NAMES = ["actor\\0001_2124494179.jpg", "zebra fish\\0002_é.jpg", "actor\\0003_77.jpg", "sky\\0004_5.jpg"]


def nus(
    root: Path, layout: str, place: str = "Groundtruth", pictures: str = "Flickr", flat: bool = False
) -> torch.Tensor:
    """Four pictures a split, the third without a label; returns the labels [4, 81]."""
    labels = (torch.rand(4, 81, generator=torch.Generator().manual_seed(2)) < 0.1).int()
    labels[2] = 0
    (root / "ImageList").mkdir(parents=True, exist_ok=True)
    (root / place).mkdir(parents=True, exist_ok=True)
    for split in ("Train", "Test"):
        lines = "".join(f"{name} \r\n" for name in NAMES) + "\r\n"
        (root / "ImageList" / f"{split}Imagelist.txt").write_bytes(lines.encode())
        if layout == "table":
            rows = "".join(" ".join(map(str, row)) + " \r\n" for row in labels.tolist())
            (root / place / f"Labels_{split}.txt").write_bytes(rows.encode())
        else:
            for column, concept in enumerate(CONCEPTS):
                text = "".join(f"{value}\n" for value in labels[:, column].tolist())
                (root / place / f"Labels_{concept}_{split}.txt").write_text(text)
    for name in NAMES:
        path = root / pictures / (name.split("\\")[1] if flat else name.replace("\\", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", (6, 6)).save(path)
    return labels


def matrix(dataset: Any) -> torch.Tensor:
    return torch.stack([dataset.labels(i) for i in range(len(dataset))]).int()


@pytest.mark.parametrize("place", ["Groundtruth", "Groundtruth/TrainTestLabels"])
def test_both_label_layouts_agree(tmp_path: Path, place: str) -> None:
    labels = nus(tmp_path / "t", "table", place)
    nus(tmp_path / "f", "files", place)
    (tmp_path / "t" / "Concepts81.txt").write_bytes("\r\n".join(CONCEPTS).encode())
    table, files = (NusWideDataset(tmp_path / name, "train", 6) for name in "tf")
    assert table.classes == files.classes == tuple(CONCEPTS)
    assert torch.equal(matrix(table), matrix(files)) and torch.equal(matrix(table), labels[[0, 1, 3]])
    assert [Path(path).name for path in files.paths] == ["0001_2124494179.jpg", "0002_é.jpg", "0004_5.jpg"]
    assert table[0][0].shape == (3, 6, 6)


def test_pictures_without_a_label_are_dropped_and_counted(tmp_path: Path) -> None:
    nus(tmp_path, "files")
    dataset = NusWideDataset(tmp_path, "test", 6)
    assert dataset.dropped == {"without a label": 1} and "dropped: 1 images without a label" in dataset.summary()
    assert len(NusWideDataset(tmp_path, "test", 6, empty_images="keep")) == 4


def test_concept_file_and_given_classes_decide_the_order(tmp_path: Path) -> None:
    labels = nus(tmp_path, "files")
    (tmp_path / "ConceptsList").mkdir()
    (tmp_path / "ConceptsList" / "Concepts81.txt").write_text("\n".join(CONCEPTS[::-1]) + "\n")
    assert torch.equal(matrix(NusWideDataset(tmp_path, "train", 6)), labels[[0, 1, 3]].flip(1))
    dataset = NusWideDataset(tmp_path, "train", 6, CONCEPTS)
    assert dataset.classes == tuple(CONCEPTS) and torch.equal(matrix(dataset), labels[[0, 1, 3]])


def test_accents_in_the_form_of_another_system(tmp_path: Path) -> None:
    """Files of labels and pictures with decomposed names, lists with composed ones."""
    labels = nus(tmp_path, "files")
    names = ["concept é", *CONCEPTS[1:]]
    (tmp_path / "Concepts81.txt").write_text("\n".join(names))
    for split in ("Train", "Test"):
        file = tmp_path / "Groundtruth" / f"Labels_{CONCEPTS[0]}_{split}.txt"
        file.rename(file.with_name(f"Labels_concept e\u0301_{split}.txt"))
    picture = tmp_path / "Flickr" / "zebra fish" / "0002_é.jpg"
    picture.rename(picture.with_name("0002_e\u0301.jpg"))
    dataset = NusWideDataset(tmp_path, "train", 6)
    assert dataset.classes == tuple(names) and torch.equal(matrix(dataset), labels[[0, 1, 3]])


def test_columns_without_names_are_numbered_and_say_so(tmp_path: Path) -> None:
    nus(tmp_path, "table")
    dataset = NusWideDataset(tmp_path, "train", 6)
    assert dataset.classes[0] == "concept 01" and dataset.classes[80] == "concept 81"
    assert "Concepts81.txt" in dataset.summary()
    (tmp_path / "names.txt").write_text("\n".join(CONCEPTS))
    dataset = NusWideDataset(tmp_path, "train", 6, class_names=tmp_path / "names.txt")
    assert dataset.classes == tuple(CONCEPTS) and "Concepts81" not in dataset.summary()


@pytest.mark.parametrize("pictures", ["Flickr", "images", "."])
@pytest.mark.parametrize("flat", [False, True])
def test_pictures_are_found_where_people_have_them(tmp_path: Path, pictures: str, flat: bool) -> None:
    nus(tmp_path, "files", pictures=pictures, flat=flat)
    assert len(NusWideDataset(tmp_path, "train", 6)) == 3


@pytest.mark.parametrize("layout", ["table", "files"])
@pytest.mark.parametrize("wrong", ["2", "x", "", "1 1"])
def test_bad_label_lines_are_named(tmp_path: Path, layout: str, wrong: str) -> None:
    nus(tmp_path, layout)
    path = tmp_path / "Groundtruth" / ("Labels_Train.txt" if layout == "table" else f"Labels_{CONCEPTS[5]}_Train.txt")
    lines = path.read_text().splitlines()
    lines[1] = " ".join([wrong, *lines[1].split()[1:]])
    path.write_text("\n".join(lines))
    with pytest.raises(ImageFileError, match="line 2: expected") as caught:
        NusWideDataset(tmp_path, "train", 6)
    assert caught.value.path == path
    path.write_text("\n".join(lines[:1]))
    with pytest.raises(ImageFileError, match=r"a line for each of the 4 pictures of .*TrainImagelist.txt, got 1"):
        NusWideDataset(tmp_path, "train", 6)
    path.unlink()
    if layout == "table":
        with pytest.raises(ImageFileError, match="Labels_Train.txt: no such file of labels, nor one a concept"):
            NusWideDataset(tmp_path, "train", 6)
    else:
        (tmp_path / "Concepts81.txt").write_text("\n".join(CONCEPTS))
        with pytest.raises(ImageFileError, match=f"Labels_{CONCEPTS[5]}_Train.txt: no such file of labels"):
            NusWideDataset(tmp_path, "train", 6)


def test_missing_pictures_and_lists(tmp_path: Path) -> None:
    nus(tmp_path, "files")
    (tmp_path / "Flickr" / "sky" / "0004_5.jpg").unlink()
    with pytest.raises(
        ImageFileError, match=r"sky/0004_5.jpg: no such picture file \(line 4 of .*TrainImagelist.txt\)"
    ):
        NusWideDataset(tmp_path, "train", 6)
    dataset = NusWideDataset(tmp_path, "train", 6, missing_images="drop")
    assert dataset.dropped == {"without a label": 1, "whose file is missing": 1} and len(dataset) == 2
    path = tmp_path / "ImageList" / "TestImagelist.txt"
    path.write_text("a.jpg\n\nb.jpg\n")
    with pytest.raises(ImageFileError, match="TestImagelist.txt: line 2: no path"):
        NusWideDataset(tmp_path, "test", 6)
    path.unlink()
    with pytest.raises(ImageFileError, match="TestImagelist.txt: no such list"):
        NusWideDataset(tmp_path, "test", 6)


# -- Visual Genome 500 --

INDEX = {"1.jpg": [0, 499], "2 ö.jpg": [7], "2343729.jpg": [], "5.jpg": [3]}


def vg(root: Path) -> None:
    for folder, names in (("VG_100K", ["1.jpg", "2 ö.jpg"]), ("VG_100K_2", ["2343729.jpg", "5.jpg"])):
        (root / folder).mkdir(parents=True)
        for name in names:
            PIL.new("L", (6, 6), 9).save(root / folder / name)
    (root / "train_list_500.txt").write_bytes("1.jpg\r\n2343729.jpg\r\n2 ö.jpg".encode())
    (root / "test_list_500.txt").write_text("5.jpg\n")
    (root / "vg_category_500_labels_index.json").write_text(json.dumps(INDEX), encoding="utf-8")


def test_vg500(tmp_path: Path) -> None:
    vg(tmp_path)
    train, test = (VisualGenome500Dataset(tmp_path, split, 6) for split in ("train", "test"))
    assert train.positive == [(0, 499), (), (7,)] and test.positive == [(3,)]
    assert len(train.classes) == 500 and train.classes[7] == "category 007" and "category numbers" in train.summary()
    image, labels = train[1]
    assert image.shape == (3, 6, 6) and labels.shape == (500,)
    assert len(VisualGenome500Dataset(tmp_path, "train", 6, empty_images="drop")) == 2


def test_vg500_names(tmp_path: Path) -> None:
    vg(tmp_path)
    names = [f"thing {k}" for k in range(500)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    dataset = VisualGenome500Dataset(tmp_path, "train", 6, class_names=tmp_path / "names.txt")
    assert dataset.classes == tuple(names) and "category numbers" not in dataset.summary()
    turned = VisualGenome500Dataset(tmp_path, "train", 6, names[::-1], class_names=tmp_path / "names.txt")
    assert turned.positive == [(0, 499), (), (492,)]
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ImageFileError, match="names.txt: expected 500 class names, one a line, got 2"):
        VisualGenome500Dataset(tmp_path, "train", 6, class_names=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"1.jpg": [0, 500]}', r"'1.jpg': expected a list of indices from 0 to 499, got \[0, 500\]"),
        ('{"1.jpg": 3}', "'1.jpg': expected a list"),
        ('{"1.jpg": [true]}', "'1.jpg': expected a list"),
        ('{"1.jpg":\n [3}', "line 2, column 4: not JSON"),
        ("[]", "expected an object"),
        ('{"1.jpg": [3]}', r"no labels for '2343729.jpg' \(line 2 of .*train_list_500.txt\)"),
    ],
)
def test_vg500_mistakes_are_named(tmp_path: Path, index: str, message: str) -> None:
    vg(tmp_path)
    path = tmp_path / "vg_category_500_labels_index.json"
    path.write_text(index)
    with pytest.raises(ImageFileError, match=message) as caught:
        VisualGenome500Dataset(tmp_path, "train", 6)
    assert caught.value.path == path


def test_vg500_missing_picture(tmp_path: Path) -> None:
    vg(tmp_path)
    (tmp_path / "VG_100K_2" / "5.jpg").unlink()
    with pytest.raises(ImageFileError, match=r"VG_100K/5.jpg: no such picture file \(line 1 of .*test_list_500.txt\)"):
        VisualGenome500Dataset(tmp_path, "test", 6)
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        VisualGenome500Dataset(tmp_path, "val", 6)
