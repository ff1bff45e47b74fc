"""Steps that must not be (gradients that are not finite, overflows that a scaler passes over); schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "yaml"):
    pytest.importorskip(needed)

from test_recipe import CPU, Net, pictures  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from sadcl.train.build import make_loss  # noqa: E402
from sadcl.train.config import EmaConfig, LossConfig, StepConfig  # noqa: E402
from sadcl.train.loop import SMALLEST_SCALE, NonFiniteLoss, Stage, make_stage, train_epoch  # noqa: E402
from sadcl.train.optim import make_optimizer, make_schedule  # noqa: E402

# -- gradients that are not finite though the loss is --


def spoilt(calls: set[int], value: float, step: StepConfig, scale: float | None = None) -> tuple[Net, Stage]:
    """A model of which one weight's gradient is ``value`` in these backwards, and what trains it on 5 batches of 4."""
    torch.manual_seed(1)
    model = Net()
    stage = make_stage(model, pictures(), step, 4, 7, 0, ema=EmaConfig(decay=0.9))
    if scale is not None:
        stage.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    count = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return gradient.clone().fill_(value) if count in calls else gradient

    model.head.queries.register_hook(hook)
    return model, stage


def train(model: Net, stage: Stage, on_step: Callable[[Any], None] = lambda parts: None) -> dict[str, float]:
    loss = make_loss(LossConfig())
    return train_epoch(model, model, stage, loss, contrastive=False, device=CPU, on_step=on_step)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e25])
@pytest.mark.parametrize("step", [StepConfig(), StepConfig(clip=1.0), StepConfig(accumulate=2)], ids=str)
@pytest.mark.parametrize("when", [1, 3])
def test_gradient_that_is_not_finite_stops_at_its_batch(value: float, step: StepConfig, when: int) -> None:
    """Of two batches that are accumulated, the first one may be the culprit."""
    model, stage = spoilt({when}, value, step)
    batch = list(stage.batches)[when - 1]
    with pytest.raises(NonFiniteLoss, match="gradient is not finite, though the loss is: total") as caught:
        train(model, stage)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert stage.batches.batch == when - 1 and stage.steps == (when - 1) // step.accumulate
    assert torch.equal(caught.value.batch["images"], pictures().tensors[0][batch])
    assert caught.value.batch["gradient"] == ["head.queries"]


# -- steps that the scaler passes over --


def test_skipped_step_moves_neither_schedule_nor_count_nor_average() -> None:
    model, stage = spoilt({1, 3}, float("inf"), StepConfig(epochs=2), scale=1024.0)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's word about a schedule that moves before its optimizer
        train(model, stage, lambda parts: said.append((stage.steps, stage.scheduler.last_epoch)))
    assert said == [(1, 1), (2, 2), (3, 3)]
    assert stage.scaler.get_scale() == 256.0 and stage.batches.epoch == 1
    assert {int(state["step"]) for state in stage.optimizer.state.values()} == {3}
    plain, other = spoilt(set(), 0.0, StepConfig(epochs=2))
    average = [value.clone() for value in other.ema.module.parameters()]
    other.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    next(iter(plain.parameters())).register_hook(lambda gradient: gradient * float("nan"))
    train(plain, other)
    assert other.steps == 0 and other.scheduler.last_epoch == 0
    assert all(map(torch.equal, other.ema.module.parameters(), average))


def test_gradient_that_no_scale_helps_stops() -> None:
    model, stage = spoilt(set(range(100)), float("inf"), StepConfig(), scale=4 * SMALLEST_SCALE)
    with pytest.raises(NonFiniteLoss, match="gradient is not finite") as caught:
        train(model, stage)
    assert stage.batches.batch == 2 and caught.value.batch["gradient"] == ["head.queries"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1.0, 1024.0])
def test_finite_gradient_without_a_finite_norm_stops_beside_a_scaler(scale: float) -> None:
    """The hook sees what is scaled: 1e25 stays finite at each of these, and so does the scaler's own look at it."""
    model, stage = spoilt({3}, 1e25, StepConfig(), scale=scale)
    with pytest.raises(NonFiniteLoss, match="gradient is not finite") as caught:
        train(model, stage)
    assert stage.steps == 2 and caught.value.batch["gradient"] == ["head.queries"]
    moments = [value for state in stage.optimizer.state.values() for value in state.values()]
    assert all(bool(value.isfinite().all()) for value in (*model.parameters(), *moments))


# -- schedules --


def rates(step: StepConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = make_optimizer(nn.Linear(2, 2), step)
    schedule = make_schedule(optimizer, step, steps_per_epoch)
    found = []
    for _ in range(step.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "options",
    [
        *({"schedule": "onecycle", "pct_start": pct} for pct in (0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9)),
        *({"schedule": "cosine", "warmup_epochs": warmup} for warmup in (0, 0.3, 1, 5)),
        *({"schedule": "constant", "warmup_epochs": warmup} for warmup in (0, 0.3, 1, 5)),
        *({"schedule": "multistep", "milestones": [1], "warmup_epochs": warmup} for warmup in (0, 0.3, 1, 5)),
    ],
    ids=str,
)
def test_any_number_of_steps_trains(options: dict[str, Any], optimizer: str) -> None:
    for epochs in (1, 2, 5):
        for steps_per_epoch in (*range(1, 13), 20, 30):
            step = StepConfig(epochs=epochs, learning_rate=1.0, optimizer=optimizer, **options)  # type: ignore[arg-type]
            found = rates(step, steps_per_epoch)
            assert all(0 <= rate <= 1 + 1e-9 for rate in found) and max(found) >= 0.0099, (epochs, steps_per_epoch)


def test_onecycle_whose_first_step_is_the_peak() -> None:
    found = rates(StepConfig(epochs=1, learning_rate=1.0, pct_start=0.2), 5)
    cosine = [0.5 * (1 + torch.tensor(k * torch.pi / 4).cos().item()) for k in range(5)]
    assert found == pytest.approx(cosine, abs=1e-5)


def test_milestone_within_the_warm_up_counts() -> None:
    step = StepConfig(epochs=4, learning_rate=1.0, schedule="multistep", milestones=[1, 3], warmup_epochs=2, gamma=0.1)
    assert rates(step, 2) == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 0.1, 0.1, 0.01, 0.01])
