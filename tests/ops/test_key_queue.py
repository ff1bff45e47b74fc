"""The ring of keys, what the modules pass on, and the published names of the image-level losses."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch

import sadcl
from sadcl import functional as F
from sadcl.compat import msc, mulsupcon, multisupcon
from sadcl.testing import make_features, make_labels


def numbered(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that hold their number, with labels of it modulo 3, minus 1."""
    numbers = torch.arange(first, last)
    return numbers[:, None].float().expand(-1, 2), (numbers[:, None] % 3 - 1).expand(-1, 4)


def test_the_last_keys_are_kept_with_their_labels() -> None:
    queue, count = sadcl.KeyQueue(5, 2, 4), 0
    assert queue.keys.shape == (0, 2) and queue.labels.shape == (0, 4) and queue.labels.dtype == torch.int8
    for size in (2, 0, 2, 3, 1, 5, 7, 12, 1):
        queue.enqueue(*numbered(count, count + size))
        count += size
        expected = list(range(max(0, count - 5), count))
        got = queue.keys[:, 0].int().tolist()
        assert sorted(got) == expected, size
        assert queue.labels.tolist() == [[number % 3 - 1] * 4 for number in got]


def test_a_saved_queue_goes_on_bit_for_bit() -> None:
    queue = sadcl.KeyQueue(5, 2, 4)
    queue.enqueue(*numbered(0, 7))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed, copied = sadcl.KeyQueue(5, 2, 4), copy.deepcopy(queue)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for other in (queue, resumed, copied):
        other.enqueue(*numbered(7, 10))
    for other in (resumed, copied):
        assert torch.equal(other.keys, queue.keys) and torch.equal(other.labels, queue.labels)
    with pytest.raises(ValueError, match="a queue of 5 keys"):
        resumed.set_extra_state({"filled": 6, "next": 0})


def test_what_a_queue_refuses() -> None:
    queue, (keys, labels) = sadcl.KeyQueue(5, 2, 4), numbered(0, 3)
    for error, words, args in [
        (ValueError, "keys: expected dim=2", (keys[:, :1], labels)),
        (ValueError, "labels: expected K=3", (keys, labels[:2])),
        (ValueError, "labels: expected num_classes=4", (keys, labels[:, :3])),
        (ValueError, "labels: expected 0, 1 or -1", (keys, labels + 5)),
        (TypeError, "keys: expected a floating", (keys.int(), labels)),
        (TypeError, "keys: expected a torch.Tensor", (None, labels)),
    ]:
        with pytest.raises(error, match=words):
            queue.enqueue(*args)
    assert queue.filled == 0
    with pytest.raises(ValueError, match="size: expected an integer > 0, got 0"):
        sadcl.KeyQueue(0, 2, 4)
    with pytest.raises(TypeError, match="dim: expected an integer"):
        sadcl.KeyQueue(5, 2.0, 4)


