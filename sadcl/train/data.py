"""What a run trains on: the training and validation images of its config, or their cached feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.backbones import Preprocessing
from sadcl.data.csv_list import CsvDataset
from sadcl.data.features import FeatureDataset, cached_features
from sadcl.data.scenes import SceneDataset
from sadcl.data.sources import find_source, split_objects
from sadcl.model import SADCL
from sadcl.train.config import DataConfig, TrainConfig

__all__ = ["Images", "Pairs", "PreprocessedDataset", "as_features", "load_images", "load_validation"]

Pairs = Dataset[tuple[Tensor, Tensor]]
VAL_SEED = 1_000_003  # added to the run's seed, so that validation scenes are never training scenes


@dataclass
class Images:
    """Both sides of the data.

    Attributes:
        train: items (uint8 [3, H, W], labels float32 [C]).
        val: the same.
        classes: the C label names.
        title: one line for people: what the pictures are.
        protocol: how validation was held out, for the record beside a figure.
    """

    train: Pairs
    val: Pairs
    classes: tuple[str, ...]
    title: str
    protocol: str


class PreprocessedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pictures normalised for a backbone: items (float32 [3, H, W], labels [C])."""

    def __init__(self, images: Pairs, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.images[index]
        return self.preprocessing(image), labels


def load_images(config: DataConfig, seed: int) -> Images:
    """Training and validation images of a config."""
    val, classes, protocol = load_validation(config, seed)
    train: Pairs
    if config.source == "csv":
        assert config.train_csv  # checked with the config
        train = CsvDataset(config.train_csv, config.image_size, classes)
        return Images(train, val, classes, f"pictures of {config.train_csv}", protocol)
    source = find_source(config.source, config.root)
    train_part = split_objects(source, "train", config.split_seed)
    train = SceneDataset(train_part, config.train_images, seed, config.image_size)
    return Images(train, val, classes, source.title, protocol)


def load_validation(
    config: DataConfig, seed: int, classes: tuple[str, ...] | None = None
) -> tuple[Pairs, tuple[str, ...], str]:
    """Validation images of a config, their label names, and the protocol in words.

    Args:
        config: which data.
        seed: of the run; validation scenes are drawn from another one.
        classes: label names of a CSV list; default: those of its training list.
    """
    if config.source == "csv":
        assert config.val_csv  # checked with the config
        if classes is None:
            assert config.train_csv
            classes = CsvDataset(config.train_csv, config.image_size).classes
        val = CsvDataset(config.val_csv, config.image_size, classes)
        return val, classes, f"the {len(val)} pictures of {config.val_csv}"
    source = find_source(config.source, config.root)
    val_part = split_objects(source, "val", config.split_seed)
    protocol = (
        f"{config.val_images} composed scenes of held-out {source.name} (30% of the objects of every "
        f"label and 30% of the backgrounds, split seed {config.split_seed})"
    )
    return (
        SceneDataset(val_part, config.val_images, seed + VAL_SEED, config.image_size),
        source.labels,
        protocol,
    )


def as_features(
    images: Images,
    model: SADCL,
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    progress: Callable[[str], Callable[..., Any]],
) -> tuple[FeatureDataset, FeatureDataset]:
    """Feature maps of a frozen backbone for both sides, computed once and kept in ``folder``."""

    # Channels last and 8 images at a time: 15 + 0 ms of user + system time an image on one core, against 16 + 32 for
    # 64 at a time in the default layout, whose large activations are returned to the system after every layer.
    model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.backbone.eval()
    chunk = 8 if device.type == "cpu" else 256

    @torch.inference_mode()
    def extract(batch: Tensor) -> Tensor:
        parts = model.preprocessing(batch.to(device)).split(chunk)
        return torch.cat([model.backbone(part.contiguous(memory_format=torch.channels_last)) for part in parts])

    sides = []
    key: dict[str, Any]
    for name, side in (("train", images.train), ("val", images.val)):
        key = {"side": name, "seed": config.seed, "title": images.title, "protocol": images.protocol}
        key["data"] = {k: v for k, v in asdict(config.data).items() if k not in ("workers", "feature_cache")}
        key["backbone"] = [config.model.backbone, _fingerprint(model.backbone)]
        sides.append(
            cached_features(
                side,
                extract,
                folder / name,
                key,
                workers=config.data.workers,
                progress=progress(f"features, {name}"),
            )
        )
    return sides[0], sides[1]


def _fingerprint(module: torch.nn.Module) -> float:
    """A number that changes with the weights (a random backbone's depend on the seed)."""
    return sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())
