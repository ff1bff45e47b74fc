"""``sadcl export``: backbone and head as one ONNX or torch.export program, in plain operators.

The program takes pictures as they come out of a decoder, ``uint8 [B, 3, H, W]`` (RGB, resized to the model's size),
for any B: the normalisation is part of it, so it cannot be forgotten or done twice. It gives ``logits`` and
``probabilities``, both float32 ``[B, C]``. Resizing stays outside. Class names, thresholds and preprocessing are in
``NAME.json`` beside the program ``NAME``, and in an ONNX file's own metadata too.

Nothing arrives at its path before it was read back from disk, run, and compared with the eager model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sadcl._json import dumps
from sadcl.attention import LabelAttention
from sadcl.checkpoint import load_checkpoint, make_folder, restore_model, save_weights
from sadcl.commands.predict import find_pictures
from sadcl.data.images import image_tensor
from sadcl.functional.label_attention import choose_form
from sadcl.functional.linear import SWITCH
from sadcl.model import SADCL

__all__ = ["FORMATS", "ExportError", "export_checkpoint", "export_model", "main", "plain_operators"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
WEIGHTS = "safetensors"  # not a program: the model alone
OUTPUTS = ("logits", "probabilities")
TOLERANCE = 1e-4
REAL_IMAGES = 8
RANDOM_BATCHES = (1, 2, 5)  # the batch must be dynamic
OPSET = 18


class ExportError(ValueError):
    """The exported program is not what it should be; nothing was written."""


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Let the library compute in torch's own operators: its switches, for as long as the context lasts.

    They are environment variables, hence the whole process's; use it in a process that does nothing else.
    """
    wanted = {"SADCL_BACKEND": "torch", SWITCH: "torch"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Recogniser(nn.Module):
    """Pictures in, logits and probabilities out: a copy of a model without what prediction does not need."""

    def __init__(self, model: SADCL) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        head = self.model.head
        head.projection = head.prototypes = head.memory_bank = None
        length = head.position.size[0] * head.position.size[1]
        for index, layer in enumerate(head.decoder):
            attention = layer.cross_attn
            assert isinstance(attention, LabelAttention)
            # The flop count that picks a form compares batch sizes, which an exported program must not know.
            sizes = (1, head.num_classes, length, head.hidden_dim, attention.num_heads)
            attention.form = choose_form(*sizes, shared=index == 0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``uint8 [B, 3, H, W]`` to logits and probabilities ``[B, C]``."""
        logits = self.model(self.model.preprocessing.normalize(images), contrastive=False).logits
        return logits, logits.sigmoid()


Runner = Callable[[Tensor], tuple[Tensor, Tensor]]


def export_model(
    model: SADCL,
    output: str | os.PathLike[str],
    kind: str = "onnx",
    *,
    about: Mapping[str, Any] | None = None,
    pictures: Tensor | None = None,
) -> dict[str, Any]:
    """Export a model, compare the result with eager, and put both files in their place.

    Args:
        model: any SADCL; it is copied, not changed.
        output: path of the program; ``.json`` is added to it for the JSON file.
        kind: a name out of :data:`FORMATS`.
        about: plain values for the JSON file (class names, thresholds, ...).
        pictures: uint8 ``[n, 3, H, W]`` of the model's size to compare on, besides random ones.

    Returns:
        What the JSON file holds; ``checked`` has the largest differences of the logits.

    Raises:
        ExportError: the program differs from eager by more than 1e-4, or is not made of plain operators.
        ImportError: a package for this format is missing.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind: expected one of {', '.join(FORMATS)}, got {kind!r}")
    path = Path(output)
    make_folder(path.parent)
    recogniser = _Recogniser(model)
    facts: dict[str, Any] = {"format": kind, **_interface(model), **(about or {}), "versions": _versions(kind)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        program = _trace(recogniser, model.preprocessing.size)
        if kind == "onnx":
            _write_onnx(program, draft, facts)
        else:
            torch.export.save(program, draft)
        facts["checked"] = _compare(model, _runner(draft, kind), pictures)
        facts["sha256"] = hashlib.sha256(draft.read_bytes()).hexdigest()
        (draft.parent / f"{path.name}.json").write_text(dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
        _move_all(draft.parent, path.parent, last=path.name)
    return facts


def _interface(model: SADCL) -> dict[str, Any]:
    """What goes in and out, for whoever runs the program without this library."""
    height, width = model.preprocessing.size
    shape = ["batch", 3, height, width]
    return {
        "input": {"name": "images", "dtype": "uint8", "shape": shape, "colour": "RGB", "layout": "NCHW"},
        "outputs": {name: {"dtype": "float32", "shape": ["batch", model.num_classes]} for name in OUTPUTS},
        "preprocessing": {
            **model.preprocessing.to_dict(),
            "resize": "bilinear, antialiased, to the size, aspect not kept: by you",
            "normalisation": "in the program: (pixels * scale - mean) / std",
        },
    }


def _versions(kind: str) -> dict[str, str]:
    import sadcl

    versions = {"sadcl": sadcl.__version__, "torch": torch.__version__}
    if kind == "onnx":
        import onnx
        import onnxruntime

        versions |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "opset": str(OPSET)}
    return versions


def _trace(recogniser: _Recogniser, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The program for any batch size; refused if an operator of ours is in it, which nobody else could run."""
    example = torch.zeros((2, 3, *size), dtype=torch.uint8, device="cpu")
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=65536)}}
    with plain_operators(), torch.no_grad():
        program = torch.export.export(recogniser, (example,), dynamic_shapes=dynamic, strict=False)
    ours = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("sadcl")})
    if ours:
        raise ExportError(f"the program holds operators of this library alone: {', '.join(ours)}")
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, Any]) -> None:
    """One self-contained .onnx file, with the facts in its metadata (values are JSON)."""
    import onnx

    names = {"input_names": ["images"], "output_names": list(OUTPUTS)}
    with _quiet("onnx_ir", "onnxscript", "torch.onnx"):
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)  # type: ignore
    assert exported is not None
    exported.model.metadata_props.update({key: dumps(value, ensure_ascii=False) for key, value in facts.items()})
    exported.save(path, external_data=False)
    foreign = {node.domain for node in onnx.load(path, load_external_data=False).graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the program holds operators outside ONNX's own: {', '.join(sorted(foreign))}")


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Hear no more than errors of some packages, which warn of what they did not optimise."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _runner(path: Path, kind: str) -> Runner:
    """What runs the file on disk, on this machine's CPU."""
    if kind == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(list(OUTPUTS), {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run


@torch.no_grad()
def _compare(model: SADCL, run: Runner, pictures: Tensor | None) -> dict[str, Any]:
    """Largest |difference| of the logits against the eager model as it is used here, on its own fast operators."""
    eager = copy.deepcopy(model).cpu().float().eval()
    size = model.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    how: Any = {"dtype": torch.uint8, "generator": generator, "device": "cpu"}
    batches = [torch.randint(0, 256, (n, 3, *size), **how) for n in RANDOM_BATCHES]
    checked: dict[str, Any] = {"tolerance": TOLERANCE, "random": 0.0, "random_images": sum(RANDOM_BATCHES)}
    checked |= {"real": None, "real_images": 0 if pictures is None else len(pictures)}
    named = [("random", batch) for batch in batches]
    if pictures is not None and len(pictures):
        named += [("real", part) for part in pictures.split(16)]
    for name, images in named:
        wanted = eager(model.preprocessing(images), contrastive=False).logits
        for what, got, expected in zip(OUTPUTS, run(images), (wanted, wanted.sigmoid()), strict=True):
            if got.shape != expected.shape:
                raise ExportError(f"{what} of {len(images)} {name} images: {tuple(got.shape)}, eager says otherwise")
            error = float((got - expected).abs().max())
            if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):  # NaN fails this too
                raise ExportError(f"{what} of {name} images differ from eager by {error:.2g} (allowed: {TOLERANCE:g})")
            if what == "logits":
                checked[name] = max(checked[name] or 0.0, error)
    return checked


def _move_all(source: Path, target: Path, last: str) -> None:
    """Move whole files to their place, ``last`` at the end; each arrives complete or not at all."""
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        os.chmod(file, 0o644)
        os.replace(file, target / file.name)


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    kind: str = "onnx",
    pictures: Sequence[str] | None = None,
) -> dict[str, Any]:
    """:func:`export_model` of a file of ``sadcl train``, with its class names, thresholds and origin.

    Args:
        checkpoint: what to export.
        output: path of the program.
        kind: a name out of :data:`FORMATS`.
        pictures: picture files to compare on; default: the first validation pictures of the checkpoint's own data.

    Returns:
        What the JSON file holds.
    """
    content = load_checkpoint(checkpoint)
    model = restore_model(content)
    if pictures is None:
        images = _validation_pictures(content)
    else:
        images = torch.stack([image_tensor(path, model.preprocessing.size[0]) for path in pictures])
    about = {
        "classes": list(content["classes"]),
        "thresholds": {"default": 0.5, "tuned": content.get("thresholds")},
        "checkpoint": {key: content.get(key) for key in ("stage", "epoch", "title", "protocol")},
        "architecture": content["architecture"],
    }
    return export_model(model, output, kind, about=about, pictures=images)


def _validation_pictures(content: Mapping[str, Any]) -> Tensor:
    """The first validation pictures of a loaded checkpoint's own data: uint8 ``[n, 3, H, W]``."""
    from sadcl.train.config import config_from_dict
    from sadcl.train.data import load_validation

    config = config_from_dict(content["config"])
    try:
        images, _, _ = load_validation(config.data, config.seed, tuple(content["classes"]))
        count = min(REAL_IMAGES, len(images))  # type: ignore[arg-type]
        return torch.stack([images[i][0] for i in range(count)])
    except (ValueError, OSError) as error:
        raise ExportError(f"no validation pictures to compare on ({error}); name some with --images") from error


def _export_weights(checkpoint: str, output: str | None) -> int:
    content = load_checkpoint(checkpoint)
    path = Path(output or Path(checkpoint).with_suffix(f".{WEIGHTS}"))
    if path.suffix != f".{WEIGHTS}":
        raise ValueError(f"--output {path}: expected a name that ends in .{WEIGHTS}")
    save_weights(path, content)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    print(f"{path} ({size}): the weights, with the names of {len(content['classes'])} classes")
    return 0


def main(arguments: Sequence[str]) -> int:
    """``sadcl export``."""
    parser = argparse.ArgumentParser(
        prog="sadcl export",
        description="Backbone and head as one program in plain operators: uint8 pictures [B, 3, H, W] in, logits and "
        "probabilities [B, C] out, any B. It is compared with the model here, on random and on real pictures, before "
        "it is written; what describes it is written beside it as JSON.",
    )
    parser.add_argument("checkpoint", help="a .pt file written by sadcl train")
    parser.add_argument(
        "--format",
        choices=[*FORMATS, WEIGHTS],
        default="onnx",
        help="what to write (default: onnx); safetensors: no program, but the weights alone with class names, "
        "preprocessing, thresholds and config, for sadcl eval, predict and export",
    )
    parser.add_argument("--output", help="the program's path (default: beside the checkpoint, under its name)")
    parser.add_argument(
        "--images",
        nargs="+",
        help="pictures (files or folders) to compare on; default: validation pictures of the checkpoint's own data",
    )
    options = parser.parse_args(arguments)
    if options.format == WEIGHTS:
        return _export_weights(options.checkpoint, options.output)
    output = options.output or Path(options.checkpoint).with_suffix(FORMATS[options.format])
    pictures = None
    if options.images is not None:
        pictures = list(find_pictures(options.images, io.BytesIO()))[:REAL_IMAGES]
        if not pictures:
            raise ValueError(f"--images: no pictures in {', '.join(options.images)}")
    facts = export_checkpoint(options.checkpoint, output, options.format, pictures)
    checked = facts["checked"]
    shape = ", ".join(map(str, facts["input"]["shape"]))
    print(f"{output} ({os.path.getsize(output) / 1e6:.1f} MB): uint8 [{shape}] to logits, probabilities")
    for name in ("random", "real"):
        count = checked[f"{name}_images"]
        print(f"  logits against eager on {count} {name} images: largest difference {checked[name]:.1e}")
    print(f"  classes, thresholds, preprocessing: {output}.json")
    return 0
