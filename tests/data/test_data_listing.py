"""What all loaders of picture files share: reading odd pictures, refusing bad lists by line, counting, dropping."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.csv_list import CsvDataset  # noqa: E402
from sadcl.data.folders import LISTING_PAYS  # noqa: E402
from sadcl.data.images import ImageFileError, load_rgb, square_tensor  # noqa: E402
from sadcl.data.json_lines import JsonLinesDataset  # noqa: E402
from sadcl.data.listing import ImageListing  # noqa: E402

NAMES = ["plain.png", "with space.png", "naïve Café 犬.png", "semi;colon.png", "com,ma.png", "quo'te.png", "a.b.c.png"]


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (24, 12)) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.new("RGB", size, (40 * number % 256, 90, 200)).save(folder / name)


def as_csv(folder: Path, rows: list[tuple[str, list[str]]]) -> Path:
    path = folder / "list.csv"
    quoted = ['"' + name.replace('"', '""') + '",' + ";".join(labels) for name, labels in rows]
    path.write_bytes("\r\n".join(["path,labels", *quoted, ""]).encode("utf-8-sig"))
    return path


def as_jsonl(folder: Path, rows: list[tuple[str, list[str]]]) -> Path:
    path = folder / "list.jsonl"
    lines = [json.dumps({"path": name, "labels": labels, "note": 1}, ensure_ascii=False) for name, labels in rows]
    path.write_bytes("\r\n".join([lines[0], "", *lines[1:], ""]).encode("utf-8-sig"))
    return path


@pytest.mark.parametrize(("write", "kind"), [(as_csv, CsvDataset), (as_jsonl, JsonLinesDataset)])
def test_lists_with_odd_names_crlf_and_a_byte_order_mark(tmp_path: Path, write, kind) -> None:  # type: ignore[no-untyped-def]
    pictures(tmp_path, NAMES)
    labels = [["hot dog", "Ärger"], ["cat"], [], ["cat", "cat"], ["hot dog"], ["cat"], []]
    dataset = kind(write(tmp_path, list(zip(NAMES, labels, strict=True))), 16)
    assert dataset.classes == ("cat", "hot dog", "Ärger") and len(dataset) == len(NAMES)
    for index, given in enumerate(labels):
        image, row = dataset[index]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        assert image[0, 0, 0] == 40 * index % 256, "the pictures are in the order of the list"
        assert row.dtype == torch.float32
        assert {name for name, value in zip(dataset.classes, row.tolist(), strict=True) if value} == set(given)
        raw, same = dataset.load(index)
        assert raw.size == (24, 12) and raw.mode == "RGB" and torch.equal(row, same)


@pytest.mark.parametrize(("write", "kind"), [(as_csv, CsvDataset), (as_jsonl, JsonLinesDataset)])
def test_root_moves_relative_paths_and_classes_set_the_order(tmp_path: Path, write, kind) -> None:  # type: ignore[no-untyped-def]
    pictures(tmp_path / "elsewhere", ["sub/a.png", "b.png"])
    path = write(tmp_path, [("sub/a.png", ["x"]), (str(tmp_path / "elsewhere" / "b.png"), ["y"])])
    dataset = kind(path, 16, ("y", "unused", "x"), root=tmp_path / "elsewhere")
    assert [row.tolist() for _, row in dataset] == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="label 'y' is not one of the classes: x$") as caught:
        kind(path, 16, ("x",), root=tmp_path / "elsewhere")
    assert str(path) in str(caught.value) and "line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'path': 'a.png'}", "line 2: not JSON"),
        ('{"path": "a.png"}', "line 2: expected .* got labels None"),
        ('{"path": "a.png", "labels": "dog"}', "line 2: expected .* got labels 'dog'"),
        ('{"path": "a.png", "labels": [3.5]}', "line 2: expected"),
        ('{"path": "a.png", "labels": [0, 1, 0]}', "line 2: expected .* which are no names"),
        ('{"labels": ["dog"]}', "line 2: expected"),
        ('["a.png", ["dog"]]', "line 2: expected"),
        ('{"path": "none.png", "labels": []}', "none.png: no such picture file .line 2 of"),
        ('{"path": "caf\xe9.png", "labels": []}', "line 2: not UTF-8"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    pictures(tmp_path, ["a.png"])
    (tmp_path / "l.jsonl").write_bytes(b'{"path": "a.png", "labels": ["dog"]}\n' + line.encode("latin-1"))
    with pytest.raises(ImageFileError, match=message) as caught:
        JsonLinesDataset(tmp_path / "l.jsonl", 16)
    assert str(tmp_path / "l.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (",dog", "line 3: no path"),
        ('"a.png"x,dog', "line 3: "),
        ('"a.png,dog', "line 3: "),
        ("caf\xe9.png,dog", "line 3: not UTF-8"),
    ],
)
def test_bad_csv_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    pictures(tmp_path, ["a.png"])
    (tmp_path / "l.csv").write_bytes(b"path,labels\na.png,dog\n" + line.encode("latin-1"))
    with pytest.raises(ImageFileError, match=message) as caught:
        CsvDataset(tmp_path / "l.csv", 16)
    assert str(caught.value).startswith(str(tmp_path / "l.csv"))


def test_missing_pictures_are_found_at_once_and_can_be_dropped(tmp_path: Path) -> None:
    """In a folder with few pictures of the list (a stat each) and in one with many (one listing)."""
    names = [f"few/{i}.png" for i in range(3)] + [f"many/{i}.png" for i in range(LISTING_PAYS + 4)]
    pictures(tmp_path, names, (2, 2))
    path = as_csv(tmp_path, [(name, ["a"] if i % 2 else ["b"]) for i, name in enumerate(names)])
    assert len(CsvDataset(path, 16)) == len(names)
    gone = ["few/1.png", "many/3.png", "many/9.png"]
    for name in gone:
        (tmp_path / name).unlink()
    (tmp_path / "many/9.png").mkdir()  # a folder of that name is no picture
    with pytest.raises(ImageFileError, match=r"few/1.png: no such picture file \(line 3 of .*list.csv; .* 2 more"):
        CsvDataset(path, 16)
    dataset = CsvDataset(path, 16, missing_images="drop")
    assert len(dataset) == len(names) - 3 and dataset.dropped == {"whose file is missing": 3}
    assert "dropped: 3 images whose file is missing" in dataset.summary()
    assert [Path(p).name for p in dataset.paths[:3]] == ["0.png", "2.png", "0.png"]
    assert dataset.positive[:3] == [(1,), (1,), (0,)], "labels stay with their pictures"
    shutil.rmtree(tmp_path / "few")
    shutil.rmtree(tmp_path / "many")
    with pytest.raises(ImageFileError, match="list.csv: no picture is left .23 images whose file is missing"):
        CsvDataset(path, 16, missing_images="drop")


def test_truncated_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"], (60, 60))
    (tmp_path / "b.jpg").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-900])
    dataset = CsvDataset(as_csv(tmp_path, [("a.png", ["x"]), ("cut.jpg", ["x"]), ("b.jpg", [])]), 16)
    dataset[0]
    for index, name in ((1, "cut.jpg"), (2, "b.jpg")):
        for read in (dataset.load, dataset.__getitem__):
            with pytest.raises(ImageFileError, match=f"{name}: ") as caught:
                read(index)
            assert caught.value.path == tmp_path / name


def test_empty_pictures_are_kept_or_dropped_and_counted(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    path = as_csv(tmp_path, [("a.png", []), ("b.png", ["x"]), ("c.png", [])])
    kept, dropped = CsvDataset(path, 16), CsvDataset(path, 16, empty_images="drop")
    assert len(kept) == 3 and kept.dropped == {} and "2 without a label" in kept.summary()
    assert len(dropped) == 1 and dropped.dropped == {"without a label": 2}
    assert "dropped: 2 images without a label" in dropped.summary()
    (tmp_path / "a.png").unlink()
    assert len(CsvDataset(path, 16, empty_images="drop")) == 1, "a dropped picture need not be there"
    for name in ("empty_images", "missing_images"):
        with pytest.raises(ValueError, match=f"{name}: expected .* got 'all'"):
            CsvDataset(path, 16, **{name: "all"})


def test_summary_counts(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(20)]
    pictures(tmp_path, names, (2, 2))
    rows = [(name, [f"c{k:02d}" for k in range(i % 12 + 1)]) for i, name in enumerate(names)]
    classes = [*(f"c{k:02d}" for k in range(12)), "none"]
    lines = CsvDataset(as_csv(tmp_path, rows), 16, classes).summary().splitlines()
    counts = [sum(1 for i in range(20) if i % 12 >= k) for k in range(12)]
    assert f"20 images, 13 labels, {sum(counts) / 20:.2f} labels an image (at most 12); 0 without a label" in lines[0]
    assert lines[1].strip() == "commonest: " + ", ".join(f"c{k:02d} {counts[k]}" for k in range(5))
    assert lines[2].strip() == "rarest: " + ", ".join(f"c{k:02d} {counts[k]}" for k in (11, 10, 9, 8, 7))
    assert lines[3].strip() == "never there: none"


def test_fingerprint_follows_paths_labels_and_classes(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    rows = [("a.png", ["x"]), ("b.png", ["y"])]
    first = CsvDataset(as_csv(tmp_path, rows), 16).fingerprint()
    assert CsvDataset(as_csv(tmp_path, rows), 16).fingerprint() == first
    assert CsvDataset(as_csv(tmp_path, rows[::-1]), 16).fingerprint() != first
    assert CsvDataset(as_csv(tmp_path, [rows[0], ("b.png", ["x", "y"])]), 16).fingerprint() != first
    assert CsvDataset(as_csv(tmp_path, rows), 16, ("y", "x")).fingerprint() != first


def test_workers_give_the_same_items(tmp_path: Path) -> None:
    pictures(tmp_path, NAMES)
    dataset: ImageListing = CsvDataset(as_csv(tmp_path, [(name, ["x"]) for name in NAMES]), 16)
    alone = torch.cat([images for images, _ in DataLoader(dataset, 3)])
    assert torch.equal(alone, torch.cat([images for images, _ in DataLoader(dataset, 3, num_workers=2)]))


# -- pictures of every kind --


def scene(width: int, height: int, noise: float = 6.0) -> np.ndarray:
    """A picture with edges, gradients and texture: uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rng = np.random.default_rng(3)
    base = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin(x / 23) * np.cos(y / 17)], -1)
    for _ in range(12):
        left, top = rng.integers(0, width * 3 // 4), rng.integers(0, height * 3 // 4)
        base[top : top + height // 6, left : left + width // 7] = rng.integers(0, 255, 3)
    return np.clip(base + rng.normal(0, noise, base.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["gray.jpg", "cmyk.jpg", "palette.png", "palette.gif", "bilevel.png", "gray16.png"])
def test_odd_colour_modes_keep_their_brightness(tmp_path: Path, kind: str) -> None:
    rgb = PIL.fromarray(scene(96, 64))
    path = tmp_path / kind
    if kind == "gray16.png":  # Pillow alone would clip this to white
        PIL.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        rgb.convert({"gray": "L", "cmyk": "CMYK", "palette": "P", "bilevel": "1"}[kind.split(".")[0]]).save(path)
    read = load_rgb(path)
    assert read.mode == "RGB" and read.size == (96, 64)
    error = np.asarray(read.convert("L"), dtype=float) - np.asarray(rgb.convert("L"), dtype=float)
    assert abs(error.mean()) < 4
    if kind != "bilevel.png":
        assert np.abs(error).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_in_every_direction(tmp_path: Path, orientation: int) -> None:
    """Also when the JPEG is decoded at a lower scale."""
    upright = PIL.fromarray(scene(160, 96, noise=0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that a camera's turn amounts to
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = PIL.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "t.jpg", exif=exif, quality=95)
    for at_least, shrink in ((None, 1), (40, 2)):
        read = load_rgb(tmp_path / "t.jpg", at_least)
        assert read.size == (160 // shrink, 96 // shrink)
        expected = np.asarray(upright.resize(read.size, 4), dtype=float)
        assert np.abs(np.asarray(read, dtype=float) - expected).mean() < 6


def test_lower_jpeg_scale_never_falls_below_what_was_asked(tmp_path: Path) -> None:
    PIL.fromarray(scene(640, 480)).save(tmp_path / "x.jpg")
    PIL.fromarray(scene(640, 480)).save(tmp_path / "x.png")
    for at_least, size in ((481, (640, 480)), (240, (320, 240)), (241, (640, 480)), (100, (160, 120)), (1, (80, 60))):
        assert load_rgb(tmp_path / "x.jpg", at_least).size == size
        assert load_rgb(tmp_path / "x.png", at_least).size == (640, 480)


# An odd side ends half a decoded pixel early, at most a quarter of an input pixel: edges at that end differ by more.
@pytest.mark.parametrize(("size", "differing"), [((640, 480), 0.001), ((1500, 1000), 0.01), ((333, 900), 0.02)])
def test_lower_jpeg_scale_hardly_changes_the_input(tmp_path: Path, size: tuple[int, int], differing: float) -> None:
    """At twice the input's size or more: less than one grey level on average, and few values by more than 8."""
    PIL.fromarray(scene(*size)).save(tmp_path / "x.jpg", quality=90)
    side = min(size) // 5
    dataset = CsvDataset(as_csv(tmp_path, [("x.jpg", ["x"])]), side)
    assert load_rgb(tmp_path / "x.jpg", 2 * side).size < size, "the case must be one that is decoded at a lower scale"
    full = square_tensor(dataset.load(0)[0], side)
    difference = (dataset[0][0].int() - full.int()).abs().float()
    assert difference.mean() < 1
    assert (difference > 8).float().mean() < differing


def test_damaged_exif_data_leave_the_picture_readable(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6
    PIL.new("RGB", (20, 10)).save(tmp_path / "x.webp", exif=exif)
    content = (tmp_path / "x.webp").read_bytes()
    assert load_rgb(tmp_path / "x.webp").size == (10, 20) and content.count(b"MM\0*") == 1
    (tmp_path / "x.webp").write_bytes(content.replace(b"MM\0*", b"jM\0*"))
    assert load_rgb(tmp_path / "x.webp").size == (20, 10)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the damage
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.gif", "x.tif", "x.webp", "x.bmp"])
def test_damaged_pictures_raise_nothing_but_image_file_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    PIL.fromarray(scene(40, 30)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for position in rng.integers(0, min(len(damaged), 300), size=3):  # headers break in more ways than pixels
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load_rgb(path)
        except ImageFileError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 20
