"""The training loop: one epoch of steps, one pass of evaluation. Plain PyTorch, meant to be copied from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sadcl.head import SADCLOutput
from sadcl.losses import AsymmetricLoss, DualContrastiveLoss
from sadcl.metrics import MultilabelAccumulator, MultilabelReport
from sadcl.model import SADCL
from sadcl.train.config import LossConfig, StepConfig

__all__ = ["Forward", "NonFiniteLoss", "Stage", "evaluate", "make_loss", "make_stage", "train_epoch"]

# Called as forward(batch, contrastive=...): the whole model, or its head on cached feature maps.
Forward = Callable[..., SADCLOutput]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; going on would destroy the weights."""


@dataclass
class Stage:
    """What trains in one step of the method: optimizer, its schedule, and the order of the images."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader[tuple[Tensor, Tensor]]
    order: torch.Generator  # drives the shuffling; saved and restored with a checkpoint

    def state_dict(self) -> dict[str, object]:
        """Everything that training continues from, besides the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        self.order.set_state(state["order"])  # type: ignore[arg-type]
        torch.set_rng_state(state["rng"])  # type: ignore[arg-type]


def make_stage(
    model: nn.Module,
    images: Dataset[tuple[Tensor, Tensor]],
    step: StepConfig,
    batch_size: int,
    seed: int,
    workers: int,
) -> Stage:
    """AdamW with a one-cycle schedule over all epochs, and a seeded shuffle."""
    torch.manual_seed(seed)  # dropout
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=False, generator=order, num_workers=workers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=step.learning_rate, weight_decay=step.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=step.learning_rate, total_steps=max(1, step.epochs * len(loader)), pct_start=0.2
    )
    return Stage(optimizer, scheduler, loader, order)


def make_loss(config: LossConfig) -> DualContrastiveLoss:
    """The method's three losses with the run's weights and constants."""
    return DualContrastiveLoss(
        config.sample_weight,
        config.prototype_weight,
        config.classification_weight,
        sample_temperature=config.sample_temperature,
        prototype_temperature=config.prototype_temperature,
        formulation=config.formulation,
        classification=AsymmetricLoss(config.gamma_neg, config.gamma_pos, config.clip, 1e-5, True, "released"),
    )


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
    """One pass over the training images.

    Args:
        model: what is trained.
        forward: the model itself, or its head on cached feature maps.
        stage: optimizer, schedule, loader.
        loss: all three losses; without ``contrastive`` only its classification part is used.
        contrastive: step 2 (True) or step 1 (False).
        device: where the batches go.
        on_step: called after every step with the step's loss parts.

    Returns:
        Means over the epoch: ``total``, ``classification``, and in step 2 ``sample`` and ``prototype``.

    Raises:
        NonFiniteLoss: before a step that would write NaN into the weights.
    """
    model.train()
    sums: dict[str, float] = {}
    for images, labels in stage.loader:
        images, labels = images.to(device), labels.to(device)
        output = forward(images, contrastive=contrastive)
        if contrastive:
            result = loss(output.embeddings, output.bank_embeddings, output.prototype_embeddings, labels, output.logits)
            named = zip(("total", "sample", "prototype", "classification"), result, strict=True)
            model.head.update_bank(
                output, labels
            )  # after the losses, before the backward, with this forward's features
        else:
            classification = loss.classification(output.logits, labels)
            named = zip(("total", "classification"), (classification, classification), strict=True)
        tensors = dict(named)
        parts = {name: float(value.detach()) for name, value in tensors.items()}
        if not all(abs(value) < float("inf") for value in parts.values()):  # NaN fails this too
            raise NonFiniteLoss(f"the loss is not finite: {parts}; a smaller learning rate usually helps")
        stage.optimizer.zero_grad(set_to_none=True)
        tensors["total"].backward()
        stage.optimizer.step()
        stage.scheduler.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value * len(labels)
        on_step(parts)
    count = len(stage.loader.dataset)  # type: ignore[arg-type]
    return {name: value / count for name, value in sums.items()}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    forward: Forward,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    seen: MultilabelAccumulator | None = None,
) -> MultilabelReport:
    """Metrics of the model over all batches (VOC-style AP, threshold 0.5); ``seen`` collects scores and labels."""
    was_training = model.training
    model.eval()
    seen = MultilabelAccumulator() if seen is None else seen
    for images, labels in batches:
        output = forward(images.to(device), contrastive=False)
        seen.update(output.logits.sigmoid(), labels)
    model.train(was_training)
    return seen.compute()
