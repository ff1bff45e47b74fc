"""VOC: difficult objects, objects' parts, CRLF lists, the test set without annotations, the server's archive."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.data.voc import VOC_CLASSES, VocDataset, write_voc_results  # noqa: E402

PARTS = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"


def objects(*items: str) -> str:
    """Annotation with objects "dog", "dog?" (difficult) or "dog." (no <difficult> at all)."""
    written = []
    for item in items:
        flag = "" if item.endswith(".") else f"<difficult>{int(item.endswith('?'))}</difficult>"
        written.append(f"<object>\n<name>{item.rstrip('?.')}</name>{flag}{PARTS}</object>")
    return f"<annotation><folder>VOC</folder><size><width>8</width></size>{''.join(written)}</annotation>"


def tree(root: Path, year: int, splits: dict[str, dict[str, str | None]]) -> Path:
    """``splits``: list -> image id -> annotation (None: no file)."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for sub in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_bytes("\r\n".join([*images, "", ""]).encode())
        for identity, annotation in images.items():
            PIL.new("RGB", (8, 10)).save(folder / "JPEGImages" / f"{identity}.jpg")
            if annotation is not None:
                (folder / "Annotations" / f"{identity}.xml").write_text(annotation)
    return folder


TRAINVAL = {
    "000005": objects("person", "dog?", "dog"),
    "000007": objects("car?", "person."),
    "2008_000 ü": objects("sheep?"),
}


def named(dataset: VocDataset) -> list[dict[str, float]]:
    return [{n: v for n, v in zip(dataset.classes, row.tolist(), strict=True) if v} for _, row in dataset]


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_difficult_objects_are_no_positives(tmp_path: Path, inside: str) -> None:
    tree(tmp_path, 2007, {"trainval": TRAINVAL})
    dataset = VocDataset(tmp_path / inside, 2007, "trainval", 8)
    assert dataset.classes == VOC_CLASSES and len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert named(dataset) == [{"person": 1, "dog": 1}, {"person": 1}, {}]
    assert dataset.ids == list(TRAINVAL) and dataset.annotated


def test_difficult_objects_can_be_ignored_as_in_vocs_own_evaluation(tmp_path: Path) -> None:
    tree(tmp_path, 2007, {"trainval": TRAINVAL})
    dataset = VocDataset(tmp_path, 2007, "trainval", 8, difficult="ignored")
    assert named(dataset) == [{"person": 1, "dog": 1}, {"person": 1, "car": -1}, {"sheep": -1}]
    assert "ignored: 2 labels of 2 images" in dataset.summary()
    with pytest.raises(ValueError, match="difficult: expected 'negative' or 'ignored', got 'positive'"):
        VocDataset(tmp_path, 2007, "trainval", 8, difficult="positive")  # type: ignore[arg-type]


def test_classes_in_another_order(tmp_path: Path) -> None:
    tree(tmp_path, 2012, {"train": TRAINVAL})
    dataset = VocDataset(tmp_path, 2012, "train", 8, VOC_CLASSES[::-1])
    assert named(dataset) == [{"person": 1, "dog": 1}, {"person": 1}, {}]
    with pytest.raises(ValueError, match=r"000005.xml: label 'person' is not one of the classes: cat, dog"):
        VocDataset(tmp_path, 2012, "train", 8, ("cat", "dog"))


def test_split_without_annotations_is_ignored_throughout(tmp_path: Path) -> None:
    tree(tmp_path, 2012, {"train": TRAINVAL, "test": {"2008_000001": None, "2008_000004": None}})
    dataset = VocDataset(tmp_path, 2012, "test", 8, empty_images="drop")
    assert not dataset.annotated and dataset.ids == ["2008_000001", "2008_000004"]
    assert all(bool((row == -1).all()) for _, row in dataset)
    assert "no annotations" in dataset.summary()


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("<annotation><object>", r"000005.xml: not XML \(.*line 1, column"),
        (objects(""), "000005.xml: an object has no name"),
        ("<html><body>404</body></html>", "000005.xml: expected an <annotation>, got <html>"),
        (objects("dog").upper(), "000005.xml: expected an <annotation>, got <ANNOTATION>"),
        (objects("dragon"), "000005.xml: label 'dragon' is not one of the classes"),
        (None, r"000005.xml: no such annotation file \(line 1 of .*trainval.txt\)"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, annotation: str | None, message: str) -> None:
    tree(tmp_path, 2007, {"trainval": {**TRAINVAL, "000005": annotation}})
    with pytest.raises(ValueError, match=message):
        VocDataset(tmp_path, 2007, "trainval", 8)


def test_missing_files_name_the_list(tmp_path: Path) -> None:
    folder = tree(tmp_path, 2007, {"trainval": TRAINVAL})
    (folder / "JPEGImages" / "000007.jpg").unlink()
    with pytest.raises(ImageFileError, match=r"000007.jpg: no such picture file \(line 2 of .*trainval.txt\)"):
        VocDataset(tmp_path, 2007, "trainval", 8)
    with pytest.raises(ImageFileError, match="test.txt: no such list of pictures"):
        VocDataset(tmp_path, 2007, "test", 8)
    with pytest.raises(ImageFileError, match="expected VOCdevkit/VOC2012 with"):
        VocDataset(tmp_path, 2012, "train", 8)


