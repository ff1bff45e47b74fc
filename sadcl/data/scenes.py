"""Composed scenes: cut-outs pasted on background photos, with labels that are exact because we pasted them.

This is a made-up task for demonstrations and for comparing methods offline; it is not a natural benchmark,
and its figures say nothing about COCO or VOC. Training and validation share no source object and no
background.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sadcl.data.folders import files_stamp
from sadcl.data.images import ImageFileError, load_cutout, load_rgb
from sadcl.data.sources import Background, SceneSource

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SceneDataset"]

MAX_OBJECTS = 5
SCALE = (0.28, 0.6)  # length of an object's longer side, as a fraction of the scene's
MAX_ROTATION = 20.0  # degrees
THEME_PROBABILITY = 0.75
MIN_VISIBLE = 0.5  # a placement that would hide more of any object is rejected
PLACEMENT_TRIES = 12


class SceneDataset(Dataset[tuple[Tensor, Tensor]]):
    """``length`` scenes, each drawn from its own seed ``(seed, index)``: any order, any worker, the same
    scene.

    Every object that can be placed is labelled and every label has an object at least half visible. One
    scene takes about 2.5 ms; the cut-outs are held in memory at drawing size (about 15 MB).

    Args:
        source: pictures to draw from; pass one side of :func:`sadcl.data.sources.split_objects`.
        length: number of scenes.
        seed: seed of the whole set; use different seeds for training and validation.
        image_size: side of a scene in pixels.

    A picture file that cannot be read is skipped with a warning that names it; a label or a background set
    that loses all its pictures this way raises :class:`ImageFileError`.
    """

    def __init__(self, source: SceneSource, length: int, seed: int = 0, image_size: int = 160) -> None:
        if length < 1 or image_size < 16:
            raise ValueError(f"expected length >= 1 and image_size >= 16, got {length} and {image_size}")
        self.classes = source.labels
        self.files = [file for label in source.objects for variants in label for file in variants]
        self.files += [background.path for background in source.backgrounds]
        self.themes = source.themes
        self.length, self.seed, self.image_size = length, seed, image_size
        cutout_side = round(SCALE[1] * image_size * 1.1)
        self.cutouts: list[list[list[Image]]] = []  # label -> object -> variant
        for label, label_objects in zip(source.labels, source.objects, strict=True):
            readable = [[cut for path in files if (cut := _try_cutout(path, cutout_side))] for files in label_objects]
            self.cutouts.append([variants for variants in readable if variants])
            if not self.cutouts[-1]:
                raise ImageFileError(label_objects[0][0], f"no picture of label {label!r} can be read")
        opened = [_try_background(background, 2 * image_size) for background in source.backgrounds]
        self.backgrounds = [image for image in opened if image is not None]
        if not self.backgrounds:
            raise ImageFileError(source.backgrounds[0].path, "no background photo can be read")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Scene ``index``: (RGB image uint8 [3, H, W], labels float32 [C] of 0 and 1)."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        scene, placed = self.compose(index)
        labels = torch.zeros(len(self.classes), device="cpu")
        labels[placed] = 1.0
        return torch.from_numpy(scene).permute(2, 0, 1).contiguous(), labels

    def load(self, index: int, at_least: int | None = None) -> tuple[Tensor, Tensor]:
        """The same as ``self[index]``: a scene has no other size (``at_least`` is for pictures in files)."""
        del at_least
        return self[index]

    def stamp(self) -> str:
        """Changes with the picture files that scenes are composed of."""
        return files_stamp(self.files)

    def summary(self) -> str:
        """Counts for people: scenes, labels, and what they are drawn from."""
        objects = sum(map(len, self.cutouts))
        return (
            f"{self.length} composed scenes, {len(self.classes)} labels, drawn from {objects} objects "
            f"on {len(self.backgrounds)} backgrounds"
        )

    def compose(self, index: int) -> tuple[np.ndarray, list[int]]:
        """Draw scene ``index``: (uint8 [H, W, 3], label of every placed object in drawing order)."""
        rng = np.random.default_rng([self.seed, index])
        scene = self._draw_background(rng)
        owner = np.full(scene.shape[:2], -1, dtype=np.int64)  # which object one sees at a pixel
        areas: list[int] = []
        placed: list[int] = []
        for label in self._choose_labels(rng):
            if self._place(scene, owner, areas, self._choose_cutout(label, rng), rng):
                placed.append(label)
        return scene, placed

    def _choose_labels(self, rng: np.random.Generator) -> list[int]:
        count = int(rng.integers(1, MAX_OBJECTS + 1))
        if self.themes and rng.random() < THEME_PROBABILITY:
            pool = self.themes[int(rng.integers(len(self.themes)))]
        else:
            pool = tuple(range(len(self.classes)))
        labels: list[int] = []
        for first, second in rng.integers(len(pool), size=(count, 2)):  # a repeated label is drawn again, once
            labels.append(pool[second if pool[first] in labels else first])
        return labels

    def _choose_cutout(self, label: int, rng: np.random.Generator) -> Image:
        variants = self.cutouts[label][int(rng.integers(len(self.cutouts[label])))]
        return variants[int(rng.integers(len(variants)))]

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        """A random square of a background photo, flipped half of the time: uint8 [H, W, 3], writable."""
        photo = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
        side = int(min(photo.size) * rng.uniform(0.5, 1.0))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        crop = photo.resize((self.image_size,) * 2, 2, (left, top, left + side, top + side))  # 2 = bilinear
        pixels = np.asarray(crop)
        opaque = np.full((*pixels.shape[:2], 1), 255, dtype=np.uint8)
        return _jitter(pixels[:, ::-1] if rng.random() < 0.5 else pixels, opaque, rng).astype(np.uint8)

    def _place(
        self, scene: np.ndarray, owner: np.ndarray, areas: list[int], cutout: Image, rng: np.random.Generator
    ) -> bool:
        """Paste ``cutout`` so that every object stays half visible or more; False if no place was found."""
        rgb, alpha = _transform(cutout, rng.uniform(*SCALE) * self.image_size, rng, self.image_size)
        height, width = alpha.shape
        solid = alpha > 127
        area = int(solid.sum())
        if area == 0:
            return False
        visible = np.bincount(owner[owner >= 0], minlength=len(areas))
        for _ in range(PLACEMENT_TRIES):
            top = int(rng.integers(self.image_size - height + 1))
            left = int(rng.integers(self.image_size - width + 1))
            window = (slice(top, top + height), slice(left, left + width))
            under = owner[window][solid]
            hidden = np.bincount(under[under >= 0], minlength=len(areas))
            if np.all(visible - hidden >= MIN_VISIBLE * np.asarray(areas)):
                seen_through = np.float32(1.0) - alpha[..., None] * np.float32(1.0 / 255.0)
                scene[window] = np.minimum(scene[window] * seen_through + rgb, 255.0).astype(np.uint8)
                owner[window][solid] = len(areas)
                areas.append(area)
                return True
        return False


def _transform(cutout: Image, side: float, rng: np.random.Generator, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale, flip, rotate and colour a cut-out.

    Returns:
        Premultiplied RGB float32 [h, w, 3] and alpha uint8 [h, w], with h and w <= limit.
    """
    shrink = side / max(cutout.size)
    size = (max(1, round(cutout.width * shrink)), max(1, round(cutout.height * shrink)))
    image = cutout.resize(size, 2)
    if rng.random() < 0.5:
        image = image.transpose(0)  # type: ignore[arg-type]  # FLIP_LEFT_RIGHT
    image = image.rotate(rng.uniform(-MAX_ROTATION, MAX_ROTATION), 2, expand=True)  # type: ignore[arg-type]
    pixels = np.asarray(image)[:limit, :limit]
    return _jitter(pixels[..., :3], pixels[..., 3:], rng), pixels[..., 3]


