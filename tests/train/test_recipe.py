"""The recipe: each option changes what it should, and nothing when it is off."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

for needed in ("PIL", "timm", "torchvision", "jsonargparse", "tqdm", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.head import SADCLHead  # noqa: E402
from sadcl.train.augment import Augmented, MultiScaleCrop, make_transform  # noqa: E402
from sadcl.train.build import make_loss  # noqa: E402
from sadcl.train.config import (  # noqa: E402
    AugmentConfig,
    EmaConfig,
    LossConfig,
    StepConfig,
    TrainConfig,
    check_config,
)
from sadcl.train.ema import make_ema  # noqa: E402
from sadcl.train.loop import NonFiniteLoss, autocast_dtype, evaluate, make_stage, train_epoch  # noqa: E402
from sadcl.train.optim import make_optimizer, make_schedule, param_groups  # noqa: E402
from sadcl.train.order import ShuffledBatches, rng_state, set_rng_state  # noqa: E402
from sadcl.train.timing import SECTIONS, Stopwatch  # noqa: E402

CPU = torch.device("cpu")
ALL = AugmentConfig(crop_scales=[1.0, 0.75, 0.5], flip=0.5, rand_augment=2, cutout=0.5)


class Noise(Dataset[Any]):
    """Pictures of noise, wider than high, as a data set of files would load them."""

    def __len__(self) -> int:
        return 12

    def load(self, index: int, at_least: int | None = None) -> tuple[Image.Image, Tensor]:
        del at_least
        pixels = np.random.default_rng(index).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        return Image.fromarray(pixels), torch.tensor([float(index)])


def items(workers: int, epoch: int, only: slice = slice(None)) -> Tensor:
    data = Augmented(Noise(), make_transform(ALL, 32), seed=5)
    data.set_epoch(epoch)
    return torch.cat([x for x, _ in DataLoader(data, batch_size=1, num_workers=workers)])[only]


class Net(nn.Module):
    """A model with the parts that parameter groups tell apart; called as a SADCL model is."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3)
        self.head = SADCLHead(8, 4, 16, 2, 32, 0, 1, 8, (6, 6), dropout, contrastive=False)

    def forward(self, images: Tensor, contrastive: bool = True) -> Any:
        return self.head(self.backbone(images), contrastive=contrastive)


