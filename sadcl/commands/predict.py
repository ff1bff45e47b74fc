"""Pictures to labels: files, folders and lists of paths; batched; what cannot be read is named and passed over."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sadcl._json import dumps
from sadcl.data.images import ImageFileError, image_tensor, picture_suffixes
from sadcl.model import SADCL

__all__ = [
    "Prediction",
    "entry",
    "find_pictures",
    "main",
    "parse_threshold",
    "predict_pictures",
]

DECODERS = min(8, os.cpu_count() or 1)  # threads: Pillow decodes without the interpreter lock


@dataclass
class Prediction:
    """What became of one picture.

    Attributes:
        path: as it was given.
        error: why there is no prediction; empty if there is one.
        probabilities: [C] on the CPU.
        picture: uint8 [3, S, S], and ``attention`` [C, h, w] (mean over heads), where attention was asked for.
    """

    path: str
    error: str = ""
    probabilities: Tensor | None = None
    picture: Tensor | None = None
    attention: Tensor | None = None


def find_pictures(given: Iterable[str], stdin: BinaryIO, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Paths of pictures, in order: files as given, folders searched through, ``-`` replaced by what stdin lists.

    Args:
        given: files (of any suffix, existing or not), folders (every file in them with a suffix of
            :func:`sadcl.data.images.picture_suffixes`, subfolders included, hidden files and folders not, sorted), or
            ``-``.
        stdin: one path a line, in the bytes of the file system or, after a byte-order mark, in UTF-8 or UTF-16; a
            folder is searched here, too.
        passed_over: counts the files of folders that are left out, by suffix.
    """
    for name in given:
        if name == "-":
            yield from find_pictures((path for path in _lines(stdin) if path not in ("", "-")), stdin, passed_over)
        elif os.path.isdir(name):
            for folder, subfolders, files in os.walk(name):
                subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
                for file in sorted(file for file in files if not file.startswith(".")):
                    suffix = os.path.splitext(file)[1].lower()
                    if suffix in picture_suffixes():
                        yield os.path.join(folder, file)
                    elif passed_over is not None:
                        passed_over[suffix or "no suffix"] += 1
        else:
            yield name


def _lines(stdin: BinaryIO) -> Iterator[str]:
    first = stdin.readline()
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from (first + stdin.read()).decode("utf-16").splitlines()
        return
    for line in chain([first.removeprefix(codecs.BOM_UTF8)], stdin):
        yield os.fsdecode(line.rstrip(b"\r\n"))


@torch.inference_mode()
def predict_pictures(
    model: SADCL,
    paths: Sequence[str],
    batch_size: int = 32,
    attention: bool = False,
    pixel_range: Sequence[float] | None = None,
) -> Iterator[Prediction]:
    """Predict picture by picture, in the order of ``paths``, on the model's device.

    Args:
        model: in eval mode.
        paths: picture files.
        batch_size: pictures that go through the model at once.
        attention: also return each picture and where the model looks.
        pixel_range: see :func:`sadcl.data.images.load_rgb`; what the model was trained with.
    """
    device = next(model.parameters()).device
    side = model.preprocessing.size[0]

    def decode(path: str) -> Tensor | str:
        try:
            return image_tensor(path, side, pixel_range)
        except ImageFileError as error:
            return str(error).removeprefix(f"{path}: ")

    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, len(paths), batch_size):
            names = paths[start : start + batch_size]
            decoded = list(pool.map(decode, names))
            pictures = [item for item in decoded if isinstance(item, Tensor)]
            if pictures:
                batch = model.preprocessing(torch.stack(pictures).to(device))
                output = model(batch, need_weights=attention, contrastive=False)
                rows = iter(output.logits.float().sigmoid().cpu())
                maps = iter(output.attention.mean(1).float().cpu() if output.attention is not None else ())
            for name, item in zip(names, decoded, strict=True):
                if isinstance(item, str):
                    yield Prediction(name, item)
                elif attention:
                    yield Prediction(name, "", next(rows), item, next(maps))
                else:
                    yield Prediction(name, "", next(rows))


def entry(prediction: Prediction, classes: Sequence[str], thresholds: Tensor, top: int) -> dict[str, Any]:
    """The JSON entry of a picture: ``labels`` above their thresholds and the ``top`` ones, both falling."""
    if prediction.probabilities is None:
        return {"image": prediction.path, "error": prediction.error}
    chance = prediction.probabilities
    order = chance.argsort(descending=True, stable=True).tolist()
    rounded = {classes[i]: round(float(chance[i]), 4) for i in order}
    labels = {classes[i]: rounded[classes[i]] for i in order if chance[i] > thresholds[i]}
    return {"image": prediction.path, "labels": labels, "top": dict(list(rounded.items())[: max(1, top)])}


