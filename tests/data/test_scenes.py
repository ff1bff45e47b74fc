"""Composed scenes: label specs, object split, generator, broken picture files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

PIL = pytest.importorskip("PIL.Image")

import sadcl.data.sources as sources  # noqa: E402
from sadcl.data.csv_list import CsvDataset  # noqa: E402
from sadcl.data.features import cached_features  # noqa: E402
from sadcl.data.images import ImageFileError, load_rgb  # noqa: E402
from sadcl.data.scenes import MAX_OBJECTS, MIN_VISIBLE, SceneDataset  # noqa: E402
from sadcl.data.sources import Background, SceneSource, SourceNotFound, find_source, split_objects  # noqa: E402


def installed(name: str) -> SceneSource:
    try:
        return find_source(name)
    except SourceNotFound as error:
        pytest.skip(f"{name}: {error}")


def write_cutout(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> Path:
    """An opaque rectangle inside a transparent margin."""
    image = PIL.new("RGBA", size, (0, 0, 0, 0))
    image.paste((*color, 255), (5, 5, size[0] - 5, size[1] - 5))
    image.save(path)
    return path


@pytest.fixture
def drawn(tmp_path: Path) -> SceneSource:
    """Four labels with four objects each, four backgrounds; object j of label i has red channel 10 + 16 (4 i + j)."""
    objects = [
        [(write_cutout(tmp_path / f"cut{i}{j}.png", (10 + 16 * (4 * i + j), 40 * i, 200)),) for j in range(4)]
        for i in range(4)
    ]
    for k in range(4):
        PIL.new("RGB", (300, 200), (90, 60 * k, 30)).save(tmp_path / f"back{k}.jpg")
    return SceneSource(
        "drawn",
        "rectangles",
        ("a", "b", "c", "d"),
        tuple(tuple(label) for label in objects),
        tuple(Background(tmp_path / f"back{k}.jpg") for k in range(4)),
        ((0, 1), (2, 3)),
    )


@pytest.mark.parametrize(("name", "labels", "objects"), [("photos", 19, 284), ("emoji", 26, 352)])
def test_label_spec_gives_the_known_counts(name: str, labels: int, objects: int) -> None:
    source = installed(name)
    assert len(source.labels) == len(source.objects) == labels
    assert source.num_objects == objects
    assert len(source.themes) == 5
    files = [path for label in source.objects for variants in label for path in variants]
    assert len(files) == len(set(files)), "one file under two labels"


def test_specs_are_consistent_without_any_picture_installed() -> None:
    folder = Path(sources.__file__).parent
    for name, count in (("tuxpaint.json", 19), ("twemoji.json", 26)):
        spec = json.loads((folder / name).read_text())
        assert len(spec["labels"]) == count
        assert {label for theme in spec["themes"] for label in theme} == set(spec["labels"])
    assert sum(len(names) for names in json.loads((folder / "twemoji.json").read_text())["labels"].values()) == 352


def test_variants_are_one_object() -> None:
    source = installed("photos")
    by_label = dict(zip(source.labels, source.objects, strict=True))
    names = [{path.stem for path in variants} for label in by_label.values() for variants in label]
    assert {"bradley", "bradley_mirror"} in names
    assert {"scissors_small_open", "scissors_small_closed"} in names
    assert {"gnu-sitting", "gnu-baby", "gnu-baby-stand", "gnu-stand"} in names


@pytest.mark.parametrize("name", ["photos", "emoji"])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_shares_neither_objects_nor_backgrounds(name: str, seed: int) -> None:
    source = installed(name)
    train, val = split_objects(source, "train", seed), split_objects(source, "val", seed)
    for whole, left, right in zip(source.objects, train.objects, val.objects, strict=True):
        assert set(left) | set(right) == set(whole)
        assert not set(left) & set(right)
        assert len(right) == max(1, round(0.3 * len(whole)))
    assert not set(train.backgrounds) & set(val.backgrounds)
    assert set(train.backgrounds) | set(val.backgrounds) == set(source.backgrounds)


def test_split_depends_on_its_seed_alone(drawn: SceneSource) -> None:
    assert split_objects(drawn, "val", 3) == split_objects(drawn, "val", 3)
    assert any(split_objects(drawn, "val", 3).objects != split_objects(drawn, "val", s).objects for s in range(4))
    with pytest.raises(ValueError, match="train or val"):
        split_objects(drawn, "test")


def test_scene_depends_on_seed_and_index_alone(drawn: SceneSource) -> None:
    first, again = (
        SceneDataset(drawn, 8, seed=5, image_size=64),
        SceneDataset(drawn, 8, seed=5, image_size=64),
    )
    for index in (7, 0, 3):  # any order
        assert torch.equal(first[index][0], again[index][0])
        assert torch.equal(first[index][1], again[index][1])
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], SceneDataset(drawn, 8, seed=6, image_size=64)[0][0])
    with pytest.raises(IndexError):
        first[8]


def test_scene_shapes_and_labels(drawn: SceneSource) -> None:
    dataset = SceneDataset(drawn, 60, image_size=64)
    for index in range(len(dataset)):
        image, labels = dataset[index]
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
        assert labels.dtype == torch.float32 and labels.shape == (4,)
        assert set(labels.tolist()) <= {0.0, 1.0}
        _, placed = dataset.compose(index)
        assert 1 <= len(placed) <= MAX_OBJECTS
        assert labels.nonzero().flatten().tolist() == sorted(set(placed))


def test_no_object_is_more_than_half_hidden(drawn: SceneSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label named is seen: at least half of every placed object's pixels are still its own at the end."""
    dataset = SceneDataset(drawn, 40, image_size=64)
    place = SceneDataset._place
    owners: list[tuple[np.ndarray, list[int]]] = []

    def spy(self, scene, owner, areas, cutout, rng):  # type: ignore[no-untyped-def]
        done = place(self, scene, owner, areas, cutout, rng)
        owners.append((owner, areas))
        return done

    monkeypatch.setattr(SceneDataset, "_place", spy)
    crowded = 0
    for index in range(len(dataset)):
        dataset.compose(index)
        owner, areas = owners[-1]
        crowded += len(areas) >= 3
        for number, area in enumerate(areas):
            assert (owner == number).sum() >= MIN_VISIBLE * area
    assert crowded > 5