def pictures(count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(images, (torch.rand(count, 4, generator=generator) < 0.5).float())


def run_epochs(step: StepConfig, batch_size: int, dropout: float = 0.0, **options: Any) -> tuple[Any, Any, list[Any]]:
    """Train a fresh model: (model, stage, losses of the epochs)."""
    torch.manual_seed(1)
    model = Net(dropout)
    stage = make_stage(model, pictures(), step, batch_size, 7, 0, **options)
    losses = [
        train_epoch(model, model, stage, make_loss(LossConfig()), contrastive=False, device=CPU)  # type: ignore[arg-type]
        for _ in range(step.epochs)
    ]
    return model, stage, losses


# -- augmentation --


def test_augmented_items_depend_on_seed_epoch_and_index_alone() -> None:
    first = items(workers=0, epoch=0)
    assert first.shape == (12, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(items(workers=2, epoch=0), first)
    assert not torch.equal(items(workers=0, epoch=1), first)
    data = Augmented(Noise(), make_transform(ALL, 32), seed=5)
    assert torch.equal(data[7][0], first[7])  # alone, as after a resume
    other = Augmented(Noise(), make_transform(ALL, 32), seed=6)
    assert not torch.equal(other[7][0], first[7])


def test_running_workers_see_the_next_epoch() -> None:
    data = Augmented(Noise(), make_transform(ALL, 32), seed=5)
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert torch.equal(torch.cat([x for x, _ in loader]), items(workers=0, epoch=epoch))


def test_augmentation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _ = Augmented(Noise(), make_transform(ALL, 32), seed=5)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_each_transform_does_its_part() -> None:
    plain = Noise().load(0)[0]
    square = make_transform(AugmentConfig(), 32)(plain)
    flipped = make_transform(AugmentConfig(flip=1.0), 32)(plain)
    assert torch.equal(flipped, square.flip(-1))
    erased = make_transform(AugmentConfig(cutout=0.5), 32)(plain)
    changed = (erased != square).any(0)
    assert int(changed.sum()) <= 16 * 16 and int((erased == 128).all(0).sum()) >= 16 * 16
    assert not torch.equal(make_transform(AugmentConfig(rand_augment=2, magnitude=20), 32)(plain), square)
    area = make_transform(AugmentConfig(crop_min_area=0.1), 32)(plain)
    assert area.shape == (3, 32, 32) and not torch.equal(area, square)


def test_multi_scale_crop_draws_neighbouring_scales_within_the_picture() -> None:
    crop, picture = MultiScaleCrop(32, [0.5, 1.0, 0.75]), Noise().load(0)[0]
    seen = set()
    for _ in range(200):
        p = crop.make_params([picture])
        assert 0 <= p["top"] <= 40 - p["height"] and 0 <= p["left"] <= 60 - p["width"]
        seen.add((p["width"], p["height"]))
    sides = (40, 30, 20)
    assert seen == {(a, b) for a in sides for b in sides if abs(a - b) <= 10}


def test_augmentation_needs_a_trained_backbone() -> None:
    config = TrainConfig(step1=StepConfig(augment=AugmentConfig(flip=0.5)))
    with pytest.raises(ValueError, match=r"step1\.augment needs model\.train_backbone"):
        check_config(config)
    config.model.train_backbone = True
    check_config(config)


# -- optimizer, groups, schedules --


def test_parameter_groups() -> None:
    model = Net()
    assert [g["name"] for g in param_groups(model, StepConfig())] == ["model"]
    step = StepConfig(learning_rate=1e-2, weight_decay=0.1, backbone_factor=0.1, decay_vectors=False)
    groups = {g["name"]: g for g in param_groups(model, step)}
    assert set(groups) == {"backbone", "backbone, vectors", "model", "model, vectors"}
    assert groups["backbone"]["lr"] == pytest.approx(1e-3) and groups["model"]["lr"] == 1e-2
    assert groups["model"]["weight_decay"] == 0.1 and groups["model, vectors"]["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in groups["model, vectors"]["params"])
    assert all(p.ndim > 1 for p in groups["model"]["params"])
    total = sum(p.numel() for g in groups.values() for p in g["params"])
    assert total == sum(p.numel() for p in model.parameters())
    model.backbone.requires_grad_(False)
    assert {g["name"] for g in param_groups(model, step)} == {"model", "model, vectors"}


def test_optimizer_kind() -> None:
    sgd = make_optimizer(Net(), StepConfig(optimizer="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
    assert isinstance(make_optimizer(Net(), StepConfig()), torch.optim.AdamW)


def rates(step: StepConfig, steps_per_epoch: int = 10) -> list[float]:
    optimizer = make_optimizer(Net(), step)
    schedule = make_schedule(optimizer, step, steps_per_epoch)
    seen = []
    for _ in range(step.epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(seen) < step.epochs * steps_per_epoch else None
    return seen


def test_schedules() -> None:
    base = StepConfig(epochs=4, learning_rate=1.0)
    cycle = rates(replace(base, pct_start=0.25))
    assert max(cycle) == pytest.approx(1.0) and cycle.index(max(cycle)) == 9 and cycle[-1] < 1e-4
    cosine = rates(replace(base, schedule="cosine"))
    assert cosine[20] == pytest.approx(0.5) and cosine[0] == 1.0
    stairs = rates(replace(base, schedule="multistep", milestones=[1, 3]))
    assert [stairs[i] for i in (0, 9, 10, 29)] == pytest.approx([1, 1, 0.1, 0.1]) and stairs[30] == pytest.approx(0.01)
    assert rates(replace(base, schedule="constant")) == [1.0] * 40
    risen = rates(replace(base, schedule="multistep", milestones=[2], warmup_epochs=1))
    assert risen[0] == pytest.approx(0.01) and risen[10] == pytest.approx(1.0) and risen[20] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep", "constant"])
def test_schedule_state_survives_a_checkpoint(schedule: Any, tmp_path: Any) -> None:
    step = StepConfig(epochs=2, schedule=schedule, milestones=[1], warmup_epochs=0.0 if schedule == "onecycle" else 0.5)
    _, stage, _ = run_epochs(replace(step, accumulate=1), 8)
    torch.save(stage.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    _, again, _ = run_epochs(replace(step, epochs=2), 8)
    again.load_state_dict(loaded)
    assert again.scheduler.state_dict() == stage.scheduler.state_dict()


# -- accumulation, clipping, amp, ema --


@pytest.mark.parametrize("count", [20, 18])  # 18: the last batch of an epoch is smaller, and so is its step
def test_accumulated_batches_are_one_big_batch_for_asl(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pictures
    monkeypatch.setattr(f"{__name__}.pictures", lambda: whole(count))
    step = StepConfig(epochs=2, schedule="constant", optimizer="sgd", learning_rate=1e-4)
    big, big_stage, big_losses = run_epochs(step, 8)
    small, stage, losses = run_epochs(replace(step, accumulate=2), 4)
    assert stage.steps == big_stage.steps == 2 * math.ceil(count / 8)
    for a, b in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert losses[-1]["total"] == pytest.approx(big_losses[-1]["total"], rel=1e-5)


def test_clipping_bounds_the_step() -> None:
    step = StepConfig(epochs=1, schedule="constant", optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0)
    torch.manual_seed(1)
    before = torch.cat([p.detach().flatten() for p in Net().parameters()])
    model, stage, _ = run_epochs(replace(step, clip=1e-3), 20)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert stage.steps == 1 and float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_bfloat16_trains_in_autocast_with_losses_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def loss_of(config: LossConfig) -> Any:
        loss = real(config)
        loss.classification.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        return loss

    real = make_loss
    monkeypatch.setattr(f"{__name__}.make_loss", loss_of)
    step = StepConfig(epochs=1)
    _, stage, half = run_epochs(step, 8, amp="bf16")
    assert stage.autocast is torch.bfloat16 and set(seen) == {torch.float32}
    _, _, full = run_epochs(step, 8)
    assert half != full and half[0]["total"] == pytest.approx(full[0]["total"], rel=0.02)


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="amp: fp16 needs a GPU"):
        autocast_dtype("fp16", CPU)


def test_ema_follows_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    for warmup in (True, False):
        ema: Any = make_ema(model, EmaConfig(decay=0.5, warmup=warmup))
        expected = None
        for t in range(1, 6):
            with torch.no_grad():
                model.weight.fill_(float(t * t))
            ema.update(model, t)
            d = 0.0 if t == 1 else min(0.5, 1 - t ** (-2 / 3)) if warmup else 0.5
            expected = float(t * t) if expected is None else d * expected + (1 - d) * t * t
            assert ema.module.weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert make_ema(model, EmaConfig()) is None


def test_ema_is_of_the_optimizer_steps_and_is_what_evaluate_sees() -> None:
    model, stage, _ = run_epochs(StepConfig(epochs=2), 8, ema=EmaConfig(decay=0.9))
    average = stage.ema.module
    assert not torch.equal(average.head.queries, model.head.queries)
    reports = [evaluate(m, m, DataLoader(pictures(), 5), CPU) for m in (model, average)]
    assert reports[0].mAP != reports[1].mAP or not torch.equal(average.backbone.weight, model.backbone.weight)


# -- order, generators, times --


def test_order_is_that_of_a_shuffling_loader_and_can_begin_anywhere() -> None:
    generator = torch.Generator().manual_seed(9)
    torchs = DataLoader(range(10), 4, shuffle=True, generator=generator)  # type: ignore[arg-type]
    ours = ShuffledBatches(10, 4, 9)
    for _ in range(3):
        expected = [batch.tolist() for batch in torchs]
        assert list(ours) == expected and len(ours) == 3
        for skip in range(4):
            resumed = ShuffledBatches(10, 4, 0)
            resumed.load_state_dict({**ours.state_dict(), "batch": skip})
            assert list(resumed) == expected[skip:]
        ours.finish_epoch()


def test_resumed_in_the_middle_of_an_epoch_is_bitwise_the_same() -> None:
    """Saved after each optimizer step of epoch 2; every continuation ends with the same weights and means."""
    step = StepConfig(epochs=3, accumulate=2, clip=1.0)
    torch.manual_seed(1)
    model = Net(0.3)
    stage = make_stage(model, pictures(), step, 4, 7, 0, ema=EmaConfig(decay=0.9))
    saved = []

    def keep(parts: dict[str, float]) -> None:
        if stage.batches.epoch == 1:
            saved.append(copy.deepcopy((model.state_dict(), stage.state_dict())))

    loss = make_loss(LossConfig())
    losses = [
        train_epoch(model, model, stage, loss, contrastive=False, device=CPU, on_step=keep)  # type: ignore[arg-type]
        for _ in range(3)
    ]
    assert [state["position"]["batch"] for _, state in saved] == [2, 4, 5]
    for weights, state in saved:
        torch.manual_seed(99)
        other = Net(0.3)
        resumed = make_stage(other, pictures(), step, 4, 123, 0, ema=EmaConfig(decay=0.9))
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        rest = [
            train_epoch(other, other, resumed, loss, contrastive=False, device=CPU)  # type: ignore[arg-type]
            for _ in range(2)
        ]
        assert rest == losses[1:]
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        for name, value in stage.ema.module.state_dict().items():
            assert torch.equal(resumed.ema.module.state_dict()[name], value), name


def test_generators_come_back(tmp_path: Any) -> None:
    torch.save(rng_state(), tmp_path / "rng.pt")
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn


def test_times_of_an_epoch_add_up() -> None:
    _, stage, _ = run_epochs(StepConfig(epochs=1), 8)
    assert stage.speed["images_per_second"] > 0
    assert sum(stage.speed[name] for name in SECTIONS) == pytest.approx(1.0)
    assert all(stage.speed[name] > 0 for name in SECTIONS)
    assert set(Stopwatch(CPU).seconds()) == set(SECTIONS)


def test_nan_in_a_batch_stops_before_the_weights_change() -> None:
    data = pictures()
    data.tensors[0][3] = float("nan")
    torch.manual_seed(1)
    model = Net()
    stage = make_stage(model, data, StepConfig(), 20, 7, 0)
    before = model.backbone.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="not finite: total nan") as caught:
        train_epoch(model, model, stage, make_loss(LossConfig()), contrastive=False, device=CPU)  # type: ignore[arg-type]
    assert torch.equal(model.backbone.weight, before)
    assert caught.value.batch["images"].shape == (20, 3, 8, 8)
