"""COCO's format: sparse and unsorted ids, crowds, unlabelled images, damaged files; the data set's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.coco import CocoDataset, coco  # noqa: E402
from sadcl.data.images import ImageFileError  # noqa: E402

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def instances(**changes: Any) -> dict[str, Any]:
    """Three images; the second has a crowd and two objects of a class, the third has nothing."""
    polygon = {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "area": 3.5, "bbox": [0, 0, 1, 1]}
    crowd = {"segmentation": {"counts": [3, 4], "size": [10, 8]}, "area": 9, "bbox": [0, 0, 4, 4]}
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [
            {"id": 458755, "file_name": "COCO_train2014_000000458755.jpg", "width": 8, "height": 10},
            {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 8, "height": 10},
            {"id": 42, "file_name": "sub/räksmörgås 42.jpg", "width": 8, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "iscrowd": 0, **polygon},
            {"id": 2, "image_id": 458755, "category_id": 13, "iscrowd": 0, **polygon},
            {"id": 3, "image_id": 9, "category_id": 90, "iscrowd": 0, **polygon},
            {"id": 4, "image_id": 9, "category_id": 1, "iscrowd": 1, **crowd},
        ],
        "categories": CATEGORIES,
        **changes,
    }


def tree(root: Path, content: dict[str, Any], year: int = 2014, split: str = "train") -> Path:
    for item in content["images"]:
        path = root / f"{split}{year}" / item["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", (8, 10), (item["id"] % 256, 0, 0)).save(path)
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{split}{year}.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(("year", "split"), [(2014, "train"), (2014, "val"), (2017, "train"), (2017, "val")])
def test_labels_in_the_order_of_category_ids(tmp_path: Path, year: int, split: str) -> None:
    tree(tmp_path, instances(), year, split)
    dataset = coco(tmp_path, year, split, 8)
    assert dataset.classes == ("person", "stop sign", "toothbrush")
    assert [row.tolist() for _, row in dataset] == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert [Path(path).name for path in dataset.paths] == [
        "COCO_train2014_000000458755.jpg",
        "COCO_train2014_000000000009.jpg",
        "räksmörgås 42.jpg",
    ]
    assert dataset.summary().startswith(f"COCO {year} {split}: 3 images, 3 labels, 1.00 labels an image")


def test_unlabelled_images_are_kept_unless_told(tmp_path: Path) -> None:
    tree(tmp_path, instances())
    assert len(coco(tmp_path, 2014, "train", 8)) == 3
    dropped = coco(tmp_path, 2014, "train", 8, empty_images="drop")
    assert len(dropped) == 2 and dropped.dropped == {"without a label": 1}


def test_given_classes_decide_the_order_and_must_cover_what_is_annotated(tmp_path: Path) -> None:
    path = tree(tmp_path, instances())
    root = tmp_path / "train2014"
    dataset = CocoDataset(path, 8, ("toothbrush", "person", "unicorn", "stop sign"), root=root)
    assert [row.tolist() for _, row in dataset] == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"json: label '.*' is not one of the classes: person"):
        CocoDataset(path, 8, ("person",), root=root)
    path = tree(tmp_path, instances(annotations=[]))
    assert len(CocoDataset(path, 8, ("person",), root=root)) == 3, "categories that no image has may be others"


def test_folder_with_its_json_beside_the_pictures(tmp_path: Path) -> None:
    content = instances(images=[{"id": 0, "file_name": "a b.png"}], annotations=[{"image_id": 0, "category_id": 1}])
    PIL.new("RGB", (8, 10)).save(tmp_path / "a b.png")
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8-sig")
    dataset = CocoDataset(tmp_path / "_annotations.coco.json", 8)
    assert dataset[0][1].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "a list 'images'"),
        ({"categories": {}}, "a list 'categories'"),
        ({"images": [{"id": 3}]}, r"images\[0\]: expected id and file_name, got {'id': 3}"),
        ({"annotations": [{"image_id": 9, "category_id": 2}]}, r"annotations\[0\]: no category has the id 2"),
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, r"annotations\[0\]: no image has the id 8"),
        ({"annotations": [{"image_id": 9}]}, r"annotations\[0\]: expected image_id and category_id"),
        ({"images": [{"id": 9, "file_name": "a"}, {"id": 9, "file_name": "b"}]}, "two images have the id 9"),
        ({"categories": [*CATEGORIES, {"id": 1, "name": "x"}]}, "two categories have the id 1"),
        ({"categories": [*CATEGORIES, {"id": 2, "name": "person"}]}, "class 'person' occurs twice"),
    ],
)
def test_mistakes_in_the_json_name_the_file_and_the_item(tmp_path: Path, changes: dict, message: str) -> None:
    tree(tmp_path, instances())
    path = tmp_path / "annotations" / "instances_train2014.json"
    path.write_text(json.dumps(instances(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        coco(tmp_path, 2014, "train", 8)
    assert str(caught.value).startswith(str(path))


def test_files_that_are_no_json_or_not_there(tmp_path: Path) -> None:
    path = tree(tmp_path, instances())
    whole = json.dumps(instances(), indent=1)
    path.write_text(whole[: whole.index("annotations") + 20])
    lines = path.read_text().count("\n") + 1
    with pytest.raises(ImageFileError, match=rf"instances_train2014.json: line {lines}, column \d+: not JSON"):
        coco(tmp_path, 2014, "train", 8)
    path.write_bytes(b'{"images": ["\xff"]}')
    with pytest.raises(ImageFileError, match=r"line 1: not UTF-8 \(invalid start byte, byte 13\)"):
        coco(tmp_path, 2014, "train", 8)
    path.write_text("[1, 2]")
    with pytest.raises(ImageFileError, match="a list 'images'"):
        coco(tmp_path, 2014, "train", 8)
    with pytest.raises(ImageFileError, match=r"instances_val2014.json: no such annotation file"):
        coco(tmp_path, 2014, "val", 8)


def test_missing_image_names_the_annotation_file(tmp_path: Path) -> None:
    path = tree(tmp_path, instances())
    (tmp_path / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    with pytest.raises(ImageFileError, match=r"000000000009.jpg: no such picture file \(image id 9 of") as caught:
        coco(tmp_path, 2014, "train", 8)
    assert str(path) in str(caught.value)
    assert len(coco(tmp_path, 2014, "train", 8, missing_images="drop")) == 2


# -- as annotation tools write it --


def small(**changes: Any) -> dict[str, Any]:
    """Two images, a root category "sea" above "fish" and "trap"."""
    return {
        "images": [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": 2}],
        "categories": [
            {"id": 0, "name": "sea", "supercategory": "none"},
            {"id": 1, "name": "fish", "supercategory": "sea"},
            {"id": 2, "name": "trap", "supercategory": "sea"},
        ],
        **changes,
    }


def dataset_of(folder: Path, content: dict[str, Any], **options: Any) -> CocoDataset:
    for name in ("0.png", "1.png", "sub/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.new("RGB", (4, 4)).save(folder / name)
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder / "a.json", 8, **options)


def matrix(dataset: CocoDataset) -> list[list[float]]:
    return [dataset.labels(i).tolist() for i in range(len(dataset))]


def categories(root: str, **of_root: Any) -> list[dict[str, Any]]:
    children = [{"id": i, "name": name, "supercategory": root} for i, name in ((1, "fish"), (2, "trap"))]
    return [{"id": 0, "name": root, **of_root}, *children]


@pytest.mark.parametrize("root", ["sea", "fish", "trap"])
@pytest.mark.parametrize("above", [{"supercategory": x} for x in ("none", "None", "null", "", None)] + [{}])
def test_a_root_above_the_others_is_no_class(tmp_path: Path, root: str, above: dict[str, Any]) -> None:
    """Also where it is called like one of them."""
    dataset = dataset_of(tmp_path, small(categories=categories(root, **above)))
    assert dataset.classes == ("fish", "trap") and matrix(dataset) == [[1, 0], [0, 1]]
    assert f"no class: category {root!r}, the parent of others" in dataset.summary()
    written = [{**categories(root)[0], "name": f" {root.title()}", **above}, *categories(root)[1:]]
    assert dataset_of(tmp_path, small(categories=written)).classes == ("fish", "trap")


def test_a_category_above_others_that_is_annotated_or_has_a_parent_is_a_class(tmp_path: Path) -> None:
    annotated = [{"image_id": 0, "category_id": 0}]
    assert dataset_of(tmp_path, small(annotations=annotated)).classes == ("sea", "fish", "trap")
    below = categories("sea", supercategory="water")
    assert dataset_of(tmp_path, small(categories=below)).classes == ("sea", "fish", "trap")
    alone = [{"id": i, "name": n, "supercategory": n} for i, n in ((1, "fish"), (2, "trap"), (3, "person"))]
    assert dataset_of(tmp_path, small(categories=alone)).classes == ("fish", "trap", "person")


@pytest.mark.parametrize("image_id", [float, str, lambda i: f"{i}.0", lambda i: f" {i} "])
@pytest.mark.parametrize("category_id", [int, float, str])
def test_identifiers_of_any_type(tmp_path: Path, image_id: Any, category_id: Any) -> None:
    annotations = [{"image_id": image_id(i), "category_id": category_id(i + 1)} for i in range(2)]
    dataset = dataset_of(tmp_path, small(annotations=annotations))
    assert matrix(dataset) == [[1, 0], [0, 1]]
    images = [{"id": image_id(i), "file_name": f"{i}.png"} for i in range(2)]
    assert matrix(dataset_of(tmp_path, small(images=images))) == [[1, 0], [0, 1]]


def test_identifiers_in_numeric_order(tmp_path: Path) -> None:
    content = small(categories=[{"id": str(i), "name": f"c{i}"} for i in (10, 9, 2, 1)])
    assert dataset_of(tmp_path, content).classes == ("c1", "c2", "c9", "c10")
    words = [{"id": name, "name": name} for name in ("b", "007", "7")]
    content = small(categories=words, annotations=[{"image_id": 0, "category_id": "007"}])
    assert dataset_of(tmp_path, content).classes == ("7", "007", "b")


@pytest.mark.parametrize("wrong", [True, None, 1.5, float("nan"), [1]])
def test_what_is_no_identifier_is_named(tmp_path: Path, wrong: Any) -> None:
    for name, key in (("images", "id"), ("annotations", "category_id"), ("categories", "id")):
        items = small()[name]
        items[1][key] = wrong
        with pytest.raises(ImageFileError, match=rf"{name}\[1\]: expected .*{key}"):
            dataset_of(tmp_path, small(**{name: items}))


def test_backslashes_and_one_file_under_two_ids(tmp_path: Path) -> None:
    images = [{"id": 0, "file_name": "sub\\0.png"}, {"id": 1, "file_name": "./sub/0.png"}]
    dataset = dataset_of(tmp_path, small(images=images))
    assert matrix(dataset) == [[1, 1]] and "listed more than once" in dataset.summary()


def test_annotations_of_removed_images_are_counted(tmp_path: Path) -> None:
    strays = [{"image_id": 77, "category_id": 1}, {"image_id": "x", "category_id": 2}]
    dataset = dataset_of(tmp_path, small(annotations=[*strays, *small()["annotations"]]))
    assert matrix(dataset) == [[1, 0], [0, 1]]
    assert "passed over: 2 annotations of images that are not listed" in dataset.summary()
    with pytest.raises(ImageFileError, match=r"annotations\[0\]: no image has the id 77"):
        dataset_of(tmp_path, small(annotations=strays))


def test_categories_listed_twice(tmp_path: Path) -> None:
    twice = [*small()["categories"], {"id": 1, "name": "fish", "supercategory": "sea"}]
    assert dataset_of(tmp_path, small(categories=twice)).classes == ("fish", "trap")
    with pytest.raises(ImageFileError, match="two categories have the id 1: 'fish' and 'eel'"):
        dataset_of(tmp_path, small(categories=[*small()["categories"], {"id": 1, "name": "eel"}]))
    with pytest.raises(ValueError, match="class 'fish' occurs twice"):
        dataset_of(tmp_path, small(categories=[*small()["categories"], {"id": 3, "name": "fish"}]))


def test_a_file_without_annotations_has_no_known_label(tmp_path: Path) -> None:
    content = small()
    del content["annotations"]
    dataset = dataset_of(tmp_path, content, classes=("fish", "trap"), empty_images="drop")
    assert matrix(dataset) == [[-1, -1], [-1, -1]] and not dataset.annotated
    assert "no annotations: nothing can be measured here" in dataset.summary()
    assert matrix(dataset_of(tmp_path, small(annotations=None))) == [[-1, -1], [-1, -1]]
    assert dataset_of(tmp_path, small(annotations=[])).annotated, "none among them is another matter"


def lvis(**keys: Any) -> dict[str, Any]:
    """Three categories, of which each image was searched for some."""
    looked = [([2], []), ([], [1])]
    images = [
        {
            "id": i,
            "neg_category_ids": negative,
            "not_exhaustive_category_ids": some,
            **{k: v(i) for k, v in keys.items()},
        }
        for i, (negative, some) in enumerate(looked)
    ]
    names = [{"id": i, "name": n} for i, n in ((1, "cat"), (2, "dog"), (3, "yak"))]
    annotations = [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": 1}]
    return {"images": images, "annotations": annotations, "categories": names}


def test_lvis_says_what_is_absent(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, lvis(file_name=lambda i: f"{i}.png"))
    assert matrix(dataset) == [[1, 0, -1], [1, -1, -1]] and dataset.annotated
    assert "ignored: 3 labels of 2 images, not known to be there or absent" in dataset.summary()
    other = lvis(file_name=lambda i: f"{i}.png")
    other["images"][1]["neg_category_ids"] = [3]
    assert dataset_of(tmp_path, other).fingerprint() != dataset.fingerprint()
    other["images"][1]["file_name"] = "0.png"  # the same picture twice: each knows a part
    assert matrix(dataset_of(tmp_path, other)) == [[1, 0, 0]]


@pytest.mark.parametrize("inside", ["sub", "elsewhere"])
def test_lvis_names_pictures_by_their_address(tmp_path: Path, inside: str) -> None:
    content = lvis(coco_url=lambda i: f"http://images.org/{inside}/0.png", file_name=lambda _: None)
    (dataset_path,) = dataset_of(tmp_path, content).paths
    assert Path(dataset_path) == tmp_path / ("sub/0.png" if inside == "sub" else "0.png")
