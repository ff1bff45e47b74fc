"""The part of a run's configuration that says which pictures it uses."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["DataConfig", "Side"]

Side = Literal["train", "val"]
LISTS = ("csv", "jsonl", "coco_json")
DATA_SETS = ("coco2014", "coco2017", "voc2007", "voc2012", "nuswide", "vg500")
# What the sides are called inside a data set. VOC 2012's test set has no annotations, so its own val is held out.
SPLITS = {
    "coco2014": {"train": "train", "val": "val"},
    "coco2017": {"train": "train", "val": "val"},
    "voc2007": {"train": "trainval", "val": "test"},
    "voc2012": {"train": "train", "val": "val"},
    "nuswide": {"train": "train", "val": "test"},
    "vg500": {"train": "train", "val": "test"},
}


@dataclass
class DataConfig:
    """The pictures.

    Args:
        source: composed scenes of photo cut-outs or emoji drawings (auto: photos if installed); lists of your own
            pictures (csv, jsonl, coco_json); or a data set in the folders that it unpacks to.
        root: folder of the data set, or of the pictures that a list names (default: the list's own folder), or of
            the scenes' cut-outs.
        train_list: the training list of source csv (lines of `path,label;label`), jsonl (lines of `{"path": "...",
            "labels": ["..."]}`) or coco_json (a file like COCO's instances_train.json); with VOC the name of a list
            in ImageSets/Main (default: trainval of 2007, train of 2012).
        val_list: the same for validation (VOC default: test of 2007, val of 2012).
        train_csv: the same as train_list, with source csv.
        val_csv: the same as val_list, with source csv.
        train_folder: folder that the training list's paths start from, where it is not root.
        val_folder: folder that the validation list's paths start from, where it is not root.
        class_names: file of the label names, one a line, in their order (nuswide, vg500: that of the data set's
            columns; lists of your own: else sorted, numbers by value; VOC and COCO: else the data set's own).
        label_separator: what stands between the labels of a cell in a csv (default: `;`, or a list as Python and JSON
            write it); `tab` and `space` in words.
        pixel_range: the values that are black and white in pictures of one band of more than 8 bits, such as
            `[0, 4095]`; default: the range of their format (floating point: 0..1 or 0..255).
        empty_images: keep or drop pictures without a label (default: keep; nuswide: drop).
        missing_images: what to do when a listed picture is not there: stop at once, or drop it and say how many.
        difficult: VOC: a label whose objects are all marked difficult is absent (negative), or ignored.
        image_size: side of the square model input in pixels.
        train_images: number of training scenes.
        val_images: number of validation scenes.
        split_seed: which objects and backgrounds are held out for validation.
        workers: processes that draw or decode pictures.
        feature_cache: folder for the frozen backbone's feature maps; default: `features` in the output
            folder.
    """

    source: Literal[
        "auto", "photos", "emoji",
        "csv", "jsonl", "coco_json",
        "coco2014", "coco2017", "voc2007", "voc2012", "nuswide", "vg500",
    ] = "auto"  # fmt: skip
    root: str | None = None
    train_list: str | None = None
    val_list: str | None = None
    train_csv: str | None = None
    val_csv: str | None = None
    train_folder: str | None = None
    val_folder: str | None = None
    class_names: str | None = None
    label_separator: str | None = None
    pixel_range: list[float] | None = None
    empty_images: Literal["keep", "drop"] | None = None
    missing_images: Literal["error", "drop"] = "error"
    difficult: Literal["negative", "ignored"] = "negative"
    image_size: int = 256
    train_images: int = 2400
    val_images: int = 1000
    split_seed: int = 0
    workers: int = 1
    feature_cache: str | None = None

    @property
    def composed(self) -> bool:
        """Whether the pictures are composed scenes (else they are files)."""
        return self.source not in LISTS and self.source not in DATA_SETS

    def list_of(self, side: Side) -> str | None:
        """The list of a side: a file, or the name of a split."""
        given = self.train_list if side == "train" else self.val_list
        if given is None and self.source == "csv":
            given = self.train_csv if side == "train" else self.val_csv
        return given or SPLITS.get(self.source, {}).get(side)

    def folder_of(self, side: Side) -> str | None:
        """The folder that a side's paths start from, if it was given."""
        return (self.train_folder if side == "train" else self.val_folder) or self.root

    def start_of(self, side: Side) -> str | None:
        """The folder that a side's paths start from."""
        given = self.folder_of(side)
        return os.path.dirname(self.list_of(side) or "") if given is None and self.source in LISTS else given

    def validated_on(self, source: str, path: str) -> DataConfig:
        """The same input to the model, measured on another list."""
        if source not in LISTS:
            raise ValueError(f"source: expected one of {', '.join(LISTS)}, got {source!r}")
        plain = replace(self, root=None, val_csv=None, val_folder=None, empty_images=None, missing_images="error")
        return replace(plain, source=source, val_list=path)  # type: ignore[arg-type]

    def problem(self) -> str | None:
        """Why this configuration cannot run, in words; None if it can."""
        if self.pixel_range is not None and not (
            len(self.pixel_range) == 2 and self.pixel_range[0] < self.pixel_range[1]
        ):
            return f"data.pixel_range: expected two numbers, the lower first, got {self.pixel_range}"
        lists = [name for name in ("train_list", "val_list", "train_csv", "val_csv") if getattr(self, name)]
        if self.source in LISTS:
            if not (self.list_of("train") and self.list_of("val")):
                names = "train_csv and data.val_csv" if self.source == "csv" else "train_list and data.val_list"
                return f"data.source {self.source} needs data.{names}"
        elif lists and not self.source.startswith("voc"):
            return f"data.{lists[0]} has no meaning with data.source {self.source}; expected one of {', '.join(LISTS)}"
        if self.source in DATA_SETS and not self.root:
            return f"data.source {self.source} needs data.root, the folder that the data set was unpacked to"
        return None