def parse_threshold(text: str) -> float | str:
    """The value of ``--threshold``: a probability, or the word ``tuned``."""
    if text == "tuned":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a probability 0..1 or the word tuned, got {text!r}")
    return value


def main(arguments: Sequence[str]) -> int:
    """``sadcl predict``: 0, or 1 if a picture could not be read (the others are predicted all the same)."""
    parser = argparse.ArgumentParser(
        prog="sadcl predict",
        description="Labels and probabilities of pictures. Exit code 1 if some could not be read, with their paths on "
        "stderr; the others are predicted all the same.",
    )
    parser.add_argument("checkpoint", help="a .pt file written by sadcl train")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files, folders of them, - for paths on stdin"
    )
    parser.add_argument(
        "--threshold",
        "--thresholds",
        type=parse_threshold,
        default=0.5,
        metavar="P",
        help="probability above which a label is given, or `tuned`: the checkpoint's own, one per label (default: 0.5)",
    )
    parser.add_argument("--top", type=int, default=5, help="how many labels to show at least (default: 5)")
    parser.add_argument("--json", action="store_true", help="JSON lines: one object a picture, as soon as it is done")
    parser.add_argument("--output", metavar="FOLDER", help="write overlays (PNG) here: where the model looks")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size: expected at least 1, got {options.batch_size}")

    from sadcl.checkpoint import load_checkpoint, restore_model, thresholds_of

    content = load_checkpoint(options.checkpoint)
    classes, thresholds = content["classes"], thresholds_of(content, options.threshold)
    model = restore_model(content).to(_device(options.device))
    passed_over: Counter[str] = Counter()
    stdin = sys.stdin.buffer if "-" in options.images and sys.stdin is not None else io.BytesIO()
    paths = list(find_pictures(options.images, stdin, passed_over))
    if passed_over:
        kinds = ", ".join(f"{_printable(suffix)} {count}" for suffix, count in passed_over.most_common(8))
        print(f"sadcl predict: passed over, no pictures: {passed_over.total()} files ({kinds})", file=sys.stderr)
    if not paths:
        raise ValueError(
            f"no pictures: {', '.join(options.images)} (suffixes: {', '.join(sorted(picture_suffixes()))})"
        )
    overlays = None if options.output is None else _Overlays(options.output, classes, options.top)
    wide = min(60, max(len(_printable(path)) for path in paths))
    failed = 0
    pixel_range = content["config"]["data"].get("pixel_range")
    for prediction in predict_pictures(model, paths, options.batch_size, overlays is not None, pixel_range):
        found = entry(prediction, classes, thresholds, options.top)
        if prediction.error:
            failed += 1
            print(f"sadcl predict: {_printable(prediction.path)}: {prediction.error}", file=sys.stderr)
        elif overlays is not None:
            found["overlay"] = str(overlays.write(prediction))
        if options.json:
            print(dumps(found), flush=True)
        elif not prediction.error:
            print(_row(found, wide))
    if failed:
        print(f"sadcl predict: {failed} of {len(paths)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _printable(text: str) -> str:
    """A path on one line, whatever its bytes are."""
    text = os.fsencode(text).decode(errors="replace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _row(found: dict[str, Any], wide: int) -> str:
    """``path   label 0.93, label 0.71  (next: label 0.31)``."""
    given = ", ".join(f"{name} {p:.2f}" for name, p in found["labels"].items()) or "no label"
    after = ", ".join(f"{name} {p:.2f}" for name, p in found["top"].items() if name not in found["labels"])
    return f"{_printable(found['image']):{wide}}  {given}" + (f"  (next: {after})" if after else "")


class _Overlays:
    """Writes one overlay a picture, never two under one name."""

    def __init__(self, folder: str, classes: Sequence[str], top: int) -> None:
        self.folder, self.classes, self.top = Path(folder), list(classes), top
        self.taken: set[str] = set()

    def write(self, prediction: Prediction) -> Path:
        from sadcl.report.outputs import predictions
        from sadcl.report.plots import plot_attention

        assert prediction.probabilities is not None and prediction.picture is not None
        assert prediction.attention is not None
        path = Path(prediction.path)
        names = [path.stem, path.name, *(f"{path.stem}.{i}" for i in range(2, len(self.taken) + 3))]
        name = next(name for name in names if name not in self.taken)
        self.taken.add(name)
        shown = predictions(prediction.probabilities, self.classes, self.top)
        target = self.folder / f"{name}.labels.png"
        title, heading = _printable(path.name), "where the model looks for each label"
        plot_attention(target, [prediction.picture], [title], [prediction.attention], [shown], heading)
        return target