def test_photo_scenes_have_the_described_statistics() -> None:
    dataset = SceneDataset(split_objects(installed("photos"), "train"), 400)
    labels = torch.stack([torch.zeros(19).index_fill_(0, torch.tensor(dataset.compose(i)[1]), 1.0) for i in range(400)])
    assert 2.3 < labels.sum(1).mean() < 2.8
    assert labels.mean(0).min() > 0.06 and labels.mean(0).max() < 0.3


def test_unreadable_cutout_is_skipped_with_its_path(drawn: SceneSource) -> None:
    broken = drawn.objects[1][2][0]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.warns(UserWarning, match="skipped .*cut12.png"):
        dataset = SceneDataset(drawn, 4, image_size=64)
    assert len(dataset.cutouts[1]) == 3
    dataset[0]


def test_label_without_any_readable_picture_is_an_error(drawn: SceneSource) -> None:
    for (path,) in drawn.objects[2]:
        path.write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ImageFileError, match=r"cut20.png: no picture of label 'c'"),
    ):
        SceneDataset(drawn, 4, image_size=64)


def test_missing_source_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="sadcl fetch"):
        find_source("photos", tmp_path)
    with pytest.raises(SourceNotFound, match=r"sadcl\[emoji\]"):
        find_source("emoji", tmp_path)
    with pytest.raises(ValueError, match="auto, photos, emoji"):
        find_source("films")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    PIL.new("RGB", (20, 10), (200, 200, 200)).convert(mode).save(path)
    assert load_rgb(path).mode == "RGB"


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    PIL.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "t.png")
    assert load_rgb(tmp_path / "t.png").getpixel((1, 1)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    PIL.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_rgb(tmp_path / "turned.jpg").size == (10, 20)


def test_unreadable_pictures_name_their_path(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    PIL.effect_noise((64, 64), 50).convert("RGB").save(whole)
    truncated, text, missing = tmp_path / "cut.jpg", tmp_path / "text.png", tmp_path / "none.png"
    truncated.write_bytes(whole.read_bytes()[:-400])
    text.write_text("hello")
    for path, reason in ((truncated, "cannot be decoded"), (text, "not a picture"), (missing, "no such")):
        with pytest.raises(ImageFileError, match=reason) as caught:
            load_rgb(path)
        assert str(path) in str(caught.value)


def csv_folder(tmp_path: Path, text: str) -> Path:
    for name in ("a.png", "b ü.png"):
        PIL.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / name)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return tmp_path / "list.csv"


def test_csv_list(tmp_path: Path) -> None:
    dataset = CsvDataset(csv_folder(tmp_path, 'path,labels\na.png,dog;cat\n"b ü.png",\n'), 32)
    assert dataset.classes == ("cat", "dog")
    image, labels = dataset[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and image[0].min() == 255
    assert labels.tolist() == [1.0, 1.0] and dataset[1][1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,dog\nnone.png,dog\n", "none.png: no such picture file .line 2"),
        ("a.png,dog,cat\n", "line 1: expected `path,label;label`, or a first line .*, got 3 columns"),
        ("", "lists no picture"),
        ("a.png,\n", "no picture has a label"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CsvDataset(csv_folder(tmp_path, text), 32)


def test_csv_unknown_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 'dog' is not one of the classes: cat"):
        CsvDataset(csv_folder(tmp_path, "a.png,dog\n"), 32, classes=["cat"])


def test_features_are_computed_once_per_key(drawn: SceneSource, tmp_path: Path) -> None:
    calls = []

    def extract(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return batch.float().mean(dim=(2, 3), keepdim=True)

    images = SceneDataset(drawn, 5, image_size=64)
    for key, expected in (({"a": 1}, 5), ({"a": 1}, 5), ({"a": 2}, 10)):
        features = cached_features(images, extract, tmp_path / "f" / "train", key, batch_size=2, workers=0)
        assert sum(calls) == expected and len(features) == 5
    maps, labels = features[3]
    assert maps.dtype == torch.float32 and torch.equal(labels, images[3][1])
    torch.testing.assert_close(maps.flatten(), images[3][0].float().mean((1, 2)), rtol=1e-3, atol=0.0)
    assert not list((tmp_path / "f").glob("*part*"))
