"""The training loop: one epoch of steps, one pass of evaluation. Plain PyTorch, meant to be copied from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sadcl.head import SADCLOutput, move_maps
from sadcl.losses import DualContrastiveLoss
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.model import SADCL
from sadcl.train import distributed
from sadcl.train.config import EmaConfig, StepConfig
from sadcl.train.ema import make_ema
from sadcl.train.nonfinite import NonFiniteLoss, accused, another
from sadcl.train.optim import advance, make_optimizer, make_schedule
from sadcl.train.order import ShuffledBatches, rng_state, set_rng_state
from sadcl.train.timing import Stopwatch

__all__ = [
    "Forward",
    "NonFiniteLoss",
    "Stage",
    "autocast_dtype",
    "evaluate",
    "make_stage",
    "predict_all",
    "train_epoch",
]

# Called as forward(batch, contrastive=...): the whole model, or its head on cached feature maps.
Forward = Callable[..., SADCLOutput]
PREFETCH = 4  # batches a worker prepares in advance
SMALLEST_SCALE = 2.0**-14  # of gradients in float16
RANK_SEED = 1_000_003  # between the dropout seeds of two processes


@dataclass
class Stage:
    """What trains in one step of the method, besides the model.

    Attributes:
        optimizer: over the trained parameters.
        scheduler: steps once an optimizer step.
        loader: batches in the order that ``batches`` says.
        batches: order of the images, and how far training has come in it.
        scaler: of the gradients in float16; does nothing otherwise.
        autocast: type of the forward, or None for float32 without autocast.
        ema: average of the weights, or None.
        accumulate: batches an optimizer step.
        clip: largest norm of the gradient, 0 for any.
        steps: optimizer steps taken.
        sums: of the running epoch: each loss part times its images.
        speed: of the last finished epoch: images a second, and the share of the time in each section.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader[tuple[Tensor, Tensor]]
    batches: ShuffledBatches
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None = None
    ema: Any = None
    accumulate: int = 1
    clip: float = 0.0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.batches) // self.accumulate)

    def share(self) -> float:
        """What the next batch counts in the gradient of its optimizer step: its images by those of the step."""
        if self.accumulate == 1:
            return 1.0
        batch, size, count = self.batches.batch, self.batches.batch_size, self.batches.count
        first = batch // self.accumulate * self.accumulate * size
        whole = min(self.accumulate * size, count - first)
        return min(size, count - batch * size) / whole

    def will_step(self) -> bool:
        """Whether the next batch is the last one of its optimizer step."""
        return self._is_last(self.batches.batch + 1)

    def ends_step(self) -> bool:
        """Whether the batch that was just finished is the last one of its optimizer step."""
        return self._is_last(self.batches.batch)

    def _is_last(self, done: int) -> bool:
        return done % self.accumulate == 0 or done == len(self.batches)

    def trained(self) -> list[nn.Parameter]:
        """The parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradient_is_finite(self, forward: Forward) -> bool:
        """Whether the last backward left a finite gradient in this process; waits for the device.

        The square of its largest element has to be, too: what has none is clipped to nothing, and Adam's moments never
        forget it. Infinite and NaN are left to a scaler, which passes the step over, until no smaller scale helps.
        """
        peaks = distributed.own_peaks(forward, averaged=self.will_step())
        if not peaks:
            peaks = [nn.utils.get_total_norm([p.grad for p in self.trained() if p.grad is not None], float("inf"))]
        found, scale = torch.stack(peaks).float(), self.scaler.get_scale()
        good = (found / scale).square().isfinite()
        if self.scaler.is_enabled() and scale > SMALLEST_SCALE:
            good |= ~found.isfinite()
        return bool(good.all())

    def step(self, model: nn.Module) -> bool:
        """Clip, update the weights and their average, and move the learning rate on.

        Returns:
            Whether it did: where a gradient overflowed float16, the scaler passes the step over.
        """
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained(), self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < scale:
            return False
        self.scheduler.step()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(model, self.steps)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that training continues from, besides the model; valid after an optimizer step."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "position": self.batches.state_dict(),
            "steps": self.steps,
            "sums": dict(self.sums),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.batches.load_state_dict(state["position"])
        self.steps, self.sums = state["steps"], dict(state["sums"])
        set_rng_state(state["rng"])

    def load_other_images(self, state: dict[str, Any]) -> None:
        """Continue from the :meth:`state_dict` of a stage on other images, at the beginning of its epoch."""
        groups = self.optimizer.state_dict()["param_groups"]  # the rates come from the schedule, anew
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.batches.load_state_dict({**state["position"], "batch": 0})
        self.steps = self.batches.epoch * self.steps_per_epoch
        advance(self.optimizer, self.scheduler, self.steps)
        set_rng_state(state["rng"])


def make_stage(
    model: nn.Module,
    images: Dataset[tuple[Tensor, Tensor]],
    step: StepConfig,
    batch_size: int,
    seed: int,
    workers: int,
    *,
    device: torch.device | None = None,
    amp: str = "off",
    ema: EmaConfig | None = None,
) -> Stage:
    """Optimizer, schedule, seeded shuffle and what else a step of the method needs; seeds dropout.

    Among several processes ``batch_size`` and ``workers`` are those of one; they share the images and drop out apart.
    """
    device = device or next(model.parameters()).device
    torch.manual_seed(seed + RANK_SEED * distributed.rank())  # dropout
    count: int = len(images)  # type: ignore[arg-type]
    batches = ShuffledBatches(count, batch_size, seed, distributed.rank(), distributed.world())
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        generator=torch.Generator().manual_seed(seed),  # without one, the workers' seeds come from dropout's generator
    )
    optimizer = make_optimizer(model, step)
    return Stage(
        optimizer,
        make_schedule(optimizer, step, -(-len(batches) // step.accumulate)),
        loader,
        batches,
        torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
        autocast_dtype(amp, device),
        None if ema is None else make_ema(model, ema),
        step.accumulate,
        step.clip,
    )


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of the forward under ``amp``.

    Raises:
        ValueError: float16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("amp: fp16 needs a GPU; on the CPU expected off or bf16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def train_epoch(
    model: SADCL,
    forward: Forward,
    stage: Stage,
    loss: DualContrastiveLoss,
    *,
    contrastive: bool,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] = lambda parts: None,
) -> dict[str, float]:
    """One pass over the training images, or what is left of it in a resumed run.

    Args:
        model: what is trained.
        forward: the model itself, or its head on cached feature maps; wrapped by ``distributed.parallel`` among several
            processes.
        stage: optimizer, schedule, loader; afterwards ``stage.speed`` says where the time went.
        loss: all three losses; without ``contrastive`` only its classification part is used.
        contrastive: step 2 (True) or step 1 (False).
        device: where the batches go.
        on_step: called after every optimizer step that changed the weights, with the loss parts of its last batch;
            ``stage.state_dict()`` may be taken there.

    Returns:
        Means over the epoch: ``total``, ``classification``, and in step 2 ``sample`` and ``prototype``.

    Raises:
        NonFiniteLoss: in every process, before a step that would write NaN or infinity into the weights; that process
            has the batch whose loss or gradient it was.
    """
    model.train()
    stage.optimizer.zero_grad(set_to_none=True)
    seen = 0
    clock = Stopwatch(device)
    for images, labels in stage.loader:
        images, labels = move_maps(images, device), labels.to(device, non_blocking=True)
        clock.lap("data")
        with (
            torch.autocast(device.type, stage.autocast, enabled=stage.autocast is not None),
            distributed.synchronised(forward, now=stage.will_step()),
        ):
            output = forward(images, contrastive=contrastive)
        output = _in_float32(output)
        clock.lap("forward")
        parts = _losses(loss, output, labels, contrastive)
        if contrastive:  # after the losses, before the backward, with this forward's features
            model.head.update_bank(output, labels)
        values = _Fetch(parts)
        clock.lap("losses")
        stage.scaler.scale(parts["total"] * stage.share()).backward()
        clock.lap("backward")
        numbers = values.get()
        finite = all(map(math.isfinite, numbers.values())) and stage.gradient_is_finite(forward)
        if not distributed.everyone(finite):
            raise another() if finite else accused(model, images, labels, numbers, stage.scaler.get_scale())
        for name, value in numbers.items():
            stage.sums[name] = stage.sums.get(name, 0.0) + value * len(labels)
        seen += len(labels)
        stage.batches.batch += 1
        if stage.ends_step():
            moved = stage.step(model)
            clock.lap("optimizer")
            if moved:
                on_step(numbers)
    seconds = clock.seconds()
    whole = sum(seconds.values())
    rate = distributed.world() * seen / whole
    stage.speed = {"images_per_second": rate, **{name: value / whole for name, value in seconds.items()}}
    sums = distributed.gather(stage.sums)
    images_used = stage.batches.count * len(sums)
    means = {name: sum(part[name] for part in sums) / images_used for name in stage.sums}
    stage.sums = {}
    stage.batches.finish_epoch()
    return means


def _losses(loss: DualContrastiveLoss, output: SADCLOutput, labels: Tensor, contrastive: bool) -> dict[str, Tensor]:
    if not contrastive:
        classification = loss.classification(output.logits, labels)
        return {"total": classification, "classification": classification}
    result = loss(output.embeddings, output.bank_embeddings, output.prototype_embeddings, labels, output.logits)
    return dict(zip(("total", "sample", "prototype", "classification"), result, strict=True))


def _in_float32(output: SADCLOutput) -> SADCLOutput:
    """What autocast made in 16 bits, for the losses and the bank."""
    return SADCLOutput(*(None if part is None else part.float() for part in output))  # type: ignore[arg-type]


class _Fetch:
    """Loss values on their way to the host.

    On a GPU the copy starts before the backward is launched and is waited for afterwards, so the check for NaN costs
    no idle time: the device is busy with the backward.
    """

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.names = list(parts)
        self.values = torch.stack([value.detach() for value in parts.values()])
        self.arrived: torch.cuda.Event | None = None
        if self.values.is_cuda:
            pinned = torch.empty(self.values.shape, dtype=self.values.dtype, device="cpu", pin_memory=True)
            self.values = pinned.copy_(self.values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def get(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def evaluate(
    model: nn.Module,
    forward: Forward,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    seen: MultilabelAccumulator | None = None,
    autocast: torch.dtype | None = None,
) -> MultilabelReport:
    """Metrics of the model over all batches (VOC-style AP, threshold 0.5); ``seen`` collects scores and labels."""
    seen = MultilabelAccumulator() if seen is None else seen
    predict_all([(model, forward, seen)], batches, device, autocast)
    return seen.compute()


@torch.inference_mode()
def predict_all(
    models: Sequence[tuple[nn.Module, Forward, MultilabelAccumulator]],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> None:
    """Scores of several models in one pass over the batches: the trained weights and their average.

    Among several processes, a loader whose batch sampler is a ``distributed.BatchShard`` gives each its part; all end
    up with all scores.
    """
    were_training = [model.training for model, _, _ in models]
    for model, _, _ in models:
        model.eval()
    for images, labels in batches:
        maps = move_maps(images, device)
        for _, forward, seen in models:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = forward(maps, contrastive=False)
            seen.update(output.logits.float().sigmoid(), labels)
    shard = getattr(batches, "batch_sampler", None)
    for (model, _, seen), training in zip(models, were_training, strict=True):
        model.train(training)
        if isinstance(shard, distributed.BatchShard):
            distributed.gather_scores(seen, shard)
