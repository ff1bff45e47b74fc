"""``sadcl train --dry-run``: what a config would do. Needs neither pictures nor weights, nor memory for the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sadcl._own import own_tensors
from sadcl.backbone_weights import PACKAGED, where_weights_are
from sadcl.data.features import SHARD_IMAGES
from sadcl.losses import DualContrastiveLoss
from sadcl.model import SADCL
from sadcl.train.build import make_loss
from sadcl.train.config import AugmentConfig, StepConfig, TrainConfig, augments
from sadcl.train.data import load_images
from sadcl.train.optim import advance, make_optimizer, make_schedule

__all__ = ["plan"]

# Images to train on, images to validate on, labels: what is assumed of a data set that is not here.
PUBLISHED = {
    "coco2014": (82_783, 40_504, 80),
    "coco2017": (118_287, 5_000, 80),
    "voc2007": (5_011, 4_952, 20),
    "voc2012": (5_717, 5_823, 20),
    "nuswide": (125_449, 83_898, 81),
    "vg500": (82_904, 10_000, 500),
}
MIB = 2**20
Counts = tuple[int, int, int]  # images to train on, images to validate on, labels


def plan(config: TrainConfig) -> str:
    """The resolved plan of a config, in lines for people."""
    counts, data = _data(config)
    model = _meta_model(config, counts[2], contrastive=True)
    lines = ["data", *data, "", "model", *_model_lines(config, model), "", "memory on the device, estimated"]
    lines += _memory_lines(config, model)
    lines += _feature_lines(config, model, counts)
    for name, step in (("step1", config.step1), ("control", config.step2), ("step2", config.step2)):
        if step.epochs == 0 or (name == "control" and not config.control):
            continue
        trained = model if name == "step2" else _meta_model(config, counts[2], contrastive=False)
        lines += ["", name, *_stage_lines(config, name, step, counts[0], trained)]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", "run", f"  device {where}, amp {config.amp}, seed {config.seed}, output {config.output}"]
    if config.amp == "fp16" and where == "cpu":
        lines.append("  amp fp16 needs a GPU, and torch can use none here: this config would be refused")
    if config.ema.decay:
        warm = " with warm-up" if config.ema.warmup else ""
        lines.append(f"  average of the weights: decay {config.ema.decay:g}{warm}; a step ends with: {config.ema.keep}")
    if config.eval_image_size:
        lines.append(f"  the finished models are also measured at {config.eval_image_size} pixels")
    every = f"every {config.checkpoint_every} optimizer steps and " if config.checkpoint_every else ""
    lines.append(f"  last.pt is written {every}at the ends of epochs")
    return "\n".join(lines)


def _data(config: TrainConfig) -> tuple[Counts, list[str]]:
    """(images to train on, to validate on, labels) and what is there to say of them."""
    data = config.data
    try:
        images = load_images(data, config.seed)
    except (ValueError, OSError) as error:
        counts = PUBLISHED.get(data.source, (data.train_images, data.val_images, 20))
        assumed = f"  assumed: {counts[0]:,} training and {counts[1]:,} validation images, {counts[2]} labels"
        return counts, [f"  {data.source}: not found at {data.root or data.list_of('train') or '-'}: {error}", assumed]
    counts = (len(images.train), len(images.val), len(images.classes))
    found = "\n".join([images.title, images.summary()]).splitlines()
    return counts, [f"  {line}" for line in found] + [f"  input {data.image_size} x {data.image_size}"]


def _meta_model(config: TrainConfig, num_classes: int, contrastive: bool) -> SADCL:
    """The model of step 2 (or of step 1) without any memory behind its tensors."""
    from sadcl.train.run import build_model

    empty = replace(config, model=replace(config.model, pretrained=False))
    with torch.device("meta"):
        model = build_model(empty, num_classes)
        if contrastive:
            model.head.init_contrastive(None, config.batch_size)
    return model


def _model_lines(config: TrainConfig, model: SADCL) -> list[str]:
    parts: dict[str, nn.Module | Sequence[Tensor]] = {
        "backbone": model.backbone,
        "transformer": nn.ModuleList([model.head.input_proj, model.head.encoder, model.head.decoder]),
        "queries, norm, classifier": [
            model.head.queries,
            *model.head.decoder_norm.parameters(),
            *model.head.classifier.parameters(),
        ],
        "projection (step 2)": model.head.projection or [],
        "prototypes (step 2)": [] if model.head.prototypes is None else [model.head.prototypes],
    }
    lines = [f"  {'':28}{'trained':>14}{'frozen':>14}"]
    for name, part in parts.items():
        tensors = list(part.parameters()) if isinstance(part, nn.Module) else list(part)
        trained = _numel(p for p in tensors if p.requires_grad)
        lines.append(f"  {name:28}{trained:>14,}{_numel(tensors) - trained:>14,}")
    trained = _numel(p for p in model.parameters() if p.requires_grad)
    lines.append(f"  {'all':28}{trained:>14,}{_numel(model.parameters()) - trained:>14,}")
    m, size, channels = config.model, model.backbone.feature_size, model.backbone.channels
    several = "" if isinstance(channels, int) else f", joined from strides {model.backbone.strides}"
    depth = channels if isinstance(channels, int) else " + ".join(map(str, channels))
    lines.append(f"  {m.backbone}, feature map {size[0]} x {size[1]} x {depth}{several}, width {m.hidden_dim}")
    for what, path in (("pretrained", m.pretrained), ("init_from", m.init_from)):
        if isinstance(path, str):
            lines.append(f"  {what}: {path}" + ("" if os.path.isfile(path) else " (not found)"))
    if m.pretrained is True and m.backbone not in PACKAGED:
        lines.append("  pretrained: true, but no package carries these weights: this config would be refused")
    where = where_weights_are(m.backbone, model.backbone.body)
    return [*lines, f"  weights: {where[0]}", *(f"           {line}" for line in where[1:])]


def _feature_lines(config: TrainConfig, model: SADCL, counts: Counts) -> list[str]:
    """Maps of a frozen backbone on disk."""
    if config.model.train_backbone:
        return []
    side = config.data.image_size
    with torch.no_grad():
        maps = model.backbone(torch.empty((1, 3, side, side), device="meta"))
    each = 2 * sum(part.numel() for part in ([maps] if isinstance(maps, Tensor) else maps))
    where = config.data.feature_cache or os.path.join(config.output, "features")
    whole = each * (counts[0] + counts[1])
    return [
        "",
        "feature maps on disk",
        f"  {counts[0] + counts[1]:,} images x {each / 1e3:,.0f} KB in float16 = {whole / 1e9:,.1f} GB in {where}, "
        f"{SHARD_IMAGES} images a file",
    ]


def _memory_lines(config: TrainConfig, model: SADCL) -> list[str]:
    """Bytes by kind, for the larger of the two steps (the second)."""
    parameters = _numel(model.parameters())
    trained = _numel(p for p in model.parameters() if p.requires_grad)
    slots = {"adamw": 2, "sgd": 1 if config.step2.momentum else 0}
    states = max(slots[config.step1.optimizer], slots[config.step2.optimizer])
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in [*model.buffers(), *own_tensors(model)])
    width = 4 if config.amp == "off" else 2
    rows = [
        ("parameters", 4 * parameters, "4 bytes each"),
        ("gradients", 4 * trained, "4 bytes a trained parameter"),
        ("optimizer", 4 * states * trained, f"{states} x 4 bytes a trained parameter"),
        ("average", (4 * parameters + buffers) if config.ema.decay else 0, "a copy of the model, if ema.decay > 0"),
        ("buffers", buffers, "memory bank, batch-norm statistics, positions"),
        (
            "activations",
            _saved_bytes(config, model, width),
            f"what autograd keeps of one batch of {config.batch_size} in {8 * width}-bit, traced without computing",
        ),
    ]
    lines = [f"  {name:12}{size / MIB:>10,.0f} MiB  {formula}" for name, size, formula in rows]
    total = sum(size for _, size, _ in rows)
    return [
        *lines,
        f"  {'sum':12}{total / MIB:>10,.0f} MiB  without workspaces, cache of the allocator, and the losses",
    ]


def _saved_bytes(config: TrainConfig, model: SADCL, width: int) -> int:
    """Bytes of the tensors that the backward of a forward of step 2 needs, each storage once."""
    kept: dict[int, Tensor] = {}  # the tensors themselves: a freed storage's address could come again
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers(), *own_tensors(model)]}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    frozen, size = not config.model.train_backbone, config.data.image_size
    batch = torch.empty((config.batch_size, 3, size, size), device="meta")
    if frozen:
        with torch.no_grad():
            batch = model.backbone(batch)
    model.train()
    backend = patch.dict(os.environ, SADCL_BACKEND="")  # as on a GPU: a backend for CPUs takes no meta tensors
    with backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (model.head if frozen else model)(batch, contrastive=True)
    sizes = [(t.untyped_storage().nbytes(), t.is_floating_point()) for key, t in kept.items() if key not in own]
    return sum(size * width // 4 if floating else size for size, floating in sizes)


def _stage_lines(config: TrainConfig, name: str, step: StepConfig, images: int, model: SADCL) -> list[str]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # started by torchrun
    batches = -(-(images // processes) // config.batch_size)
    per_epoch = -(-batches // step.accumulate)
    optimizer = make_optimizer(model, step)
    schedule = make_schedule(optimizer, step, per_epoch)
    marks = sorted({round(step.epochs * part) for part in (0, 0.1, 0.2, 0.5, 0.75, 1)})
    rates = []
    for epoch in range(step.epochs + 1):
        if epoch in marks:
            rates.append(f"{epoch}: {max(group['lr'] for group in optimizer.param_groups):.2g}")
        if epoch < step.epochs:
            advance(optimizer, schedule, per_epoch - (epoch == step.epochs - 1))
    loss: DualContrastiveLoss = make_loss(config.loss)
    weights = (loss.classification_weight, loss.sample_weight, loss.prototype_weight)
    used = "ASL" if name != "step2" else "{:g} ASL + {:g} SSCL + {:g} PSCL".format(*weights)
    together = f" x {processes} processes" if processes > 1 else ""
    accumulated = f" x {step.accumulate} accumulated" if step.accumulate > 1 else ""
    lines = [
        f"  {used}; formulation {config.loss.formulation}" if name == "step2" else f"  {used}",
        f"  batch {config.batch_size}{together}{accumulated}: {per_epoch:,} optimizer steps an epoch, "
        f"{per_epoch * step.epochs:,} in {step.epochs} epochs",
        f"  {step.optimizer}, weight decay {step.weight_decay:g}, clip {step.clip or 'none'}; "
        + ", ".join(
            f"{g['name']}: {_numel(g['params']):,} at {g.get('max_lr', g['initial_lr']):g}"
            for g in optimizer.param_groups
        ),
        f"  {step.schedule}, learning rate after epoch {', '.join(rates)}",
        f"  augmentation: {_augmentation(step.augment)}",
        f"  ends with the {step.select} epoch"
        + (f"; stops after {step.patience} without a better mAP" if step.patience else ""),
    ]
    return lines


def _augmentation(config: AugmentConfig) -> str:
    if not augments(config):
        return "none"
    said = {
        f"multi-scale crop {config.crop_scales}": config.crop_scales,
        f"random resized crop from {config.crop_min_area:g} of the area": config.crop_min_area,
        f"flip {config.flip:g}": config.flip,
        f"RandAugment({config.rand_augment}, {config.magnitude})": config.rand_augment,
        f"cutout {config.cutout:g}": config.cutout,
    }
    return ", ".join(text for text, there in said.items() if there)


def _numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)