def _jitter(rgb: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast and saturation, and a slight colour cast, by one 3x3 matrix and a shift.

    Args:
        rgb: uint8 [h, w, 3], premultiplied by alpha (so the shift is too).
        alpha: uint8 [h, w, 1].
        rng: where the randomness comes from.

    Returns:
        float32 [h, w, 3] in 0..255.
    """
    brightness, contrast, saturation = rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2), rng.uniform(0.7, 1.3)
    gray = np.full((3, 3), 1.0 / 3.0)
    matrix = brightness * contrast * (saturation * np.eye(3) + (1.0 - saturation) * gray)
    matrix = matrix * rng.uniform(0.94, 1.06, size=3)
    shift = 127.5 * brightness * (1.0 - contrast)
    jittered = rgb.reshape(-1, 3).astype(np.float32) @ matrix.astype(np.float32)
    jittered += alpha.reshape(-1, 1) * np.float32(shift / 255.0)
    return np.clip(jittered, 0.0, 255.0, out=jittered).reshape(rgb.shape)


def _try_cutout(path: object, max_side: int) -> Image | None:
    try:
        return load_cutout(str(path), max_side).convert("RGBa")  # premultiplied: resizing mixes no hidden colours
    except ImageFileError as error:
        warnings.warn(f"skipped {error}", stacklevel=2)
        return None


def _try_background(background: Background, min_side: int) -> Image | None:
    try:
        photo = load_rgb(background.path)
    except ImageFileError as error:
        warnings.warn(f"skipped {error}", stacklevel=2)
        return None
    left, top, right, bottom = background.box
    photo = photo.crop(
        (
            round(left * photo.width),
            round(top * photo.height),
            round(right * photo.width),
            round(bottom * photo.height),
        )
    )
    shrink = min_side / min(photo.size)
    if shrink < 1:
        photo = photo.resize((round(photo.width * shrink), round(photo.height * shrink)), 1)  # 1 = Lanczos
    return photo