def test_momentum_contrast_from_an_empty_queue() -> None:
    """The recipe of docs/multilabel_losses.md."""
    encoder = torch.nn.Linear(6, 4)
    average = torch.optim.swa_utils.AveragedModel(encoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    loss_of = sadcl.MultiLabelSupConLoss("mulsupcon", include_batch=False, learnable_temperature=(0.1, 0.01, 1.0))
    queue = sadcl.KeyQueue(16, 4, 3)
    optimizer = torch.optim.SGD([*encoder.parameters(), *loss_of.parameters()], 0.1)
    losses = []
    for step in range(4):
        images, labels = make_features(8, 6, seed=step), make_labels(8, 3, seed=step)
        loss = loss_of(encoder(images), labels, queue.keys, queue.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(encoder)
        with torch.no_grad():
            queue.enqueue(average(images), labels)
        losses.append(loss.item())
    assert losses[0] == 0 and all(loss > 0 for loss in losses[1:]) and queue.filled == 16
    assert loss_of.log_temperature.grad != 0


def test_the_module_passes_everything_on() -> None:
    x, labels = make_features(6, 2, 9), make_labels(6, 5)
    keys, key_labels, prototypes = make_features(4, 9, seed=2), make_labels(4, 5, seed=2), make_features(5, 9, seed=3)
    options: dict[str, Any] = {"temperature": 0.2, "base_temperature": 0.1, "alpha": 0.5, "beta": 0.4}
    class_weight, sample_weight = torch.rand(5), torch.rand(6)
    module = sadcl.MultiLabelSupConLoss("msc", normalize=False, reduction="none", class_weight=class_weight, **options)
    got = module(x, labels, keys, key_labels, prototypes, sample_weight=sample_weight)
    want = F.multilabel_supcon_loss(
        x, labels, weighting="msc", keys=keys, key_labels=key_labels, prototypes=prototypes, normalize=False,
        reduction="none", class_weight=class_weight, sample_weight=sample_weight, **options,
    )  # fmt: skip
    assert torch.equal(got, want) and "weighting='msc'" in repr(module)
    jaccard = sadcl.MultiLabelSupConLoss("jaccard", threshold=0.6)
    assert torch.equal(jaccard(x, labels), F.multilabel_supcon_loss(x, labels, weighting="jaccard", threshold=0.6))
    per_image = sadcl.MultiLabelSupConLoss(per_image=True)
    assert torch.equal(per_image(x, labels), F.multilabel_supcon_loss(x, labels, per_image=True))
    weights = torch.rand(12, 12)
    assert torch.equal(
        per_image.__class__()(x, None, weights=weights), F.multilabel_supcon_loss(x, None, weights=weights)
    )
    logits = make_features(6, 5)
    assert torch.equal(sadcl.ZLPRLoss("sum")(logits, labels), F.zlpr_loss(logits, labels, reduction="sum"))
    two_way = sadcl.TwoWayLoss(2.0, 3.0, class_weight=class_weight)
    assert torch.equal(
        two_way(logits, labels, sample_weight=sample_weight),
        F.two_way_loss(
            logits, labels, positive_temperature=2.0, negative_temperature=3.0, class_weight=class_weight,
            sample_weight=sample_weight,
        ),
    )  # fmt: skip


GOLDEN = __import__("pathlib").Path(__file__).parents[1] / "golden"


def test_published_names_give_the_published_numbers() -> None:
    def close(got: torch.Tensor, want: np.ndarray) -> None:
        assert abs(got.item() - float(want)) <= 1e-5 * max(abs(float(want)), 0.3)

    def read(name: str) -> dict[str, Any]:
        golden = np.load(GOLDEN / f"{name}.npz")
        return {key: torch.tensor(golden[key]) if golden[key].ndim else golden[key].item() for key in golden}

    g = read("mlc_jaccard_010")
    unit = torch.nn.functional.normalize(g["features"], dim=-1)[:, None]
    loss = multisupcon.MultiSupConLoss(g["temperature"], "all", g["temperature"], c_treshold=g["threshold"])
    close(loss(unit, g["labels"]), g["released_loss"])
    assert multisupcon.MultiSupConLoss().c_treshold == 0.3
    scaled = multisupcon.MultiSupConLoss(g["temperature"], "one", 2 * g["temperature"], c_treshold=g["threshold"])
    close(scaled(unit, g["labels"]), np.asarray(g["released_loss"] / 2))
    for name, pattern in (
        ("mlc_any_008", "any"),
        ("mlc_mulsupcon_016", "MulSupCon"),
        ("mlc_mulsupcon_023", "MulSupCon"),
    ):
        g = read(name)
        mul = mulsupcon.MulSupConLoss(pattern, with_weight=bool(g.get("per_image")), temperature=g["temperature"])
        close(mul(g["features"], g["labels"], g["keys"], g["key_labels"]), g["released_loss"])
    g = read("mlc_msc_006")
    of_msc = msc.LossContrastiveMSC(g["alpha"], g["beta"], g["temperature"])
    close(of_msc(g["features"], g["labels"], g["prototypes"]), g["released_loss"])
    g = read("mlc_msc_126")
    of_msc = msc.LossContrastiveMSC(g["alpha"], g["beta"], g["temperature"])
    keys, of_keys = g["keys"], g["key_labels"]
    got = of_msc(g["features"], g["labels"], g["prototypes"], keys[:5], of_keys[:5], keys[5:], of_keys[5:])
    close(got, g["loss"])
    for wrong in ({"labels": None}, {"mask": torch.ones(2, 2)}, {"multi": False}):
        with pytest.raises(ValueError, match="expected labels"):
            multisupcon.MultiSupConLoss()(unit, **{"labels": g["labels"], **wrong})
