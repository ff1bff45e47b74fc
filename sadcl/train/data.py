"""What a run trains on: the training and validation images of its config, or their cached feature maps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.backbones import Preprocessing, folded
from sadcl.data.coco import CocoDataset, coco
from sadcl.data.csv_list import CsvDataset
from sadcl.data.features import FeatureDataset, cached_features
from sadcl.data.images import DECODING
from sadcl.data.json_lines import JsonLinesDataset
from sadcl.data.labels import read_class_names
from sadcl.data.listing import ImageListing
from sadcl.data.nuswide import NusWideDataset
from sadcl.data.scenes import SceneDataset
from sadcl.data.sources import find_source, split_objects
from sadcl.data.vg500 import VisualGenome500Dataset
from sadcl.data.voc import VocDataset
from sadcl.head import Maps
from sadcl.model import SADCL
from sadcl.train.config import DataConfig, TrainConfig
from sadcl.train.data_config import LISTS, Side
from sadcl.train.listed import listed

__all__ = [
    "EVAL_BATCH",
    "Images",
    "Pairs",
    "Pictures",
    "PreprocessedDataset",
    "as_features",
    "load_images",
    "load_validation",
    "open_listing",
]

Pairs = Dataset[tuple[Any, Tensor]]  # an image or its feature maps, and its labels
Pictures = ImageListing | SceneDataset  # what has load(), summary() and classes
COLUMNS = ("nuswide", "vg500")  # their class names are those of columns
EVAL_BATCH = 200  # pictures, in a pass that trains nothing
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
        listed: side -> what :func:`sadcl.train.listed.listed` says of it.
    """

    train: Pictures
    val: Pictures
    classes: tuple[str, ...]
    title: str
    protocol: str
    listed: dict[str, Tensor] = field(default_factory=dict)

    def summary(self) -> str:
        """Counts of both sides, for people, and whether they share pictures."""
        return "\n".join([f"training: {self.train.summary()}", f"validation: {self.val.summary()}", *self._shared()])

    def _shared(self) -> list[str]:
        if not (isinstance(self.train, ImageListing) and isinstance(self.val, ImageListing)):
            return []
        seen = set(self.train.identities)
        shared = [path for path, one in zip(self.val.paths, self.val.identities, strict=True) if one in seen]
        return (
            [f"{len(shared)} of the {len(self.val)} validation pictures are also training pictures ({shared[0]})"]
            if shared
            else []
        )


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
    if config.composed:
        val, classes, protocol = load_validation(config, seed)
        source = find_source(config.source, config.root)
        train_part = split_objects(source, "train", config.split_seed)
        scenes = SceneDataset(train_part, config.train_images, seed, config.image_size)
        both = {"train": listed(scenes, None), "val": listed(val, None)}
        return Images(scenes, val, classes, source.title, protocol, both)
    train = open_listing(config, "train", None)
    if not train.annotated:
        raise ValueError(f"data.train_list {config.list_of('train')}: {train.title} has no annotations to train on")
    val, classes, protocol = load_validation(config, seed, train.classes)
    both = {"train": listed(train, config.start_of("train")), "val": listed(val, config.start_of("val"))}
    return Images(train, val, classes, train.title, protocol, both)


def load_validation(
    config: DataConfig, seed: int, classes: tuple[str, ...] | None = None
) -> tuple[Pictures, tuple[str, ...], str]:
    """Validation images of a config, their label names, and the protocol in words.

    Args:
        config: which data.
        seed: of the run; validation scenes are drawn from another one.
        classes: label names of pictures in files, in order; default: those of the training side.
    """
    if config.composed:
        source = find_source(config.source, config.root)
        val_part = split_objects(source, "val", config.split_seed)
        protocol = (
            f"{config.val_images} composed scenes of held-out {source.name} (30% of the objects of every "
            f"label and 30% of the backgrounds, split seed {config.split_seed})"
        )
        scenes = SceneDataset(val_part, config.val_images, seed + VAL_SEED, config.image_size)
        return scenes, source.labels, protocol
    if classes is None:
        classes = open_listing(config, "train", None).classes
    val = open_listing(config, "val", classes)
    if not val.annotated:
        server = (
            "; validate on val, and write the evaluation server's archive with `sadcl eval CHECKPOINT --voc-archive`"
        )
        raise ValueError(
            f"data.val_list {config.list_of('val')}: {val.title} has no annotations to measure on"
            + (server if isinstance(val, VocDataset) else "")
        )
    return val, classes, _protocol(config, val)