@pytest.mark.parametrize("competition", [1, 2])
def test_archive_reads_back(tmp_path: Path, competition: int) -> None:
    ids = ["2008_000001", "2008_000004", "2008_000010"]
    scores = torch.randn(3, 20, dtype=torch.float32) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    classes = VOC_CLASSES[::-1]
    path = write_voc_results(tmp_path / "r.tar.gz", ids, scores, classes=classes, competition=competition)
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        assert set(members) == {f"results/VOC2012/Main/comp{competition}_cls_test_{name}.txt" for name in VOC_CLASSES}
        for column, name in enumerate(classes):
            file = members[f"results/VOC2012/Main/comp{competition}_cls_test_{name}.txt"]
            assert file is not None
            lines = [line.split(" ") for line in file.read().decode("ascii").splitlines()]
            assert [identity for identity, _ in lines] == ids
            assert torch.equal(torch.tensor([float(score) for _, score in lines]), scores[:, column])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 19)}, r"scores: expected shape \[2, 20\], got \[2, 19\]"),
        ({"scores": torch.full((2, 20), float("nan"))}, "scores: expected finite values"),
        ({"competition": 3}, "competition: expected 1 or 2, got 3"),
        ({"classes": ("cat",) * 20}, "classes: expected VOC's 20"),
        ({"path": "results.zip"}, "path: expected a name that ends in .tar.gz or .tgz"),
    ],
)
def test_archive_refuses_what_the_server_would(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / change.pop("path", "r.tgz")
    given = {"ids": ["a", "b"], "scores": torch.zeros(2, 20), **change}
    with pytest.raises(ValueError, match=message):
        write_voc_results(path, **given)
    assert not path.exists()


# -- trees that labelling tools make --


def own_tree(root: Path, suffix: str = ".jpg", line: str = "{}", encoding: str = "", name: str = "dog") -> Path:
    """Two pictures, a dog on each."""
    folder = tree(root, 2007, {"trainval": {"000001": objects(name), "000002": objects(name)}})
    for identity in ("000001", "000002"):
        (folder / "JPEGImages" / f"{identity}.jpg").unlink()
        PIL.new("RGB", (8, 10)).save(folder / "JPEGImages" / f"{identity}{suffix}")
        if encoding:
            text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n' + objects(name)
            (folder / "Annotations" / f"{identity}.xml").write_bytes(text.encode(encoding))
    lines = [line.format(identity) for identity in ("000001", "000002")]
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".tif"])
@pytest.mark.parametrize("line", ["{}", "JPEGImages/{}", ".\\JPEGImages\\{}", "{}  1", "{} -1"])
def test_pictures_of_any_suffix_and_lists_of_any_layout(tmp_path: Path, suffix: str, line: str) -> None:
    own_tree(tmp_path, suffix, line)
    dataset = VocDataset(tmp_path, 2007, "trainval", 8)
    assert [Path(path).name for path in dataset.paths] == [f"000001{suffix}", f"000002{suffix}"]
    assert dataset.ids == ["000001", "000002"] and named(dataset) == [{"dog": 1}] * 2


def test_a_list_that_names_the_suffix_and_a_picture_beside_it(tmp_path: Path) -> None:
    folder = own_tree(tmp_path, ".jpg", "{}.jpg")
    for identity in ("000001", "000002"):
        PIL.new("RGB", (8, 10)).save(folder / "JPEGImages" / f"{identity}.png")  # a mask, say
    assert [Path(p).suffix for p in VocDataset(tmp_path, 2007, "trainval", 8).paths] == [".jpg", ".jpg"]
    assert VocDataset(tmp_path, 2007, "trainval", 8).ids == ["000001", "000002"]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "shift_jis", "big5", "utf-16", "utf-8-sig", "latin-1", "utf-8"])
def test_annotations_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    name = "café" if encoding == "latin-1" else "犬"
    own_tree(tmp_path, encoding=encoding, name=name)
    dataset = VocDataset(tmp_path, 2007, "trainval", 8, classes=("cat", name))
    assert named(dataset) == [{name: 1}] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_more_than_a_declaration(tmp_path: Path, encoding: str) -> None:
    folder = own_tree(tmp_path, name="犬", encoding="gbk")
    for declared in ('<?xml version="1.0" encoding="utf-8"?>', '<?xml version="1.0" encoding="gbk"?>', ""):
        (folder / "Annotations" / "000002.xml").write_bytes((declared + objects("犬")).encode(encoding))
        assert named(VocDataset(tmp_path, 2007, "trainval", 8, classes=("cat", "犬"))) == [{"犬": 1}] * 2
    (folder / "Annotations" / "000002.xml").write_text('\n <?xml version="1.0" encoding="utf-8"?>' + objects("犬"))
    assert named(VocDataset(tmp_path, 2007, "trainval", 8, classes=("cat", "犬"))) == [{"犬": 1}] * 2


def test_annotations_in_no_declared_encoding_are_named(tmp_path: Path) -> None:
    folder = own_tree(tmp_path)
    for text in ("<annotation>", '<?xml version="1.0" encoding="klingon"?><annotation>'):
        (folder / "Annotations" / "000002.xml").write_bytes((text + objects("犬")).encode("gbk"))
        with pytest.raises(ImageFileError, match=r"000002.xml: not XML \("):
            VocDataset(tmp_path, 2007, "trainval", 8)


@pytest.mark.parametrize("flag", ["1", "true", "True"])
def test_difficult_in_words(tmp_path: Path, flag: str) -> None:
    annotation = objects("dog?").replace("<difficult>1<", f"<difficult>{flag}<")
    tree(tmp_path, 2007, {"trainval": {"000001": annotation, "000002": objects("cat")}})
    assert named(VocDataset(tmp_path, 2007, "trainval", 8)) == [{}, {"cat": 1}]
