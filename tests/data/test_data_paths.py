"""Where listed pictures lie: other systems' paths, one picture under several names, links, suffixes left out."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.coco import CocoDataset  # noqa: E402
from sadcl.data.csv_list import CsvDataset  # noqa: E402
from sadcl.data.folders import LISTING_PAYS, Folders, files_stamp  # noqa: E402
from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.data.json_lines import JsonLinesDataset  # noqa: E402
from sadcl.data.listing import ImageListing  # noqa: E402

FEW, MANY = 3, LISTING_PAYS + 3  # pictures that are asked for one by one, and folders that are listed


def pictures(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", (4, 4)).save(folder / name)


def listings(folder: Path, rows: list[tuple[str, str]]) -> dict[str, ImageListing]:
    """The same rows (path, label) as every kind of list."""
    (folder / "l.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    (folder / "l.jsonl").write_text("\n".join(json.dumps({"path": p, "labels": [n]}) for p, n in rows))
    names = sorted({label for _, label in rows})
    content = {
        "images": [{"id": i, "file_name": path} for i, (path, _) in enumerate(rows)],
        "annotations": [{"image_id": i, "category_id": names.index(label)} for i, (_, label) in enumerate(rows)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (folder / "l.json").write_text(json.dumps(content))
    made = {CsvDataset: "l.csv", JsonLinesDataset: "l.jsonl", CocoDataset: "l.json"}
    return {name: kind(folder / name, 8) for kind, name in made.items()}  # type: ignore[operator]


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("prefix", ["images\\sub\\", ".\\images\\sub\\", "images\\sub/"])
def test_paths_written_on_windows(tmp_path: Path, prefix: str, count: int) -> None:
    pictures(tmp_path, [f"images/sub/{i}.png" for i in range(count)])
    for dataset in listings(tmp_path, [(f"{prefix}{i}.png", "a") for i in range(count)]).values():
        assert [Path(path) for path in dataset.paths] == [tmp_path / f"images/sub/{i}.png" for i in range(count)]


def test_a_backslash_in_a_name_of_its_own_is_kept(tmp_path: Path) -> None:
    pictures(tmp_path, ["a\\b.png", "a/b.png"])
    for dataset in listings(tmp_path, [("a\\b.png", "x"), ("a/b.png", "y")]).values():
        assert [os.path.relpath(path, tmp_path) for path in dataset.paths] == ["a\\b.png", "a/b.png"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("C:\\data\\a.png", "a path of another machine (Windows)"),
        ("sub\\none.png", "tried with / for \\, too"),
        ("a.JPG", "there is a.png"),
        ("A.png", None),
        ("none.png", None),
    ],
)
def test_what_is_missing_says_what_was_tried_and_what_is_there(tmp_path: Path, path: str, words: str | None) -> None:
    pictures(tmp_path, ["a.png"])
    with pytest.raises(ImageFileError, match=r"no such picture file \(line 1 of .*l.csv") as caught:
        listings(tmp_path, [(path, "x")])
    assert (f"; {words}" in str(caught.value)) if words else str(caught.value).endswith("l.csv)")


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(("listed", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_either_form(tmp_path: Path, listed: str, on_disk: str, count: int) -> None:
    names = [f"été/Ångström {i}.png" for i in range(count)]
    there = [unicodedata.normalize(on_disk, name) for name in names]  # type: ignore[arg-type]
    pictures(tmp_path, there)
    for dataset in listings(tmp_path, [(unicodedata.normalize(listed, name), "a") for name in names]).values():  # type: ignore[arg-type]
        assert [os.path.relpath(path, tmp_path) for path in dataset.paths] == there


@pytest.mark.parametrize("count", [FEW, MANY])
def test_names_without_a_suffix(tmp_path: Path, count: int) -> None:
    pictures(tmp_path, [f"train.{i}.png" for i in range(count)] + ["train.0.txt.jpg", "both.png", "both.jpg"])
    rows = [(f"train.{i}", "a") for i in range(count)] + [("both", "a")]
    for dataset in listings(tmp_path, rows).values():
        assert [Path(path).name for path in dataset.paths] == [f"train.{i}.png" for i in range(count)] + ["both.jpg"]
    pictures(tmp_path, ["several.png", "several.gif"])
    with pytest.raises(ImageFileError, match=r"several: no such picture .*there is several.gif and several.png"):
        listings(tmp_path, [("several", "a")])


# -- one picture under several names --


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("other", ["0.png", "./0.png", "sub/../0.png", "link.png", "folder link/0.png", ".\\0.png"])
def test_rows_of_one_picture_are_joined(tmp_path: Path, other: str, count: int) -> None:
    pictures(tmp_path, [f"{i}.png" for i in range(count)])
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to("0.png")
    (tmp_path / "folder link").symlink_to(".")
    rows = [("1.png", "a"), ("0.png", "a"), (other, "b"), (other, "a"), *((f"{i}.png", "c") for i in range(2, count))]
    for name, dataset in listings(tmp_path, rows).items():
        assert [Path(path).name for path in dataset.paths] == ["1.png", "0.png", *(f"{i}.png" for i in range(2, count))]
        assert dataset.positive[:3] == [(0,), (0, 1), (2,)]
        where = f"image id 2 of {tmp_path}/l.json" if name == "l.json" else f"line 3 of {tmp_path}/{name}"
        assert f"listed more than once, labels joined: 2 rows ({where} is the first)" in dataset.summary()
    once = listings(tmp_path, [(f"{i}.png", "a") for i in range(count)])
    assert all("more than once" not in dataset.summary() for dataset in once.values())


def test_joined_rows_with_unknown_and_missing_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    lines = ["path,labels,unknown", "a.png,x,y", "./a.png,y,z", "gone.png,x,", "./gone.png,z,", "a.png,,"]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    dataset = CsvDataset(tmp_path / "l.csv", 8, missing_images="drop", empty_images="drop")
    assert dataset.labels(0).tolist() == [1, 1, -1], "what one row knows, the other's doubt does not undo"
    assert dataset.dropped == {"whose file is missing": 1} and len(dataset) == 1


# -- what a picture is --


def test_stamp_follows_what_is_in_the_files(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "link.png").symlink_to("a.png")
    paths = [tmp_path / "link.png", tmp_path / "c.png"]
    for name in ("a.png", "b.png", "c.png"):
        os.utime(tmp_path / name, ns=(5, 5))
    stamps = [files_stamp(paths)]
    assert files_stamp(paths) == stamps[0] != files_stamp(paths[::-1])
    (tmp_path / "b.png").read_bytes()
    assert files_stamp(paths) == stamps[0], "another file, or reading, changes nothing"

    def switch() -> None:
        (tmp_path / "link.png").unlink()
        (tmp_path / "link.png").symlink_to("b.png")  # same size, same time

    content = (tmp_path / "c.png").read_bytes()

    def restore() -> None:
        state = (tmp_path / "a.png").stat()
        (tmp_path / "a.png").write_bytes(bytes(state.st_size))
        os.utime(tmp_path / "a.png", ns=(state.st_atime_ns, state.st_mtime_ns))  # as cp -p and touch -r do

    for change in (
        restore,
        switch,
        lambda: (tmp_path / "c.png").write_bytes(content[:-4]),
        lambda: os.utime(tmp_path / "c.png", ns=(6, 6)),
        lambda: (tmp_path / "c.png").unlink(),
    ):
        change()
        stamps.append(files_stamp(paths))
    assert len(set(stamps)) == 6


def test_folders_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path, [f"{i}.png" for i in range(MANY)])
    seen = []
    scandir, isfile = os.scandir, os.path.isfile
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os.path, "isfile", lambda path: seen.append(path) or isfile(path))  # type: ignore[func-returns-value]
    folders = Folders()
    paths = [str(tmp_path / f"{i}.png") for i in range(MANY)]
    assert folders.resolve(paths) == paths and [folders.identity(path) for path in paths] == paths
    assert seen == [str(tmp_path)]
