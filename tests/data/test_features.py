"""Feature maps of a frozen backbone in shards: resumed, mapped, checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("safetensors")

from sadcl.data import features
from sadcl.data.features import FeatureDataset, ShardError, cached_features


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Picture i has the value i everywhere and the label i % 3; says which were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        labels = torch.nn.functional.one_hot(torch.tensor(index % 3), 3).float()
        return torch.full((3, 8, 8), index, dtype=torch.uint8), labels


def two_maps(batch: Tensor) -> tuple[Tensor, Tensor]:
    fine = batch.float()[:, :2, ::2, ::2].contiguous(memory_format=torch.channels_last)
    return fine, -batch.float().mean((2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(features, "SHARD_IMAGES", 4)
    yield


def cache(pictures: Pictures, folder: Path, key: str = "a", extract: Any = two_maps) -> FeatureDataset:
    return cached_features(pictures, extract, folder / "train", {"key": key}, batch_size=3, workers=0)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("train.*/*"))


def test_what_lies_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file, expected a folder"):
        cache(Pictures(1), tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="link: a link to nowhere, which is not there"):
        cache(Pictures(1), tmp_path / "link")


def test_several_maps_in_shards_of_their_own(tmp_path: Path) -> None:
    pictures = Pictures(10)
    kept = cache(pictures, tmp_path)
    assert [path.name for path in shards(tmp_path)] == [f"0000{i}.safetensors" for i in range(3)]
    assert pictures.asked == list(range(10)) and len(kept) == 10
    for i in range(10):
        (fine, coarse), labels = kept[i]
        assert fine.dtype == torch.float32 and fine.shape == (2, 4, 4) and coarse.shape == (3, 1, 1)
        assert (fine == i).all() and (coarse == -i).all() and labels.argmax() == i % 3
    (fine, coarse), labels = next(iter(torch.utils.data.DataLoader(kept, 10)))
    assert fine.shape == (10, 2, 4, 4) and coarse.shape == (10, 3, 1, 1) and labels.shape == (10, 3)
    assert len(cache(pictures, tmp_path)) == 10 and len(pictures.asked) == 10
    with pytest.raises(IndexError):
        kept[10]


@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_what_was_stopped_goes_on_where_it_was(tmp_path: Path, batches: int) -> None:
    left = [batches]

    def stopping(batch: Tensor) -> tuple[Tensor, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return two_maps(batch)

    with pytest.raises(KeyboardInterrupt):
        cache(Pictures(12), tmp_path, extract=stopping)
    whole = len(shards(tmp_path))
    assert whole == batches // 2, "two batches a shard"
    pictures = Pictures(12)
    again = cache(pictures, tmp_path)
    assert pictures.asked == list(range(4 * whole, 12))
    assert [int(again[i][0][0].max()) for i in range(12)] == list(range(12))


def test_a_shard_in_the_middle_is_made_again(tmp_path: Path) -> None:
    cache(Pictures(10), tmp_path)
    shards(tmp_path)[1].unlink()
    pictures = Pictures(10)
    assert int(cache(pictures, tmp_path)[5][0][0].max()) == 5 and pictures.asked == [4, 5, 6, 7]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        path.write_bytes(b"PK\3\4" + bytes(100))
    else:
        shutil.copy(path.with_name("00002.safetensors"), path)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("cut", "cut off"),
        ("empty", "cut off"),
        ("other", "cut off, or no file of feature maps"),
        ("next", r"expected shard 1 of key \w+, this is shard 2 of key"),
    ],
)
def test_a_damaged_or_foreign_shard_is_named(tmp_path: Path, how: str, why: str) -> None:
    cache(Pictures(12), tmp_path)
    path = shards(tmp_path)[1]
    damage(path, how)
    with pytest.raises(ShardError, match=f"00001.safetensors: .*{why}.*; delete it, and the next run makes it again"):
        cache(Pictures(12), tmp_path)
    path.unlink()
    cache(Pictures(12), tmp_path)


def test_a_shard_of_another_backbone_or_set_is_named(tmp_path: Path) -> None:
    cache(Pictures(8), tmp_path, "a")
    mine = shards(tmp_path)[0]
    cache(Pictures(8), tmp_path / "elsewhere", "b")
    shutil.copy(shards(tmp_path / "elsewhere")[0], mine)
    with pytest.raises(
        ShardError, match=r"00000.safetensors: expected shard 0 of key (\w+), this is shard 0 of key (?!\1)"
    ):
        cache(Pictures(8), tmp_path, "a")
    with pytest.raises(ShardError, match="expected 3 images, got 4"):
        other = tmp_path / "fewer"
        cache(Pictures(8), other, "a")
        cache(Pictures(7), other, "a")


def test_flipped_bits_are_found_in_labels_always_and_in_maps_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(Pictures(4), tmp_path)
    path = shards(tmp_path)[0]
    content = path.read_bytes()
    about = features.json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    for name in ("labels", "map0", "map1"):
        changed = bytearray(content)
        changed[start + about[name]["data_offsets"][1] - 1] ^= 1
        path.write_bytes(bytes(changed))
        if name != "labels":
            monkeypatch.setenv("SADCL_CHECK", "0")
            cache(Pictures(4), tmp_path)
            monkeypatch.setenv("SADCL_CHECK", "1")
        with pytest.raises(ShardError, match=f"{name} has other bits than were written"):
            cache(Pictures(4), tmp_path)
    path.write_bytes(content)
    cache(Pictures(4), tmp_path)