def open_listing(config: DataConfig, side: Side, classes: tuple[str, ...] | None) -> ImageListing:
    """One side of the pictures in files that a config names.

    Args:
        config: which data.
        side: "train" or "val".
        classes: the label names, in order; default: what the config's ``class_names`` or the side's own files say.
    """
    listing = _listing(config, side, classes)
    listing.pixel_range = config.pixel_range
    return listing


def _listing(config: DataConfig, side: Side, classes: tuple[str, ...] | None) -> ImageListing:
    keep: dict[str, Any] = {"missing_images": config.missing_images}
    if config.empty_images is not None:
        keep["empty_images"] = config.empty_images
    size, listed, source = config.image_size, config.list_of(side), config.source
    assert listed  # checked with the config
    if classes is None and config.class_names and source not in COLUMNS:
        classes = read_class_names(config.class_names)
    if source in LISTS:
        keep["root"] = config.folder_of(side)
        if source == "coco_json":
            return CocoDataset(listed, size, classes, **keep)
        kind = CsvDataset if source == "csv" else JsonLinesDataset
        return kind(listed, size, classes, label_separator=config.label_separator, **keep)
    root = config.root
    assert root
    if source in ("coco2014", "coco2017"):
        return coco(root, int(source[-4:]), listed, size, classes, **keep)
    if source in ("voc2007", "voc2012"):
        return VocDataset(root, int(source[-4:]), listed, size, classes, difficult=config.difficult, **keep)
    if source == "nuswide":
        return NusWideDataset(root, listed, size, classes, class_names=config.class_names, **keep)
    assert source == "vg500"
    return VisualGenome500Dataset(root, listed, size, classes, class_names=config.class_names, **keep)


def _protocol(config: DataConfig, val: ImageListing) -> str:
    dropped = "".join(f", {count} {reason} dropped" for reason, count in val.dropped.items())
    if config.source in LISTS:
        return f"the {len(val)} pictures{dropped and f' ({dropped[2:]})'} of {config.list_of('val')}"
    hard = f", difficult objects {config.difficult}" if config.source.startswith("voc") else ""
    return f"the {len(val)} pictures of {val.title}{dropped}{hard}"


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
    backbone = folded(model.backbone).eval()
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low = torch.bfloat16 if config.amp != "off" else None  # float16 overflows in some networks, and is none of a CPU's
    chunk = 8 if device.type == "cpu" else 256

    @torch.inference_mode()
    def extract(batch: Tensor) -> Maps:
        parts = model.preprocessing(batch.to(device)).split(chunk)
        with torch.autocast(device.type, low, enabled=low is not None):
            maps = [backbone(part.contiguous(memory_format=torch.channels_last)) for part in parts]
        return torch.cat(maps) if isinstance(maps[0], Tensor) else tuple(map(torch.cat, zip(*maps, strict=True)))

    sides = []
    key: dict[str, Any]
    pictures: tuple[tuple[str, Pictures], ...] = (("train", images.train), ("val", images.val))
    for name, side in pictures:
        key = {"side": name, "seed": config.seed, "title": images.title, "protocol": images.protocol}
        key["data"] = {k: v for k, v in asdict(config.data).items() if k not in ("workers", "feature_cache")}
        if isinstance(side, ImageListing):
            key["items"] = side.fingerprint()  # a list may have been edited since,
        key["files"] = [DECODING, side.stamp()]  # and pictures replaced
        key["preprocessing"] = model.preprocessing.to_dict()
        key["bfloat16"] = low is not None
        key["backbone"] = [config.model.backbone, model.backbone.strides, _digest(model.backbone)]
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


def _digest(module: torch.nn.Module) -> str:
    """Changes with any weight or buffer (a random backbone's depend on the seed)."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
